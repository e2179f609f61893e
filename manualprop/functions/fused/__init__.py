"""Blocks: each rule is the exact composition of several rules, and keeps fewer bytes for backward."""

from manualprop.functions.fused.gated_mlp import *
from manualprop.functions.fused.linear_cross_entropy import *
from manualprop.functions.fused.mlp import *
from manualprop.functions.fused.norm_convolution import *
from manualprop.functions.fused.norm_linear import *
