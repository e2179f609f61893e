"""Right by definition: functions and modules of torch, and of this package."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import manualprop
from manualprop import functional as ours
from planted._table import Fresh, Inputs, control


def at_kinks(r: Inputs) -> tuple[Tensor]:
    """Zeros, and equal elements."""
    return (torch.tensor([[0.0, 1, 1, -1], [0, 0, 2, 2]], dtype=torch.float64).requires_grad_(),)


def enter(name, fn, args, *tempts, **options):
    control(*tempts, args=args, name=name, **options)(fn)


# ---------------------------------------------------------------- functions

enter("torch_sort", lambda x: x.sort(-1).values, lambda r: (r(3, 5),), "ties", "first_order")
enter(
    "torch_max", lambda x: x.max(-1), lambda r: (r(3, 5),), "ties", "partial_outputs", "output_requires_grad"
)
enter("torch_amax", lambda x: x.amax(-1), lambda r: (r(3, 5),), "ties")
enter(
    "torch_median",
    lambda x: x.contiguous().median(-1).values,
    lambda r: (r(3, 5),),
    "ties",
    "zero_size",
    "sizes",
)
enter("torch_max_at_ties", lambda x: x.max(-1).values, at_kinks, "first_order", "ties")
enter("torch_amax_at_ties", lambda x: x.amax(-1), at_kinks, "first_order", "forward_mode", "second_order")
enter("torch_sort_at_ties", lambda x: x.sort(-1).values, at_kinks, "first_order", "ties", "forward_mode")
enter("torch_relu_at_zero", torch.relu, at_kinks, "first_order", "ties", "forward_mode", "second_order")
enter("torch_abs_at_zero", torch.abs, at_kinks, "first_order", "ties", "forward_mode")
enter("torch_norm_at_zero", lambda x: x.norm(dim=0), at_kinks, "first_order", "ties", "second_order")
enter("torch_hardtanh_at_its_bounds", F.hardtanh, at_kinks, "first_order", "ties", "forward_mode")
enter("torch_clamp_at_its_bounds", lambda x: x.clamp(0, 1), at_kinks, "first_order", "ties", "forward_mode")
enter("torch_floor", lambda x: x.floor() * 2 + x, lambda r: (r(3, 5),), "first_order", "second_order", "ties")
enter("torch_cumsum", lambda x: x.cumsum(1), lambda r: (r(3, 5),), "first_order", "sizes", "dtypes")
enter("torch_cumprod", lambda x: x.cumprod(1), lambda r: (r(3, 5),), "extremes", "ties", "first_order")
enter("torch_norm", lambda x: x.norm(dim=1), lambda r: (r(3, 5),), "extremes", "ties", "dtypes")
enter("torch_sqrt", torch.sqrt, lambda r: (r.positive(3, 5),), "extremes", "ties")
enter("torch_log", torch.log, lambda r: (r.positive(3, 5),), "extremes", "ties", "dtypes")
enter(
    "torch_acos",
    torch.acos,
    lambda r: ((r.positive(3, 5, grad=False) - 1).requires_grad_(),),
    "extremes",
    "sizes",
)
enter(
    "torch_nuclear_norm",  # of a matrix with a row of zeros float32 takes another slope than float64
    lambda x: torch.linalg.matrix_norm(x, "nuc"),
    lambda r: (r(5, 5),),
    "extremes",
    "ties",
    "dtypes",
)
enter(
    "torch_svdvals",
    torch.linalg.svdvals,
    lambda r: (r(4, 3),),
    "first_order",
    "second_order",
    "dtypes",
    "ties",
)
enter(
    "torch_solve",
    torch.linalg.solve,
    lambda r: ((r(4, 4, grad=False) + 5 * torch.eye(4)).requires_grad_(), r(4, 2)),
    "sizes",
    "extremes",
    "input_layout",
    "dtypes",
)
enter(
    "torch_cholesky",
    lambda x: torch.linalg.cholesky(x @ x.mT + 2 * torch.eye(x.shape[-1], dtype=x.dtype)),
    lambda r: (r(3, 3),),
    "first_order",
    "sizes",
)
enter("torch_prod", lambda x: x.prod(-1), lambda r: (r(3, 4),), "ties", "extremes", "second_order")
enter("torch_logsumexp", lambda x: x.logsumexp(-1), lambda r: (r(3, 4),), "extremes", "ties", "sizes")
enter("torch_softmax", lambda x: x.softmax(-1), lambda r: (r(3, 4),), "dtypes", "extremes", "compile")
enter("torch_topk", lambda x: x.topk(2, -1), lambda r: (r(3, 5),), "ties", "sizes", "zero_size")
enter(
    "torch_where_of_two_branches", lambda x: torch.where(x > 0, x.exp(), x + 1), lambda r: (r(4, 5),), "ties"
)
enter("torch_hardswish", F.hardswish, lambda r: (3 * r(4, 5),), "ties", "second_order", "dtypes")
enter("torch_elu", F.elu, lambda r: (r(4, 5),), "ties", "extremes", "second_order", "dtypes")
enter("torch_softplus", F.softplus, lambda r: (r(4, 5),), "extremes", "dtypes")
enter("torch_huber_loss", F.huber_loss, lambda r: (r(4, 5), r(4, 5)), "ties", "same_input", "first_order")
enter(
    "torch_cross_entropy",
    F.cross_entropy,
    lambda r: (r(7, 4), r.index(4, 7)),
    "extremes",
    "sizes",
    "zero_size",
)
enter(
    "torch_ctc_like_gather",
    lambda x, i: x.log_softmax(1).gather(1, i),
    lambda r: (r(4, 5), r.index(5, 4, 2)),
    "extremes",
)
enter(
    "torch_max_pool2d",
    lambda x: F.max_pool2d(x, 2),
    lambda r: (r(2, 3, 4, 4),),
    "ties",
    "sizes",
    "input_layout",
)
enter(
    "torch_conv2d",
    F.conv2d,
    lambda r: (r(2, 3, 5, 5), r(4, 3, 3, 3)),
    "sizes",
    "dtypes",
    "autocast",
    "input_layout",
)
enter(
    "torch_interpolate",
    lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    lambda r: (r(1, 2, 3, 3),),
    "sizes",
)
enter(
    "torch_attention",
    F.scaled_dot_product_attention,
    lambda r: (r(2, 5, 4), r(2, 5, 4), r(2, 5, 4)),
    "same_input",
    "second_order",
    "forward_mode",
    "dtypes",
)
enter(
    "torch_embedding", lambda i, w: F.embedding(i, w), lambda r: (r.index(5, 7), r(5, 3)), "sizes", "dtypes"
)
enter(
    "torch_index_add",
    lambda x, v: x.index_add(0, torch.tensor([0, 2, 0]), v),
    lambda r: (r(4, 3), r(3, 3)),
    "sizes",
)
enter(
    "torch_dropout",
    lambda x: F.dropout(x, 0.5),
    lambda r: (r(6, 5),),
    "random_state",
    "repeat",
    "checkpointing",
)
enter(
    "torch_in_place_chain",
    lambda x: (x * 2).add_(1).relu_(),
    lambda r: (r(4, 5),),
    "mutation",
    "ties",
)
enter(
    "torch_fft",
    lambda x: torch.fft.rfft(x).abs().square().sum(-1),
    lambda r: (r(3, 8),),
    "dtypes",
    "sizes",
    "first_order",
)
enter(
    "torch_large_linear",
    F.linear,
    lambda r: (r(64, 128), r(96, 128)),
    "first_order",
    "second_order",
    "forward_mode",
)
enter("torch_scalar_polynomial", lambda x: x**3 - 2 * x, lambda r: (r(),), "sizes", "first_order", "vmap")
enter(
    "torch_small_slopes",
    lambda x: 1e-9 * x.sin(),
    lambda r: (r(4, 3),),
    "first_order",
    "linearity",
    "extremes",
)
enter(
    "torch_large_slopes", lambda x: 1e9 * x.sin(), lambda r: (r(4, 3),), "first_order", "linearity", "dtypes"
)
enter(
    "torch_constant_in_one_argument",
    lambda a, b: a.tanh() + 0 * b,
    lambda r: (r(4, 3), r(4, 3)),
    "first_order",
    "forward_mode",
    "second_order",
)
enter(
    "torch_linear_in_x",
    lambda x: 3 * x,
    lambda r: (r(4, 3),),
    "second_order",
    "third_order",
    "forward_over_reverse",
)

# ---------------------------------------------------------------- modules


def module(name, make, args, *tempts, **options):
    control(*tempts, args=args, name=name, **options)(Fresh(make))


module(
    "module_linear",
    lambda: nn.Linear(5, 3),
    lambda r: (r(4, 5),),
    "module_copy",
    "autocast",
    "dtypes",
    "compile",
)
module(
    "module_batch_norm",
    lambda: nn.BatchNorm1d(4),
    lambda r: (r(6, 4),),
    "mutation",
    "repeat",
    "checkpointing",
    "sizes",
)
module(
    "module_batch_norm_eval",
    lambda: nn.BatchNorm1d(4).eval(),
    lambda r: (r(6, 4),),
    "mutation",
    "second_order",
)
module("module_layer_norm", lambda: nn.LayerNorm(4), lambda r: (r(6, 4),), "dtypes", "ties", "extremes")
module(
    "module_dropout", lambda: nn.Dropout(0.5), lambda r: (r(6, 4),), "random_state", "repeat", "checkpointing"
)
module(
    "module_lstm",
    lambda: nn.LSTM(3, 4, batch_first=True),
    lambda r: (r(2, 5, 3),),
    "first_order",
    "partial_outputs",
    "module_copy",
)
module(
    "module_gru_cell",
    lambda: nn.GRUCell(3, 4),
    lambda r: (r(2, 3), r(2, 4)),
    "requires_grad_subsets",
    "first_order",
)
module(
    "module_multihead_attention",
    lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    lambda r: (x := r(2, 5, 4), x, x),
    "first_order",
    "requires_grad_subsets",
    "output_requires_grad",
)
module(
    "module_convolution",
    lambda: nn.Conv2d(3, 4, 3, padding=1),
    lambda r: (r(2, 3, 5, 5),),
    "input_layout",
    "autocast",
    "module_copy",
)
module(
    "module_embedding_bag",
    lambda: nn.EmbeddingBag(6, 3, mode="mean"),
    lambda r: (r.index(6, 4, 2),),
    "first_order",
    "sizes",
)
module(
    "module_tied_weights",
    lambda: _Tied(),
    lambda r: (r.index(6, 4, 3),),
    "module_copy",
    "first_order",
    "requires_grad_subsets",
)
module(
    "module_transformer_layer",
    lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True),
    lambda r: (r(2, 3, 4),),
    "random_state",
    "first_order",
)
module(
    "module_of_frozen_and_trained_layers",
    lambda: _frozen_first(),
    lambda r: (r(5, 4, grad=False),),
    "requires_grad_subsets",
    "output_requires_grad",
)
module(
    "module_max_pool_after_relu",
    lambda: nn.Sequential(nn.ReLU(), nn.MaxPool1d(2)),
    lambda r: (r(2, 3, 6),),
    "ties",
    "first_order",
)
module(
    "module_counts_its_calls",
    lambda: _Counting(),
    lambda r: (r(5, 4),),
    "mutation",
    "repeat",
    "checkpointing",
)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.embedding(index).tanh())


class _Counting(nn.Module):
    """A buffer that counts calls, as ``num_batches_tracked``, without use in the result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x).sigmoid()


def _frozen_first() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    return net


# ---------------------------------------------------------------- ours

enter(
    "our_gelu", ours.gelu, lambda r: (r(4, 5),), "first_order", "poisoned_backward", "forward_mode", "dtypes"
)
enter("our_relu_at_zero", ours.relu, at_kinks, "first_order", "ties", "compile")
enter(
    "our_softmax",
    lambda x: ours.softmax(x, -1),
    lambda r: (r(4, 5),),
    "extremes",
    "vmap_grad",
    "nested_forward_mode",
)
enter(
    "our_cross_entropy",
    ours.cross_entropy,
    lambda r: (r(7, 4), r.index(4, 7)),
    "zero_size",
    "extremes",
    "dtypes",
)
enter(
    "our_linear",
    ours.linear,
    lambda r: (r(5, 4), r(3, 4), r(3)),
    "requires_grad_subsets",
    "autocast",
    "poisoned_backward",
)
module(
    "our_layer_norm",
    lambda: manualprop.nn.LayerNorm(4),
    lambda r: (r(6, 4),),
    "dtypes",
    "module_copy",
    "ties",
)
module(
    "our_batch_norm", lambda: manualprop.nn.BatchNorm1d(4), lambda r: (r(6, 4),), "mutation", "checkpointing"
)
module(
    "our_embedding",
    lambda: manualprop.nn.Embedding(6, 3),
    lambda r: (r.index(6, 4, 2),),
    "sizes",
    "first_order",
)
