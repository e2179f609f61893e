r"""Hand-derived rules of the normalisation layers.

Symbols
    x   input                         g        dL/dy, the gradient that arrives
    m   mean                          gm, gr   dL/dm and dL/dr: None, unless a second derivative is taken
    r   1 / sqrt(variance + eps)      u        g W = dL/dz
    z   r (x - m), normalised         W, b     weight and bias, each may be None
    mean(.) and sum(.) without an index run over what m is the mean of
Shape legend
    N   batch: any number of leading axes            D   the last ``axes`` axes, flattened
    C   channels           L   all further axes, flattened
    G   groups             K   channels in a group, C / G
Statistics
    A rule returns the statistics it needed beside its output, with *their* derivatives too.  What backward finds
    saved is therefore no constant: derivatives of every order pass through m and r as they should, and nothing
    is computed twice.  In half precision the statistics are float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from manualprop.functions._kernels import rows_of_a_block
from manualprop.functions._rule import (
    HALF,
    Rule,
    flat,
    in_full_precision,
    plain_eager,
    times,
    transforms_active,
)
from manualprop.functions.linear import FEW


class LayerNorm(Rule):
    r"""$y = W z + b$ with $z = r (x - m)$, mean $m$ and $r = (\tfrac1D \sum_d (x_d - m)^2 + \epsilon)^{-1/2}$

    Derivation, for one of the N rows
        dm/dx_i   = 1 / D
        dr/dx_i   = -1/2 r^3 (2 / D) (x_i - m) = -r^2 z_i / D      chain rule; sum_d (x_d - m) = 0
        dz_d/dx_i = r (1[d = i] - 1 / D) + (x_d - m) dr/dx_i       product rule
                  = r (1[d = i] - 1 / D - z_d z_i / D)             since x_d - m = z_d / r
        dL/dx_i   = sum_d u_d dz_d/dx_i + gm dm/dx_i + gr dr/dx_i  chain rule, u = g W
                  = r (u_i - c1 - z_i c2) + gm / D - gr r^2 z_i / D
                  = r (u_i - c1 - c_i k) + ...                     with z = r c, c = x - m
        c1 = sum_d u_d / D,  c2 = sum_d u_d z_d / D,  k = r c2 = r^2 sum_d u_d c_d / D
        dL/dW_d = sum_n g_nd z_nd = sum_n r_n g_nd c_nd            y is linear in W and b
        dL/db_d = sum_n g_nd
        dm = mean(dx),  dr = -r^2 mean(z dx)                       forward mode
        dz = r (dx - dm - z mean(z dx)),  dy = W dz + z dW + db
    Second order
        m and r are outputs with derivatives of their own: autograd differentiates the formulas as written, to
        every order.  (torch states its second derivative by hand, and its third is silently wrong.)
    Shape
        x (N, D), W and b (D,) -> y (N, D), m and r (N, 1)
    Memory
        x, m and r, as torch.  From the output instead of x it would fail where W = 0.
    Accuracy
        ATen takes the mean first and the variance about it.  x - m is exact where m is large against x - m.
    Reference
        Ba, Kiros, Hinton, 2016, https://arxiv.org/abs/1607.06450
    """

    @staticmethod
    def forward(
        x: Tensor, W: Tensor | None, b: Tensor | None, axes: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = x.shape[-axes:]
        if x.dtype not in HALF:
            return torch.native_layer_norm(x, shape, W, b, eps)
        if torch.compiler.is_compiling():  # inductor's returns the mean in half precision
            m, r = statistics(x, range(-axes, 0), eps)
            return affine((x.float() - m) * r, W, b).to(x.dtype), m, r
        return torch.native_layer_norm(x, shape, *lifted(x, shape, W, b), eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, W, b, axes, _ = inputs
        ctx.shape, ctx.b_dtype = x.shape[-axes:], None if b is None else b.dtype
        ctx.D = ctx.shape.numel()
        ctx.save_for_backward(x, W, *output[1:])
        ctx.save_for_forward(x, W, *output[1:])

    @staticmethod
    def backward(
        ctx: Any, g: Tensor | None, gm: Tensor | None, gr: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        needs, (x, W, m, r) = ctx.needs_input_grad[:3], ctx.saved_tensors
        rows = LayerNorm._rows(x, m, r, W, ctx.D)
        dx, dW, db = row_gradients(LayerNorm.gradients, g, gm, gr, *rows, needs)
        dx = None if dx is None else dx.to(x.dtype).view(x.shape)
        dW = None if dW is None else dW.to(W.dtype).view(ctx.shape)
        db = None if db is None else db.to(ctx.b_dtype).view(ctx.shape)
        return dx, dW, db, None, None

    @staticmethod
    def gradients(
        g: Tensor,
        x: Tensor,
        m: Tensor,
        r: Tensor,
        w: Tensor | None,
        needs: Sequence[bool],
        out: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """dL/dx of rows (N, D), into ``out`` if given, and their parts of dL/dW and dL/db, but for gm and gr."""
        c, D = x - m, x.shape[1]
        gc = g * c
        dx = dW = db = None
        needs_x, needs_W, needs_b = needs
        if needs_x:
            minus_c1, k = weighted_sum(g, w) / -D, weighted_sum(gc, w) * (r * r / D)  # (N, D) (D,) -> (N, 1)
            if torch.is_grad_enabled() or not plain_eager() or is_legacy_batchedtensor(g):
                dx = r * ((g if w is None else g * w) + minus_c1 - c * k)
            else:
                # Not addcmul(-c1, g, w): of a row of one element, the rounding of the product would be left.
                dx = torch.add(g, minus_c1, out=out) if w is None else torch.mul(g, w, out=out).add_(minus_c1)
                dx = dx.addcmul_(c, k, value=-1).mul_(r)
        if needs_W:
            dW = column_sum(gc, r)  # (N, D) (N, 1) -> (D,)
        if needs_b:
            db = g.sum(0)
        return dx, dW, db

    @staticmethod
    def jvp(
        ctx: Any, dx: Tensor | None, dW: Tensor | None, db: Tensor | None, *_: None
    ) -> tuple[Tensor, ...]:
        x, W, m, r = ctx.saved_tensors
        rows, m_rows, r, w = LayerNorm._rows(x, m, r, W, ctx.D)
        z = (in_full_precision(rows) - m_rows) * r
        dW, db = (None if t is None else in_full_precision(t).reshape(-1) for t in (dW, db))
        dz, dm, dr = tangents(like(z, dx), z, r, (1,))
        dy = like(z, affine_tangent(z, None if dx is None else dz, w, dW, db))
        return dy.to(x.dtype).view(x.shape), dm.view(m.shape), dr.view(m.shape)

    @staticmethod
    def _rows(
        x: Tensor, m: Tensor, r: Tensor, W: Tensor | None, D: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x (N, D), m and r (N, 1), and W (D,) in full precision."""
        w = None if W is None else in_full_precision(W).reshape(-1)
        return x.reshape(r.numel(), D), m.reshape(-1, 1), r.reshape(-1, 1), w


class RMSNorm(Rule):
    r"""$y = W z$ with $z = r x$ and $r = (\tfrac1D \sum_d x_d^2 + \epsilon)^{-1/2}$

    Derivation, for one of the N rows: :class:`LayerNorm` without the mean
        dr/dx_i   = -1/2 r^3 (2 / D) x_i = -r^2 z_i / D            chain rule
        dz_d/dx_i = r 1[d = i] + x_d dr/dx_i                       product rule
                  = r (1[d = i] - z_d z_i / D)
        dL/dx_i   = sum_d u_d dz_d/dx_i + gr dr/dx_i               chain rule, u = g W
                  = r (u_i - z_i c2) - gr r^2 z_i / D
        c2 = sum_d u_d z_d / D
        dL/dW_d = sum_n g_nd z_nd                                  y is linear in W
        dr = -r^2 mean(z dx)                                       forward mode
        dz = r (dx - z mean(z dx)),  dy = W dz + z dW
    Second order
        As :class:`LayerNorm`: r is an output with a derivative of its own.
    Shape
        x (N, D), W (D,) -> y (N, D), r (N, 1)
    Memory
        x and r: 4 bytes per element in float32, 2 in half precision.  torch keeps 8 on the CPU.
    Accuracy
        In half precision everything up to the last product is float32.
    Reference
        Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467
    """

    @staticmethod
    def forward(x: Tensor, W: Tensor | None, axes: int, eps: float) -> tuple[Tensor, Tensor]:
        full_x = in_full_precision(x)
        mean_square = full_x.square().mean(tuple(range(-axes, 0)), keepdim=True)
        r = (mean_square + eps).rsqrt()
        z = full_x * r
        y = z if W is None else times(z, in_full_precision(W))
        return y.to(x.dtype), r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, W, axes, _ = inputs
        ctx.shape = x.shape[-axes:]
        ctx.D = ctx.shape.numel()
        ctx.save_for_backward(x, W, output[1])
        ctx.save_for_forward(x, W, output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, gr: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_x, needs_W, *_ = ctx.needs_input_grad
        x, W, r = ctx.saved_tensors
        z, w, r = RMSNorm._rows(x, W, r, ctx.D)
        g = like(z, g)
        gz = g * z  # (N, D)
        dx = dW = None
        if needs_x:
            sum_uz = weighted_sum(gz, w)  # (N, D) (D,) -> (N, 1)
            rest = through_statistics(None, gr, z, r, ctx.D)
            dx = times(input_slope(g, w, z, sum_uz / ctx.D), r)
            dx = plus(dx, rest).to(x.dtype).view(x.shape)
        if needs_W:
            dW = gz.sum(0).to(W.dtype).view(ctx.shape)  # (N, D) -> (D,)
        return dx, dW, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dW: Tensor | None, *_: None) -> tuple[Tensor, Tensor]:
        x, W, saved_r = ctx.saved_tensors
        z, w, r = RMSNorm._rows(x, W, saved_r, ctx.D)
        full_dx = like(z, dx)
        dW = None if dW is None else in_full_precision(dW).reshape(-1)
        mean_zdx = (z * full_dx).mean(1, keepdim=True)
        dz = None if dx is None else r * (full_dx - z * mean_zdx)
        dy = like(z, affine_tangent(z, dz, w, dW, None))
        return dy.to(x.dtype).view(x.shape), (-r * r * mean_zdx).view(saved_r.shape)

    @staticmethod
    def _rows(x: Tensor, W: Tensor | None, r: Tensor, D: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """z (N, D), W (D,) and r (N, 1), in full precision."""
        z = in_full_precision(x).reshape(r.numel(), D) * r.reshape(-1, 1)
        return z, None if W is None else in_full_precision(W).reshape(-1), r.reshape(-1, 1)


class GroupNorm(Rule):
    r"""$y_c = W_c z_c + b_c$, where $z$ is normalised as in :class:`LayerNorm` over the channels of a group

    Derivation, for one example and one group, with n = K L elements
        dL/dx_i = r (u_i - c1 - c_i k) + gm / n - gr r^2 z_i / n   as :class:`LayerNorm`, u = g W, z = r c, c = x - m
                = r W g_i - r c1 - c_i r k + ...
        c1 = sum u / n,  k = r sum u z / n
        sum u   = sum_c W_c sum_l g_cl                             W is constant within a channel: only the sums
        sum u z = sum_c W_c sum_l g_cl z_cl                        of a channel are weighted
        dL/dW_c = sum_nl g_ncl z_ncl,  dL/db_c = sum_nl g_ncl      the same sums, over the batch
        dz, dm, dr as :class:`LayerNorm`,  dy = W dz + z dW + db   forward mode
    Second order
        As :class:`LayerNorm`: m and r are outputs with derivatives of their own.
    Shape
        x (N, C, L), W and b (C,) -> y (N, C, L), m and r (N, G);  inside, x is (N, G, K, L)
    Memory
        x, m and r, as torch.
    Accuracy
        As :class:`LayerNorm`.
    Reference
        Wu and He, 2018, https://arxiv.org/abs/1803.08494
    """

    @staticmethod
    def forward(
        x: Tensor, W: Tensor | None, b: Tensor | None, G: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        N, C, L = x.shape[0], x.shape[1], x.shape[2:].numel()
        if x.dtype in HALF and torch.compiler.is_compiling():
            # inductor's group norm returns the mean in half precision
            m, r = (s.reshape(N, G) for s in statistics(x.reshape(N, G, C // G * L), (2,), eps))
            groups, mean, root, w = GroupNorm._groups(x, m, r, W)
            y = affine((groups.float() - mean) * root, w, None if b is None else b.view(G, -1, 1))
            return y.to(x.dtype).view(x.shape), m, r
        W, b = lifted(x, (C,), W, b)
        W, b = (None if t is None else t.contiguous() for t in (W, b))
        y, m, r = torch.native_group_norm(dense(x), W, b, N, C, L, G, eps)
        if m.dtype in HALF:
            m, r = statistics(x.reshape(N, G, C // G * L), (2,), eps)
        return y, m.reshape(N, G), r.reshape(N, G)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, W, b, ctx.G, _ = inputs
        ctx.b_dtype = None if b is None else b.dtype
        ctx.save_for_backward(x, W, *output[1:])
        ctx.save_for_forward(x, W, *output[1:])

    @staticmethod
    def backward(
        ctx: Any, g: Tensor | None, gm: Tensor | None, gr: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        needs, (x, W, m, r) = ctx.needs_input_grad[:3], ctx.saved_tensors
        groups = GroupNorm._groups(x, m, r, W)
        dx, dW, db = row_gradients(GroupNorm.gradients, g, gm, gr, *groups, needs)
        dx = None if dx is None else dx.to(x.dtype).view(x.shape)
        dW = None if dW is None else dW.to(W.dtype).view(-1)
        db = None if db is None else db.to(ctx.b_dtype).view(-1)
        return dx, dW, db, None, None

    @staticmethod
    def gradients(
        g: Tensor,
        x: Tensor,
        m: Tensor,
        r: Tensor,
        w: Tensor | None,
        needs: Sequence[bool],
        out: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """dL/dx of groups (N, G, K, L), into ``out`` if given, and their parts of dL/dW and dL/db, but for gm and gr."""
        c, n = x - m, x.shape[2:].numel()
        sum_g = g.sum(3, keepdim=True)  # (N, G, K, L) -> (N, G, K, 1)
        if (
            torch.compiler.is_compiling() or not x.numel()
        ):  # to a compiler, a factor within the sum costs nothing
            sum_gz = (g * (c * r)).sum(3, keepdim=True)
        else:
            sum_gz = (g * c).sum(3, keepdim=True) * r
        dx = dW = db = None
        needs_x, needs_W, needs_b = needs
        if needs_x:
            # Used twice: a compiler makes it once, not anew for every element.
            sums = torch.stack((sum_g, sum_gz))
            rc = (sums if w is None else sums * w).sum(3, keepdim=True) * (r / n)  # (2, N, G, 1, 1)
            rc1, rk, rw = rc[0], rc[1] * r, r if w is None else r * w
            if torch.is_grad_enabled() or not plain_eager() or is_legacy_batchedtensor(g):
                dx = g * rw - c * rk - rc1
            else:
                dx = torch.mul(g, rw, out=out).addcmul_(c, rk, value=-1).sub_(rc1)
        if needs_W:
            dW = sum_gz.sum(0)  # (N, G, K, 1) -> (G, K, 1)
        if needs_b:
            db = sum_g.sum(0)
        return dx, dW, db

    @staticmethod
    def jvp(
        ctx: Any, dx: Tensor | None, dW: Tensor | None, db: Tensor | None, *_: None
    ) -> tuple[Tensor, ...]:
        x, W, m, r = ctx.saved_tensors
        groups, mean, r, w = GroupNorm._groups(x, m, r, W)
        z = (in_full_precision(groups) - mean) * r
        dW, db = (None if t is None else in_full_precision(t).view(ctx.G, -1, 1) for t in (dW, db))
        dz, dm, dr = tangents(like(z, dx), z, r, (2, 3))
        dy = like(z, affine_tangent(z, None if dx is None else dz, w, dW, db))
        return dy.to(x.dtype).view(x.shape), dm.view(m.shape), dr.view(m.shape)

    @staticmethod
    def _groups(
        x: Tensor, m: Tensor, r: Tensor, W: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x (N, G, K, L), m and r (N, G, 1, 1), and W (G, K, 1) in full precision."""
        N, G = m.shape
        groups = x.reshape(N, G, x.shape[1] // G, x.shape[2:].numel())
        w = None if W is None else in_full_precision(W).view(G, -1, 1)
        return groups, m[..., None, None], r[..., None, None], w


class BatchNorm(Rule):
    r"""$y_c = W_c z_c + b_c$, where $z$ is normalised as in :class:`LayerNorm` over the batch: training

    Derivation, for one channel, with n = N L elements
        dL/dx_i = r (u_i - sum u / n - z_i sum u z / n) + ...      as :class:`LayerNorm`, u = g W
                = W r (g_i - c1 - z_i c2)                          W is constant within a channel
                  + gm / n - gr r^2 z_i / n
        c1 = sum g / n,  c2 = sum g z / n
        dL/dW = sum g z,  dL/db = sum g                            the same sums
        dz, dm, dr as :class:`LayerNorm`,  dy = W dz + z dW + db   forward mode
    Second order
        As :class:`LayerNorm`: m and r are outputs with derivatives of their own.
    Running statistics
        Brought up to date by ATen, in place and as in torch: running <- (1 - momentum) running + momentum batch,
        with the unbiased variance.  They take no part in y, so no gradient passes through them.
    Shape
        x (N, C, L), all else (C,) -> y (N, C, L), m and r (C,)
    Memory
        x, m and r, as torch.
    Accuracy
        As :class:`LayerNorm`.
    Reference
        Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167
    """

    @staticmethod
    def forward(
        x: Tensor,
        W: Tensor | None,
        b: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        fast = torch.backends.cudnn.enabled
        running = (running_mean, running_var)
        y, m, r, *_ = torch._batch_norm_impl_index(x, W, b, *running, True, momentum, eps, fast)
        if x.numel() == 0:
            m, r = statistics(x, all_but_channels(x), eps)
        elif m.dtype in HALF:
            m, r = BatchNorm._statistics(x, eps)
        return y, m.reshape(-1), r.reshape(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, W, b, *_ = inputs
        ctx.b_dtype = None if b is None else b.dtype
        ctx.save_for_backward(x, W, *output[1:])
        ctx.save_for_forward(x, W, *output[1:])

    @staticmethod
    def backward(
        ctx: Any, g: Tensor | None, gm: Tensor | None, gr: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        needs_x, needs_W, needs_b, *_ = ctx.needs_input_grad
        x, W, m, r = ctx.saved_tensors
        dims, (z, w, r) = all_but_channels(x), BatchNorm._channels(x, W, m, r)
        g = like(z, g)
        sum_g, sum_gz = g.sum(dims, keepdim=True), (g * z).sum(dims, keepdim=True)  # (N, C, L) -> (1, C, 1)
        dx = dW = db = None
        if needs_x:
            n = x.shape[0] * x.shape[2:].numel() or 1
            slope = r if w is None else r * w
            rest = through_statistics(gm, gr, z, r, n)
            dx = times(minus(input_slope(g, None, z, sum_gz / n), sum_g / n), slope)
            dx = plus(dx, rest).to(x.dtype).view(x.shape)
        if needs_W:
            dW = sum_gz.view(-1).to(W.dtype)
        if needs_b:
            db = sum_g.view(-1).to(ctx.b_dtype)
        return dx, dW, db, None, None, None, None

    @staticmethod
    def jvp(
        ctx: Any, dx: Tensor | None, dW: Tensor | None, db: Tensor | None, *_: None
    ) -> tuple[Tensor, ...]:
        x, W, m, r = ctx.saved_tensors
        z, w, r = BatchNorm._channels(x, W, m, r)
        dW, db = (None if t is None else per_channel(in_full_precision(t), x) for t in (dW, db))
        dz, dm, dr = tangents(like(z, dx), z, r, all_but_channels(x))
        dy = like(z, affine_tangent(z, None if dx is None else dz, w, dW, db))
        return dy.to(x.dtype).view(x.shape), dm.view(-1), dr.view(-1)

    @staticmethod
    def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """m and r of x in half precision, in full precision."""
        if not plain_eager() or not x.is_cpu or is_legacy_batchedtensor(x):
            return statistics(x, all_but_channels(x), eps)
        # Running statistics, whose dtype the others get.
        unused = x.new_zeros(x.shape[1], dtype=torch.float32)
        m, variance = torch.batch_norm_update_stats(x, unused, unused, 0.0)
        return m, inverse_root(variance, eps)

    @staticmethod
    def _channels(x: Tensor, W: Tensor | None, m: Tensor, r: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """z (N, C, L), W and r (1, C, 1), in full precision."""
        m, r = per_channel(m, x), per_channel(r, x)
        z = times(in_full_precision(x) - m, r)
        return z, None if W is None else per_channel(in_full_precision(W), x), r


class BatchNormEvaluation(Rule):
    r"""$y_c = W_c r_c (x_c - m_c) + b_c$ with constant $m$ and $r = (v + \epsilon)^{-1/2}$: evaluation

    Derivation, for one channel
        dL/dx_i = g_i W r                                          y is affine in x
        dL/dW   = sum g_i r (x_i - m)                              and in W and b
        dL/db   = sum g_i
        dy = W r dx + r (x - m) dW + db                            forward mode
    Second order
        dx, dW and db are products and sums of g, x and W: autograd differentiates those as written.
    Shape
        x (N, C, L), all else (C,) -> y (N, C, L)
    Memory
        x if W needs a gradient, else y, which the next layer keeps anyway; and tensors of C elements.
    Accuracy
        As that of x - m.
    """

    @staticmethod
    def forward(
        x: Tensor, W: Tensor | None, b: Tensor | None, m: Tensor | None, v: Tensor | None, eps: float
    ) -> Tensor:
        return torch.batch_norm(x, W, b, m, v, False, 0.0, eps, torch.backends.cudnn.enabled)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, W, b, m, v, ctx.eps = inputs
        ctx.b_dtype = None if b is None else b.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else output, W, m, v)
        ctx.save_for_forward(x, W, m, v)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_W, needs_b, *_ = ctx.needs_input_grad
        x, W, m, v = ctx.saved_tensors
        r, full_g, dims = inverse_root(v, ctx.eps), in_full_precision(g), all_but_channels(g)
        dx = dW = db = None
        if needs_x:
            slope = r if W is None else r * in_full_precision(W)
            dx = flat((full_g * per_channel(slope, g)).to(g.dtype), x)
        if needs_W:
            centred = in_full_precision(x) - per_channel(in_full_precision(m), x)
            dW = (r * times(centred, full_g).sum(dims)).to(W.dtype)  # (C,) (N, C, L) -> (C,)
        if needs_b:
            db = full_g.sum(dims).to(ctx.b_dtype)
        return dx, dW, db, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dW: Tensor | None, db: Tensor | None, *_: None) -> Tensor:
        x, W, m, v = ctx.saved_tensors
        r = per_channel(inverse_root(v, ctx.eps), x)
        z = (in_full_precision(x) - per_channel(in_full_precision(m), x)) * r
        W, dW, db = (None if t is None else per_channel(in_full_precision(t), x) for t in (W, dW, db))
        dz = None if dx is None else like(z, dx) * r
        return like(z, affine_tangent(z, dz, W, dW, db)).to(x.dtype)


# ----- what the rules share -----


def row_gradients(
    gradients: Callable[..., tuple[Tensor | None, ...]],
    g: Tensor | None,
    gm: Tensor | None,
    gr: Tensor | None,
    x: Tensor,
    m: Tensor,
    r: Tensor,
    w: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """dL/dx, dL/dW and dL/db of the rows x, each with its mean m and its r; ``gradients`` leaves out gm and gr.

    Some rows at a time, if there are many: what it makes on its way stays in the cache.
    """
    g = torch.zeros_like(x) if g is None else g.reshape(x.shape)
    count = rows_of_a_block(g, x)
    if torch.is_grad_enabled() or count == x.shape[0]:
        dx, dW, db = gradients(in_full_precision(g), in_full_precision(x), m, r, w, needs)
    else:
        made, parts = torch.empty_like(x), []
        for some_g, some_x, *some, out in zip(*(t.split(count) for t in (g, x, m, r, made)), strict=True):
            full = in_full_precision(some_g), in_full_precision(some_x)
            some_dx, *part = gradients(*full, *some, w, needs, None if x.dtype in HALF else out)
            parts.append(part)
            if some_dx is not None and some_dx is not out:
                out.copy_(some_dx)
        dx = made if needs[0] else None
        dW, db = (None if part[0] is None else torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    if dx is not None and (gm is not None or gr is not None):
        n = x.shape[1:].numel() // m.shape[1:].numel()  # elements of a mean
        dx = plus(dx, through_statistics(gm, gr, r * (in_full_precision(x) - m), r, n))
    return dx, dW, db


def input_slope(g: Tensor, W: Tensor | None, z: Tensor, c2: Tensor) -> Tensor:
    """g W - z c2, a fresh tensor.  This is the last use of ``z``: unless it is recorded, it is overwritten."""
    zc2 = z * c2 if torch.is_grad_enabled() else times(z, c2)
    return g - zc2 if W is None else minus(g * W, zc2)


def through_statistics(gm: Tensor | None, gr: Tensor | None, z: Tensor, r: Tensor, n: int) -> Tensor | None:
    """gm dm/dx + gr dr/dx: what reaches the input by way of the statistics, in second derivatives only."""
    by_mean = None if gm is None else gm.reshape(r.shape) / n
    by_root = None if gr is None else z * (r * r * gr.reshape(r.shape) / -n)
    return by_mean if by_root is None else plus(by_root, by_mean)


def plus(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a + b


def tangents(dx: Tensor, z: Tensor, r: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """dz, dm and dr, where m is the mean over ``dims``."""
    dm, mean_zdx = dx.mean(dims, keepdim=True), (z * dx).mean(dims, keepdim=True)
    return r * (dx - dm - z * mean_zdx), dm, -r * r * mean_zdx


def affine_tangent(
    z: Tensor, dz: Tensor | None, W: Tensor | None, dW: Tensor | None, db: Tensor | None
) -> Tensor | None:
    """dy = W dz + z dW + db, shaped as z; None without any of them."""
    terms = (
        dz if dz is None or W is None else W * dz,
        None if dW is None else z * dW,
        None if db is None else db.expand_as(z).clone(),
    )
    there = [term for term in terms if term is not None]
    return sum(there[1:], there[0]) if there else None


def affine(z: Tensor, W: Tensor | None, b: Tensor | None) -> Tensor:
    """W z + b."""
    y = z if W is None else z * W
    return y if b is None else y + b


def minus(fresh: Tensor, other: Tensor) -> Tensor:
    """``fresh - other``, written into ``fresh`` unless ``vmap`` may have batched ``other`` alone."""
    if plain_eager() and not is_legacy_batchedtensor(other):
        return fresh.sub_(other)
    return fresh - other


def weighted_sum(rows: Tensor, W: Tensor | None) -> Tensor:
    """sum_d W_d rows_nd, as a column."""
    if W is None:
        return rows.sum(1, keepdim=True)
    if torch.compiler.is_compiling():  # a compiler fuses sums with what is around them, but no products
        return (rows * W).sum(1, keepdim=True)
    return rows.matmul(W.unsqueeze(1))  # (N, D) (D, 1) -> (N, 1)


def column_sum(rows: Tensor, r: Tensor) -> Tensor:
    """sum_n r_n rows_nd of rows (N, D) and a column r."""
    if rows.shape[0] > FEW or not plain_eager() or torch.is_grad_enabled() or is_legacy_batchedtensor(rows):
        return (rows * r).sum(0)
    return rows.t().mv(r.squeeze(1))  # (D, N) (N,) -> (D,)


def like(z: Tensor, t: Tensor | None) -> Tensor:
    """``t`` in the shape and precision of ``z``; absent, it is 0."""
    return torch.zeros_like(z) if t is None else in_full_precision(t).reshape(z.shape)


def all_but_channels(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def per_channel(s: Tensor, x: Tensor) -> Tensor:
    """``s`` (C,) so that it broadcasts over ``x`` (N, C, ...)."""
    return s.view(1, -1, *(1,) * (x.dim() - 2))


def statistics(x: Tensor, dims: Sequence[int], eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) over ``dims``, in full precision."""
    if x.numel() == 0:  # NaN where it is a mean of nothing, for which var_mean warns
        mean = in_full_precision(x).mean(tuple(dims), keepdim=True)
        return mean, mean
    variance, mean = torch.var_mean(in_full_precision(x), tuple(dims), correction=0, keepdim=True)
    return mean, inverse_root(variance, eps)


def lifted(
    x: Tensor, shape: Sequence[int], W: Tensor | None, b: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """W, of that shape, and b for ATen: in full precision if x is in half on the CPU, since m and r then are so, too.

    Its arithmetic is in full precision in any case.
    """
    if x.dtype not in HALF or not x.is_cpu:
        return W, b
    W = torch.ones(shape) if W is None else in_full_precision(W)
    return W, None if b is None else in_full_precision(b)


def inverse_root(variance: Tensor, eps: float) -> Tensor:
    return (in_full_precision(variance) + eps).rsqrt()


def dense(x: Tensor) -> Tensor:
    """``x`` without gaps, its channels last if they are: ATen's group norm takes no other layouts."""
    if x.dim() == 4 and not transforms_active() and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()
