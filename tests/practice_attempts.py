"""Wrong attempts at the exercises, as people make them, and what the mark of each must say."""

from __future__ import annotations

import re
from typing import NamedTuple

from manualprop._practice._exercises import EXERCISES


class Attempt(NamedTuple):
    """A solved exercise with something wrong in it.

    Args:
        exercise: its name.
        edits: each "name = ..." takes the place of the line that sets this name, each "a -> b" of the text a.
        mark: a pattern of the mark.
        verdict: of the mark.
    """

    exercise: str
    edits: tuple[str, ...]
    mark: str
    verdict: str = "wrong"

    def source(self) -> str:
        code = EXERCISES[self.exercise].solved()
        for edit in self.edits:
            old, arrow, new = edit.partition(" -> ")
            if arrow:
                assert old in code, f"{self.exercise}: {old!r} is not in the solution"
                code = code.replace(old, new)
            else:
                pattern = rf"^( *){re.escape(edit.partition(' = ')[0])} = .*$"
                code, count = re.subn(pattern, lambda found, new=edit: found[1] + new, code, flags=re.M)
                assert count == 1, f"{self.exercise}: {edit!r} fits {count} lines"
        return f"import torch\n\n{code}\n"


def wrong(exercise: str, edit: str, mark: str, verdict: str = "wrong") -> Attempt:
    return Attempt(exercise, tuple(edit.split("; ")), mark, verdict)


ONLY_FIRST = "first order only"
# What goes to every number of each window, and not to one.
SPREAD = (
    "torch.zeros_like(x).flatten(2).index_add(2, torch.arange(x[0, 0].numel()).view(x.shape[2:])"
    ".unfold(0, K, s).unfold(1, K, s).flatten(), ({}).expand_as(windows).flatten(2))"
)

ATTEMPTS = [
    wrong("linear", "db = ...", "Dots", "not finished"),
    wrong("linear", "db = g.mean(0)", "mean for sum"),
    wrong("linear", "dW = x.T @ g", "shape \\[4, 3\\], where W has \\[3, 4\\].\n +How: transposed"),
    wrong("linear", "db = g", "missing sum over a broadcast dimension"),
    wrong("linear", "db = g.sum(0, keepdim=True)", "an axis of length 1 too many"),
    wrong("linear", "dx = g @ W.detach()", "first order only", ONLY_FIRST),
    wrong("linear", "dx = 2 * g @ W", "factor 2"),
    wrong("linear", "dW = g.T @ x / len(x)", "mean's divisor"),
    wrong("linear", "dx = g @ W.T", "RuntimeError: mat1 and mat2 shapes cannot be multiplied", "error"),
    wrong("linear", "dW = torch.zeros_like(W)", "zero"),
    wrong("linear", "return dx, dW, db -> return dx, dW", "must return 3 values"),
    wrong("sigmoid", "dx = g * y * (1 + y)", "factor of its own"),
    wrong("sigmoid", "dx = y * (1 - y)", "g is ignored"),
    wrong("sigmoid", "dx = g * y", "factor of its own"),
    wrong("sigmoid", "dx = -g * y * (1 - y)", "wrong sign"),
    wrong("sigmoid", "dx = g * torch.exp(-x) / (1 + torch.exp(-x)) ** 2", "very large"),
    wrong("sigmoid", "dx = g * (1 - y)", "a factor too many, or one too few"),
    wrong("sigmoid", "dx = g * x * (1 - x)", "factor of its own"),
    wrong("sigmoid", "y = torch.sigmoid(x).detach()", "first order only", ONLY_FIRST),
    wrong("tanh", "dx = g * (1 - torch.tanh(x))", "factor of its own"),
    wrong("tanh", "dx = 1 - torch.tanh(x) ** 2", "g is ignored"),
    wrong("tanh", "dx = g * (torch.tanh(x) ** 2 - 1)", "wrong sign"),
    wrong("tanh", "dx = g * (1 - torch.tanh(x.data) ** 2)", "first order only", ONLY_FIRST),
    wrong("tanh", "dx = g / torch.cosh(x)", "factor of its own"),
    wrong("tanh", "dx = g * (1 - x ** 2)", "factor of its own"),
    wrong("tanh", "dx = g * (1 - math.tanh(x) ** 2)", "NameError: name 'math' is not defined", "error"),
    wrong("tanh", "dx = torch.autograd.grad(torch.tanh(x), x, g)[0]", "autograd's, and not yours"),
    wrong("relu", "dx = g * (x >= 0)", "wrong at a kink"),
    wrong("relu", "dx = g * x", "Take this one number"),
    wrong("relu", "dx = (x > 0).to(x)", "g is ignored"),
    wrong("relu", "dx = g", "where it is negative"),
    wrong("relu", "dx = torch.relu(g)", "where it is negative"),
    wrong("relu", "dx = g\n        dx[x <= 0] = 0", "writes into what it was given"),
    wrong("relu", "dx = g * (x < 0)", "Take this one number|where it"),
    wrong("softplus", "dx = g * torch.exp(x) / (1 + torch.exp(x))", "very large"),
    wrong("softplus", "dx = g / (1 + torch.exp(x))", "factor of its own"),
    wrong("softplus", "dx = g * (x > 0)", "factor of its own|only in"),
    wrong("softplus", "dx = g / (1 + torch.exp(-x.detach()))", "first order only", ONLY_FIRST),
    wrong("softplus", "dx = g * torch.exp(x)", "factor of its own"),
    wrong("mse", "dx = g * (x - t) / x.numel()", "a factor 2 missing"),
    wrong("mse", "dx = g * 2 * (x - t)", "mean's divisor missing"),
    wrong("mse", "dx = g * 2 * (t - x) / x.numel()", "wrong sign"),
    wrong("mse", "dx = g * 2 * (x - t) / len(x)", "factor 3"),
    wrong("mse", "dx = 2 * (x - t) / x.numel()", "g is ignored"),
    wrong("mse", "dx = g * 2 * (x - t) / 15", "at no others"),
    wrong("mse", "dx = (g * 2 * (x - t) / x.numel()).mean()", "has shape"),
    wrong("softmax", "dx = g * y * (1 - y)", "the coupling between entries"),
    wrong("softmax", "dx = y * (g - (g * y).sum(0, keepdim=True))", "over the wrong axis"),
    wrong("softmax", "dx = y * (g - (g * y).sum(-1))", "RuntimeError", "error"),
    wrong("softmax", "dx = y * (g - g.sum(-1, keepdim=True))", "Derive dy_i/dx_j|a missing or extra"),
    wrong("softmax", "dx = g * y", "a missing or extra term"),
    wrong(
        "softmax",
        "dx = g - (g * y).sum(-1, keepdim=True)",
        "Derive dy_i/dx_j|a factor too many, or one too few",
    ),
    wrong("softmax", "dx = y * (g - (g * y.detach()).sum(-1, keepdim=True))", "first order only", ONLY_FIRST),
    wrong("cross_entropy", "dx = g * (p - y)", "mean's divisor missing"),
    wrong("cross_entropy", "dx = g * (y - p) / len(x)", "wrong sign"),
    wrong("cross_entropy", "dx = g * p / len(x)", "log p_t has two terms|right class"),
    wrong("cross_entropy", "dx = -g * y / len(x)", "log p_t has two terms|right class"),
    wrong("cross_entropy", "dx = (p - y) / len(x)", "g is ignored"),
    wrong("cross_entropy", "dx = -g * y / p / len(x)", "log p_t has two terms|right class"),
    wrong("cross_entropy", "dx = g * (p - y) / x.numel()", "1/4"),
    wrong("cross_entropy", "p = torch.softmax(x, dim=0)", "log p_t has two terms|right class"),
    wrong("cross_entropy", "p = torch.softmax(x.detach(), dim=-1)", "first order only", ONLY_FIRST),
    wrong("network", "db1 = da.mean(0)", "a mean over them"),
    wrong("network", "da = dh", "slope of tanh"),
    wrong("network", "dz = p - y", "factor 6"),
    wrong("network", "dz = (y - p) / len(x)", "wrong sign"),
    wrong("network", "dW2 = h.T @ dz", "The size of tensor", "error"),
    wrong("network", "da = dh * (1 - h)", "slope of tanh"),
    wrong("network", "rate *  -> ", "The rate is 1/32"),
    wrong("network", "dh = dz @ (W2 - rate * dW2)", "W2 that forward has used"),
    wrong("network", "W1 - rate * dW1, -> W1,", "zero"),
    wrong(
        "network",
        "W2 - rate * dW2, b2 - rate * db2 -> W2 - rate * dW2",
        "step must return W1, b1, W2, b2",
        "error",
    ),
    wrong("momentum", "new_W = W - rate * V", "comes through the new W, which is missing"),
    wrong("momentum", "new_V = m * V + (1 - m) * dW", "1 - m here"),
    wrong(
        "momentum", "new_W = W + rate * new_V", "comes through the new W, by a constant factor -1: wrong sign"
    ),
    wrong("momentum", "new_W = W - rate * dW", "The derivative by V is wrong"),
    wrong("momentum", "new_W = W - new_V", "by a constant factor 32"),
    wrong("momentum", "new_V = V + dW", "Is V multiplied by it"),
    wrong("momentum", "new_W = W - rate * (m * new_V + dW)", "factor 19/10"),
    wrong(
        "momentum",
        "new_V = m * V - rate * dW; new_W = W + new_V",
        "comes through the new V, by a constant factor -1/32",
    ),
    wrong("dropout", "dx = g * k", "constant factor 7/10"),
    wrong("dropout", "dx = g / ctx.q", "only in"),
    wrong("dropout", "dx = g", "this is the gradient of y = x"),
    wrong("dropout", "dx = g * (torch.rand_like(g) < ctx.q) / ctx.q", "random"),
    wrong("dropout", "dx = k / ctx.q", "g is ignored"),
    wrong("dropout", "dx = g * k / (1 - ctx.q)", "constant factor 7/3"),
    wrong("batch_norm", "dx = r * u", "x enters z in three ways"),
    wrong("batch_norm", "dx = r * (u - u.mean(0))", "x enters z in three ways"),
    wrong("batch_norm", "dx = r * (u - z * (u * z).mean(0))", "x enters z in three ways"),
    wrong(
        "batch_norm",
        "dx = r * (u - u.mean(0) - z * (u * z).sum(0) / (len(x) - 1))",
        "is each mean over as many as in forward",
    ),
    wrong("batch_norm", "dW = (g * z).mean(0)", "mean for sum"),
    wrong("batch_norm", "u = g", "x enters z in three ways|this is the right gradient for W = 1"),
    wrong("batch_norm", "db = g.sum(1)", "shape|exchanged"),
    wrong("batch_norm", "dx = r * (u - u.sum(0) - z * (u * z).sum(0))", "x enters z in three ways"),
    wrong("batch_norm", ".add(ctx.eps) -> ", "with its eps"),
    wrong("batch_norm", "z = r * (x - m).detach()", "first order only", ONLY_FIRST),
    wrong("batch_norm", "dW = (g * x).sum(0)", "g times what it was multiplied by"),
    wrong("layer_norm", "dx = r * (u - u.mean(0) - z * (u * z).mean(0))", "x enters z in three ways"),
    wrong(
        "layer_norm",
        "dx = r * W * (g - g.mean(-1, keepdim=True) - z * (g * z).mean(-1, keepdim=True))",
        "x enters z in three ways",
    ),
    wrong("layer_norm", "dx = r * (u - u.mean(-1, keepdim=True))", "x enters z in three ways"),
    wrong("layer_norm", "dW = (g * z).sum(-1)", "shape"),
    wrong("layer_norm", "dW = g * z", "missing sum over a broadcast dimension"),
    wrong("layer_norm", "dx = r * u", "x enters z in three ways"),
    wrong("layer_norm", "z = r * (x - m).detach()", "first order only", ONLY_FIRST),
    wrong("embedding", "dW = g.new_zeros(ctx.V, g.shape[1]).index_copy(0, i, g)", "only 3 of its 5 indices"),
    wrong("embedding", "dW = g", "shape"),
    wrong("embedding", "dW = g.new_zeros(ctx.V, g.shape[1]).index_add(0, i, g) / len(i)", "mean's divisor"),
    wrong(
        "embedding", "dW = g.new_zeros(ctx.V, g.shape[1]).index_add(0, i, torch.ones_like(g))", "g is ignored"
    ),
    wrong(
        "embedding",
        "dW = g.new_zeros(ctx.V, g.shape[1]).index_reduce(0, i, g, 'mean', include_self=False)",
        "row 2 was used twice",
    ),
    wrong("embedding", "return None, dW -> return dW, None", "in the order of the arguments"),
    wrong(
        "convolution",
        "dmet = torch.einsum('noqr,oc->ncqr', g, W[:, :, K - 1 - k, L - 1 - l])",
        "The gradient of x is wrong; W, b are right.(\n.*)*each by its own weight",
    ),
    wrong(
        "convolution",
        "dW[:, :, k, l] = dWkl -> dW[:, :, K - 1 - k, L - 1 - l] = dWkl",
        "reversed along dims 2, 3: its entries come from the other end",
    ),
    wrong(
        "convolution",
        "dx = dwide",
        r"of x has shape \[2, 3, 7, 8\], where x has \[2, 3, 5, 6\](.*\n)*.*the zeros around x are none",
    ),
    wrong("convolution", "dWkl = torch.einsum('oqr,cqr->oc', g[0], met[0])", "only index 0 of it is counted"),
    wrong("convolution", "dx = dwide[:, :, :I, :J]", "The gradient of x is wrong; W, b are right"),
    wrong(
        "convolution",
        "rows = slice(k, k + Q); columns = slice(l, l + R)",
        "The gradients of x, W are wrong; b is right.(.*\n)*.*is that what rows and columns say",
    ),
    wrong(
        "convolution",
        "dwide[:, :, rows, columns] += dmet -> dwide[:, :, rows, columns] = dmet",
        "only in .* of the entries of x(.*\n)*.*and they add up",
    ),
    wrong(
        "convolution",
        "dmet = torch.einsum('noqr,co->ncqr', g, W[:, :, k, l])",
        "subscript o has size 3",
        "error",
    ),
    wrong("convolution", "dWkl = torch.einsum('noqr,ncqr->co', g, met)", "RuntimeError", "error"),
    wrong(
        "convolution",
        "met = wide -> met = torch.nn.functional.pad(x, (0, 2 * p, 0, 2 * p))",
        "The gradient of W is wrong; x, b are right",
    ),
    wrong("convolution", "dWkl = torch.einsum('noqr,ncqr->oc', g, met) / len(x)", "factor 1/2"),
    wrong(
        "convolution",
        "db = g.sum(0)",
        r"of b has shape \[5, 3, 4\](.*\n)*.*How often is one number",
    ),
    wrong("convolution", "db = g.sum((2, 3))", r"of b has shape \[2, 5\]"),
    wrong("convolution", "db = g.mean((0, 2, 3))", "mean for sum(.*\n)*.*How often is one number"),
    wrong("convolution", "return dx, dW, db, -> return dW, dx, db,", "exchanged.*shape of W"),
    wrong(
        "convolution",
        "dWkl = torch.einsum('ncqr->c', met).expand(W.shape[:2])",
        "g is ignored",
    ),
    wrong(
        "convolution",
        "dmet = torch.einsum('noqr,oc->ncqr', g, W[:, :, k, l].detach())",
        "first order only",
        ONLY_FIRST,
    ),
    wrong(
        "max_pool",
        f"dx = {SPREAD.format('g[..., None] / (K * K)')}",
        "yours is 0.1111, measured 1(.*\n)*.*What do the others",
    ),
    wrong(
        "max_pool",
        f"dx = {SPREAD.format('g[..., None] * (windows == windows.amax(-1, keepdim=True))')}",
        "at a tie.(.*\n)*.*entries sum to 2(.*\n)*.*one g to give",
    ),
    wrong(
        "max_pool", "scatter_add -> scatter", "entries send nothing back(.*\n)*.*the maximum of two windows"
    ),
    wrong("max_pool", "i = m // K; j = m % K", "where do these begin"),
    wrong("max_pool", "i = q + m // K; j = r + m % K", "where do these begin"),
    wrong("max_pool", "i = s * q + m % K; j = s * r + m // K", "Of which windows is it the maximum"),
    wrong("max_pool", "place = i * x.shape[2] + j", "how wide is the image"),
    wrong("max_pool", "m = windows.argmin(-1)", "yours is 1, measured 0"),
    wrong("max_pool", "g.flatten(2)) -> torch.ones_like(g).flatten(2))", "g is ignored"),
    wrong(
        "max_pool", "g.flatten(2)) -> g.flatten(2) / (K * K))", "constant factor 1/9(.*\n)*.*how much of g"
    ),
    wrong("max_pool", "m = windows.shape[-1] - 1 - windows.flip(-1).argmax(-1)", "at a tie"),
    wrong(
        "max_pool",
        f"dx = {SPREAD.format('g[..., None] * torch.softmax(windows, -1)')}",
        "What do the others get",
    ),
    wrong("max_pool", "place = i + j * x.shape[3]", "out of bounds", "error"),
    wrong("max_pool", "g.flatten(2)) -> g.detach().flatten(2))", "first order only", ONLY_FIRST),
    wrong("tanh_output", "dx = g * (1 - y)", "Take this one number|what forward has saved|factor of its own"),
    wrong(
        "tanh_output",
        "dx = g * (1 - torch.tanh(y) ** 2)",
        "Take this one number|what forward has saved|factor of its own",
    ),
    wrong(
        "tanh_output",
        "ctx.save_for_backward(y) -> ctx.save_for_backward(x); (y,) -> (x,); y * y -> x.tanh() ** 2",
        "keeps its inputs",
    ),
    wrong(
        "tanh_output",
        "ctx.save_for_backward(y) -> ctx.save_for_backward(y, x); (y,) -> (y, x)",
        "keeps its inputs",
    ),
    wrong(
        "tanh_output",
        "ctx.save_for_backward(y) -> ctx.save_for_backward(1 - y * y); dx = g * y",
        "keeps tensors of its own",
    ),
    wrong("tanh_output", "dx = g * (1 - y.detach() ** 2)", "first order only", ONLY_FIRST),
    wrong(
        "tanh_output",
        "ctx.save_for_backward(y) -> ctx.save_for_backward(x)",
        "Take this one number|what forward has saved|factor of its own",
    ),
    wrong("gelu_mlp", "du = g @ V * Phi", "has its slope two terms"),
    wrong("gelu_mlp", "du = g @ V", "has its slope two terms"),
    wrong("gelu_mlp", "dc = g.mean(0)", "mean for sum"),
    wrong("gelu_mlp", "dV = h.T @ g", "transposed"),
    wrong("gelu_mlp", "du = (g @ V) * (Phi + phi)", "has its slope two terms"),
    wrong(
        "gelu_mlp",
        "save_for_backward(x, W, b, V) -> save_for_backward(x, W, u, V); x, W, b, V = ctx -> x, W, u, V = ctx; "
        "        u = x @ W.T + b\n        Phi ->         Phi",
        "keeps tensors",
    ),
    wrong(
        "gelu_mlp", "        h = u * Phi ->         h = (u * Phi).detach()", "first order only", ONLY_FIRST
    ),
]


def right(exercise: str, edit: str) -> Attempt:
    return wrong(exercise, edit, ": right$", "right")


# Other ways to the same gradient, as the statements alone lead to them.
RIGHT = [
    right("linear", "dx = torch.einsum('no,oi->ni', g, W); dW = torch.einsum('no,ni->oi', g, x)"),
    right(
        "linear", "dW = (g[:, :, None] * x[:, None, :]).sum(0); db = torch.ones(len(g), dtype=g.dtype) @ g"
    ),
    right("sigmoid", "dx = g * torch.sigmoid(x) * torch.sigmoid(-x)"),
    right("tanh", "dx = g * (1 + torch.tanh(x)) * (1 - torch.tanh(x))"),
    right("relu", "dx = torch.where(x > 0, g, torch.zeros_like(g))"),
    right("relu", "dx = g.masked_fill(x <= 0, 0.0)"),
    right("softplus", "dx = g * (0.5 + 0.5 * torch.tanh(x / 2))"),
    right("mse", "dx = (x - t) * (2 * g / (x.shape[0] * x.shape[1]))"),
    right("softmax", "dx = g * y - y * torch.einsum('nc,nc->n', g, y)[:, None]"),
    right("softmax", "dx = ((torch.diag_embed(y) - y[:, :, None] * y[:, None, :]) @ g[:, :, None])[:, :, 0]"),
    right("cross_entropy", "dx = g * (p - torch.eye(x.shape[1], dtype=p.dtype)[t]) / x.shape[0]"),
    right("cross_entropy", "dx = g / len(x) * p.scatter_add(1, t[:, None], -torch.ones_like(p[:, :1]))"),
    right("network", "da = dh / torch.cosh(x @ W1.T + b1) ** 2"),
    right("network", "return W1 - rate * dW1, -> W1 -= rate * dW1\n    return W1,"),
    right("momentum", "new_V = V.mul_(m).add_(dW); new_W = W.sub_(rate * V)"),
    right("dropout", "dx = torch.where(k > 0, g / ctx.q, torch.zeros_like(g))"),
    right(
        "batch_norm",
        "dx = r * u + ((-r * u).sum(0) - 2 * (x - m).mean(0) * 0) / len(x) - r**2 * z * (u * (x - m)).sum(0) / len(x)",
    ),
    right(
        "layer_norm", "dx = (r / x.shape[1]) * (x.shape[1] * u - u.sum(-1, True) - z * (u * z).sum(-1, True))"
    ),
    right("embedding", "dW = (i[None, :] == torch.arange(ctx.V)[:, None]).to(g.dtype) @ g"),
    right(
        "convolution",
        "dx = torch.nn.functional.conv_transpose2d(g, W, None, s, p, [(m + 2 * p - n) % s for m, n in zip((I, J), (K, L))])",
    ),
    right(
        "convolution", "dWkl = (g[:, :, None] * met[:, None]).sum((0, 3, 4)); db = g.flatten(2).sum(2).sum(0)"
    ),
    right("max_pool", "m = (windows >= windows.amax(-1, keepdim=True)).to(torch.int8).argmax(-1)"),
    right("max_pool", "place = torch.nn.functional.max_pool2d(x, K, s, return_indices=True)[1]"),
    right("tanh_output", "dx = g - g * y**2"),
    right("gelu_mlp", "du = (g @ V) * Phi + (g @ V) * u * phi"),
]
