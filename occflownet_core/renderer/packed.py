# SPDX-License-Identifier: Apache-2.0
"""Sums along rays whose stretches are packed ray after ray: the rendering integral in closed form, and bags of logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SERIES_BELOW = 1e-3


def transmittance_before(optical_depth: Tensor, ray: Tensor, rays: int) -> Tensor:
    """Chance [M] of reaching each stretch, of optical depths [M] packed by ray [M], ascending in 0 .. rays - 1."""
    if len(ray) == 0:
        return optical_depth
    before = optical_depth.cumsum(0, dtype=torch.float64) - optical_depth
    count = torch.bincount(ray, minlength=rays)
    first = (count.cumsum(0) - count).clamp(max=len(ray) - 1)
    return torch.exp(before[first][ray] - before).to(optical_depth.dtype)


class _Integrate(torch.autograd.Function):
    """Weights, expected range and what passes through, of packed optical depths; see ``integrate``."""

    @staticmethod
    def forward(ctx, optical_depth, start_m, length_m, ray, first, last, has_any):
        dtype = optical_depth.dtype
        total = optical_depth.cumsum(0, dtype=torch.float64)  # over all rays; differences are per ray
        base = torch.where(has_any, total[first] - optical_depth[first], 0.0)  # [R]
        passed = torch.where(has_any, torch.exp(base - total[last]), 1.0).to(dtype)  # [R]
        before = total.sub_(optical_depth).sub_(base.index_select(0, ray))
        reach = before.to(dtype).neg_().exp_()  # [M] T_i
        opaque = torch.expm1(-optical_depth).neg_()  # [M] alpha_i
        weight = reach * opaque
        inside = _mean_free_share(optical_depth, opaque).add_(opaque).sub_(1)  # phi - exp(-tau)
        ended = inside.mul_(length_m).mul_(reach).addcmul_(weight, start_m)
        range_m = passed.new_zeros(len(passed)).index_add_(0, ray, ended)
        ctx.save_for_backward(optical_depth, start_m, length_m, ray, last, has_any, reach, passed)
        return weight, range_m, passed

    @staticmethod
    def backward(ctx, grad_weight, grad_range, grad_passed):
        optical_depth, start_m, length_m, ray, last, has_any, reach, passed = ctx.saved_tensors
        opaque = torch.expm1(-optical_depth).neg_()
        through = 1 - opaque
        share = _mean_free_share(optical_depth, opaque)
        by_length = grad_range.index_select(0, ray)
        by_weight = torch.addcmul(grad_weight, by_length, start_m)
        by_length.mul_(length_m)
        # How the crossing's own part of the loss grows with its own optical depth ...
        slope = _mean_free_slope(optical_depth, through, share).add_(through).mul_(by_length)
        slope.addcmul_(by_weight, through).mul_(reach)
        # ... and that part itself, which shrinks, as all later ones do, with the chance of reaching it.
        own = share.sub_(through).mul_(by_length).addcmul_(by_weight, opaque).mul_(reach)
        total = own.cumsum(0, dtype=torch.float64)
        lost = torch.where(has_any, total[last], 0.0) + grad_passed * passed  # [R]
        behind = total.sub_(lost.index_select(0, ray))  # minus the sum over later crossings of the same ray
        return slope.add_(behind), *([None] * 6)


def _mean_free_share(optical_depth: Tensor, opaque: Tensor) -> Tensor:
    """phi = (1 - exp(-tau)) / tau: the share of a stretch that is passed on average before ending; 1 at tau = 0."""
    return torch.where(
        optical_depth < _SERIES_BELOW, 1 - optical_depth * (0.5 - optical_depth / 6), opaque / optical_depth
    )


def _mean_free_slope(optical_depth: Tensor, through: Tensor, share: Tensor) -> Tensor:
    """d phi / d tau = (exp(-tau) - phi) / tau; -1/2 at tau = 0."""
    series = optical_depth * (1 / 3 - optical_depth / 8) - 0.5
    return torch.where(optical_depth < _SERIES_BELOW, series, (through - share) / optical_depth)


def integrate(
    optical_depth: Tensor, start_m: Tensor, length_m: Tensor, ray: Tensor, rays: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The rendering integral over stretches of constant density, in closed form.

    With optical depth tau_i = s_i d_i and T_i = exp(-sum_{j<i} tau_j): w_i = T_i (1 - exp(-tau_i)), and the ray ends
    within stretch i at a mean distance of d_i (phi(tau_i) - exp(-tau_i)) / (1 - exp(-tau_i)) from its start, where
    phi(tau) = (1 - exp(-tau)) / tau: the middle of a thin stretch, the face of a solid one.

    Args:
        optical_depth: [M], differentiable (first order).
        start_m, length_m: [M].
        ray: [M] int32, ascending, in 0 .. rays - 1.

    Returns:
        weight [M], range_m [R] = sum over stretches of w_i times where the ray ends there, passed [R] = 1 - sum w.
    """
    if len(ray) == 0:
        # Keeps the graph: no crossing, no gradient, but a loss can still be walked back.
        zero = optical_depth.sum() + start_m.new_zeros(rays)
        return optical_depth, zero, zero + 1
    count = torch.bincount(ray, minlength=rays)
    last = count.cumsum(0) - 1
    first = (last + 1 - count).clamp(max=len(ray) - 1)
    return _Integrate.apply(optical_depth, start_m, length_m, ray, first, last.clamp(min=0), count > 0)


class _BagLogits(torch.autograd.Function):
    """Sum per ray of weighted rows; see ``bag_logits``."""

    @staticmethod
    def forward(ctx, weight, table, cell, ray, offsets, min_weight):
        ctx.save_for_backward(weight, table, cell, ray, offsets)
        ctx.min_weight = min_weight
        # Detached: for tensors that want a gradient torch takes a slower kernel, which notes what its own backward needs.
        return F.embedding_bag(cell, table.detach(), offsets, mode="sum", per_sample_weights=weight.detach())

    @staticmethod
    def backward(ctx, grad):
        weight, table, cell, ray, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        grad_weight = grad_table = None
        if ctx.needs_input_grad[0]:
            # <grad of the ray, logits of the cell> per crossing, without a list of M x K.
            mode_sum = 0
            grad_weight = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                grad, table, cell, offsets, ray, mode_sum
            )
        if ctx.needs_input_grad[1]:
            heavy = (weight > ctx.min_weight).nonzero()[:, 0]
            chosen = (column.index_select(0, heavy) for column in (weight, cell, ray))
            grad_table = _scatter_rows(grad, *chosen, len(table))
        return grad_weight, grad_table, None, None, None, None


def _scatter_rows(rows: Tensor, weight: Tensor, target: Tensor, source: Tensor, count: int) -> Tensor:
    """out[target_i] += weight_i rows[source_i]: one bag per target, after a sort; nothing of size M x K."""
    out = rows.new_zeros(count, rows.shape[1])
    if len(target) == 0:
        return out
    target, order = target.sort()
    distinct, each = target.unique_consecutive(return_counts=True)
    offsets = (each.cumsum(0) - each).to(source.dtype)
    source, weight = source.index_select(0, order), weight.index_select(0, order)
    bags = F.embedding_bag(source, rows, offsets, mode="sum", per_sample_weights=weight)
    return out.index_copy_(0, distinct.long(), bags)


def bag_logits(weight: Tensor, table: Tensor, cell: Tensor, ray: Tensor, rays: int, min_weight: float = 0.0) -> Tensor:
    """Rendered logits [R, K] = sum of w_i L(cell_i), as a weighted bag of table rows per ray.

    Args:
        weight: [M], differentiable; every crossing's row counts in its gradient, however small its weight: an almost
            transparent voxel must learn from its class too.
        table: [cells, K], differentiable; crossings with weight up to ``min_weight`` are left out of its gradient, which
            is then off by at most (their number) x ``min_weight`` x |grad|.
        cell, ray: [M] int32; ray ascending, in 0 .. rays - 1.
    """
    if len(ray) == 0:
        return table.new_zeros(rays, table.shape[1]) + weight.sum() + table[:1].sum() * 0
    count = torch.bincount(ray, minlength=rays)
    return _BagLogits.apply(weight, table, cell, ray, (count.cumsum(0) - count).to(cell.dtype), min_weight)
