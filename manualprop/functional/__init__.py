"""Hand-derived functions with the names, signatures and defaults of :mod:`torch.nn.functional`.

Each function checks its arguments, applies a rule of :mod:`manualprop.functions`, and reduces or writes back
what came out.  What torch raises for the same misuse is raised here, by torch's own forward where there is one.
"""

import inspect

import torch

from manualprop.functional._offer import offered as _offered
from manualprop.functional.activation import celu as celu
from manualprop.functional.activation import elu as elu
from manualprop.functional.activation import gelu as gelu
from manualprop.functional.activation import hardshrink as hardshrink
from manualprop.functional.activation import hardsigmoid as hardsigmoid
from manualprop.functional.activation import hardswish as hardswish
from manualprop.functional.activation import hardtanh as hardtanh
from manualprop.functional.activation import leaky_relu as leaky_relu
from manualprop.functional.activation import log_softmax as log_softmax
from manualprop.functional.activation import logsigmoid as logsigmoid
from manualprop.functional.activation import mish as mish
from manualprop.functional.activation import relu as relu
from manualprop.functional.activation import relu6 as relu6
from manualprop.functional.activation import relu_squared as relu_squared
from manualprop.functional.activation import selu as selu
from manualprop.functional.activation import sigmoid as sigmoid
from manualprop.functional.activation import silu as silu
from manualprop.functional.activation import softmax as softmax
from manualprop.functional.activation import softmin as softmin
from manualprop.functional.activation import softplus as softplus
from manualprop.functional.activation import softshrink as softshrink
from manualprop.functional.activation import softsign as softsign
from manualprop.functional.activation import tanh as tanh
from manualprop.functional.activation import tanhshrink as tanhshrink
from manualprop.functional.activation import threshold as threshold
from manualprop.functional.dropout import alpha_dropout as alpha_dropout
from manualprop.functional.dropout import dropout as dropout
from manualprop.functional.dropout import dropout1d as dropout1d
from manualprop.functional.dropout import dropout2d as dropout2d
from manualprop.functional.dropout import dropout3d as dropout3d
from manualprop.functional.dropout import feature_alpha_dropout as feature_alpha_dropout
from manualprop.functional.embedding import embedding as embedding
from manualprop.functional.fused import activation_linear as activation_linear
from manualprop.functional.fused import gated_linear as gated_linear
from manualprop.functional.fused import gated_mlp as gated_mlp
from manualprop.functional.fused import layer_norm_linear as layer_norm_linear
from manualprop.functional.fused import linear_activation as linear_activation
from manualprop.functional.fused import mlp as mlp
from manualprop.functional.fused import packed_relu as packed_relu
from manualprop.functional.fused import relu_dropout as relu_dropout
from manualprop.functional.fused import rms_norm_linear as rms_norm_linear
from manualprop.functional.gated import glu as glu
from manualprop.functional.gated import prelu as prelu
from manualprop.functional.gated import rrelu as rrelu
from manualprop.functional.linear import bilinear as bilinear
from manualprop.functional.linear import linear as linear
from manualprop.functional.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from manualprop.functional.loss import binary_cross_entropy as binary_cross_entropy
from manualprop.functional.loss import binary_cross_entropy_with_logits as binary_cross_entropy_with_logits
from manualprop.functional.loss import cross_entropy as cross_entropy
from manualprop.functional.loss import gaussian_nll_loss as gaussian_nll_loss
from manualprop.functional.loss import huber_loss as huber_loss
from manualprop.functional.loss import kl_div as kl_div
from manualprop.functional.loss import l1_loss as l1_loss
from manualprop.functional.loss import mse_loss as mse_loss
from manualprop.functional.loss import nll_loss as nll_loss
from manualprop.functional.loss import poisson_nll_loss as poisson_nll_loss
from manualprop.functional.loss import smooth_l1_loss as smooth_l1_loss
from manualprop.functional.margin import cosine_embedding_loss as cosine_embedding_loss
from manualprop.functional.margin import hinge_embedding_loss as hinge_embedding_loss
from manualprop.functional.margin import margin_ranking_loss as margin_ranking_loss
from manualprop.functional.margin import multi_margin_loss as multi_margin_loss
from manualprop.functional.margin import multilabel_margin_loss as multilabel_margin_loss
from manualprop.functional.margin import multilabel_soft_margin_loss as multilabel_soft_margin_loss
from manualprop.functional.margin import soft_margin_loss as soft_margin_loss
from manualprop.functional.margin import triplet_margin_loss as triplet_margin_loss
from manualprop.functional.margin import (
    triplet_margin_with_distance_loss as triplet_margin_with_distance_loss,
)
from manualprop.functional.norm import batch_norm as batch_norm
from manualprop.functional.norm import group_norm as group_norm
from manualprop.functional.norm import instance_norm as instance_norm
from manualprop.functional.norm import layer_norm as layer_norm
from manualprop.functional.norm import rms_norm as rms_norm

for _name, _function in [(name, f) for name, f in globals().items() if inspect.isfunction(f)]:
    if not _name.startswith("_"):
        globals()[_name] = _offered(_function)
        # ``torch.fx.symbolic_trace`` records a call of any of these as one node, as it does for torch.nn.functional: it
        # does not look inside, where shapes are compared.
        torch.fx.wrap(_name)
