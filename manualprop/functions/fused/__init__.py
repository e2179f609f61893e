"""Blocks: rules made of several rules, the exact composition of which they are, with fewer bytes kept for backward."""

from manualprop.functions.fused.gated_mlp import *
from manualprop.functions.fused.mlp import *
from manualprop.functions.fused.norm_linear import *
