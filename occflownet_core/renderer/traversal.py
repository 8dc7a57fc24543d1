# SPDX-License-Identifier: Apache-2.0
"""Exact rendering: every voxel that a ray crosses, with its true crossing length, and no sample count to choose.

A lattice is a field that is constant per cell, so its rendering integral has a closed form. Three steps: ``traverse``
lists crossings (Amanatides and Woo 1987) for all rays at once, ``packed.integrate`` turns optical depths into weights and an
expected range, ``packed.bag_logits`` adds up rows of logits. Lists are packed ray after ray; nothing is padded.

What bounds the work, for R rays, M crossings, K classes and C cells (R = 32,768 street rays: M is 1.0 million until less
than 1e-4 is left, 2.4 million to the grid's edge): rows of logits are read forward and backward and read, added to and
written once more for their gradient, 4 M K floats; the table of logits is laid out once, and its gradient written and
laid back, 6 C K floats. That is 0.5 GB of memory traffic for K = 17 and 640,000 cells; arithmetic, some 6 M K FLOP, is far
below it. ``benchmarks/rendering.py`` measures the distance: 7 times that floor where it was last measured. What is above
it: the walk itself, some 25 passes over R-sized arrays for each of 100 to 300 turns (a third of the time), the sort
by cell for the logits' gradient (a fifth), and some 30 passes over M-sized lists in ``integrate`` (a quarter).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from occflownet_core.boxes import slab
from occflownet_core.grid import VoxelGrid
from occflownet_core.interpolate import cell_rows, corners, require_volume, table_from_volume
from occflownet_core.motion import RayPieces, StaticWorld
from occflownet_core.renderer.packed import bag_logits, integrate, transmittance_before
from occflownet_core.renderer.rays import Rays
from occflownet_core.renderer.samplers import grid_segment
from occflownet_core.renderer.volume import RenderConfig, RenderedRays, RenderSamples, with_remainder
from occflownet_core.voxel_field import VoxelField

_DONE_M = 1e-9
_TURNS_BETWEEN_CHECKS = 4


@dataclass(frozen=True)
class Crossings:
    """Voxels crossed, packed ray after ray and in order along each.

    Attributes:
        ray: [M] int32, ascending.
        cell: [M] int32, row in a table [V * Z * Y * X, ...] of V volumes.
        start_m, length_m: [M], stretch of the ray in that cell; crossings of zero length may occur, they weigh nothing.
    """

    ray: Tensor
    cell: Tensor
    start_m: Tensor
    length_m: Tensor

    def at(self, which: Tensor) -> Crossings:
        """The crossings of ascending indices [m]."""
        return Crossings(self.ray[which], self.cell[which], self.start_m[which], self.length_m[which])


@torch.no_grad()
def traverse(
    pieces: RayPieces,
    volume_index: Tensor,
    grid: VoxelGrid,
    dtype: torch.dtype = torch.float32,
    density: Tensor | None = None,
    min_transmittance: float = 0.0,
) -> Crossings:
    """All cells that rays cross, in order (Amanatides and Woo 1987), every ray one step per turn.

    Geometry is in float64: a start on a cell's face must not fall to the wrong side after a rigid motion.

    Args:
        pieces: rays, cut where motion changes.
        volume_index: [P] integer, which volume each piece reads.
        grid: the cells.
        dtype: of the lengths returned.
        density: [V * Z * Y * X] 1/m, with which pieces stop once ``min_transmittance`` is passed; None never stops.
    """
    state = _enter(pieces, volume_index, grid)
    if density is not None and min_transmittance > 0:
        deepest = -math.log(min_transmittance)
    else:
        density, deepest = None, math.inf
    optical_depth = torch.zeros(len(state.piece), dtype=dtype, device=state.t.device)
    turns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    alive = torch.ones(len(state.piece), dtype=torch.bool, device=state.t.device)
    while len(state.piece):
        out = torch.minimum(state.next_face.amin(dim=0), state.t_exit)  # [n]
        length = (out - state.t).clamp_(min=0.0).to(dtype)
        turns.append((state.piece, state.cell.clone(), state.t.to(dtype), length))
        if density is not None:
            optical_depth = torch.addcmul(optical_depth, density.index_select(0, state.cell), length)
        alive = (state.t_exit - out > _DONE_M) & (optical_depth < deepest)
        step = (state.next_face <= out) & alive  # [3, n]; a corner is passed in one turn
        state.cell.add_((step * state.stride).sum(dim=0, dtype=torch.int32))
        state.next_face = torch.where(step, state.next_face + state.per_cell, state.next_face)
        # Who is done stays where it is with zero length, until it pays to close ranks.
        state.t = out
        state.t_exit = torch.where(alive, state.t_exit, out)
        if len(turns) % _TURNS_BETWEEN_CHECKS == 0:
            kept = alive.nonzero()[:, 0]
            state, optical_depth = state.at(kept), optical_depth[kept]
    return _packed(turns, pieces, dtype)


@dataclass
class _Walk:
    """Where every piece stands: piece [n], cell [n], t [n], t_exit [n], and per axis next_face, per_cell, stride [3, n]."""

    piece: Tensor
    cell: Tensor
    t: Tensor
    t_exit: Tensor
    next_face: Tensor
    per_cell: Tensor
    stride: Tensor

    def at(self, which: Tensor) -> _Walk:
        columns = (self.piece, self.cell, self.t, self.t_exit, self.next_face, self.per_cell, self.stride)
        return _Walk(*(column.index_select(-1, which) for column in columns))


def _enter(pieces: RayPieces, volume_index: Tensor, grid: VoxelGrid) -> _Walk:
    """The first cell of every piece that meets the grid, and the distances to its faces."""
    cells = pieces.origin_m.new_tensor(grid.shape)
    lower_m = pieces.origin_m.new_tensor(grid.lower_m)
    origin = (pieces.origin_m - lower_m) / grid.voxel_size_m  # [P, 3] in cells
    direction = pieces.direction / grid.voxel_size_m  # cells per metre
    t, t_exit = slab(origin, direction, torch.zeros_like(cells), cells)
    t, t_exit = torch.maximum(t, pieces.start_m), torch.minimum(t_exit, pieces.end_m)
    piece = (t_exit - t > _DONE_M).nonzero()[:, 0]
    origin, direction, t, t_exit = origin[piece], direction[piece], t[piece], t_exit[piece]
    cell = (origin + direction * t[:, None]).floor().clamp(min=0).minimum(cells - 1)  # [n, 3]
    forward = direction > 0
    next_face = torch.where(direction == 0, torch.inf, (cell + forward.to(cell) - origin) / direction)
    x, y, z = grid.shape
    strides = torch.tensor([1, x, x * y], dtype=torch.int32, device=cell.device)
    row = ((cell.int() * strides).sum(dim=-1) + volume_index[piece] * (x * y * z)).int()
    stride = torch.where(forward, strides, -strides)
    per_cell = torch.where(direction == 0, torch.inf, 1 / direction.abs())
    return _Walk(piece, row, t, t_exit, next_face.T.contiguous(), per_cell.T.contiguous(), stride.T.contiguous())


def _packed(turns: list[tuple[Tensor, ...]], pieces: RayPieces, dtype: torch.dtype) -> Crossings:
    """Reorder turn-by-turn lists to ray-by-ray ones: pieces are sorted by ray already, so a counting sort does."""
    device = pieces.ray.device
    if not turns:
        none, nothing = pieces.ray.new_zeros(0).int(), torch.zeros(0, dtype=dtype, device=device)
        return Crossings(none, none, nothing, nothing)
    count = torch.zeros(len(pieces.ray), dtype=torch.int64, device=device)
    for turn, (piece, *_) in enumerate(turns):
        count[piece] = turn + 1
    first = count.cumsum(0) - count
    place = torch.cat([first[piece] + turn for turn, (piece, *_) in enumerate(turns)])  # [M]
    columns = []
    for column in range(1, 4):
        values = torch.cat([turn[column] for turn in turns])
        columns.append(torch.empty_like(values).index_copy_(0, place, values))
    return Crossings(pieces.ray.int().repeat_interleave(count), *columns)


def render_traversal(
    density: Tensor, logits: Tensor, rays: Rays, grid: VoxelGrid, motion: StaticWorld, config: RenderConfig
) -> RenderedRays:
    """Render lattices by exact traversal.

    Rigid motions (static world, filter, boxes) are exact: a ray is cut where it enters or leaves a box, and each piece
    crosses the cells where its content lies now. Where the motion must be asked per point, crossings are those of the
    unmoved ray and their content is looked up at their midpoints: in the cell for boxes that move only their own class,
    interpolated for a learned flow, whose velocity could not be learned from constant cells.

    Args:
        density: [B, Z, Y, X] 1/m.
        logits: [B, K, Z, Y, X].
        rays, grid, motion, config: as for ``renderer.render``.
    """
    require_volume(density, grid, "density")
    require_volume(logits, grid, "logits")
    table = table_from_volume(logits)
    asked = motion.asks_points(rays)
    if not asked.any():
        return _render_pieces(density, logits, table, rays, grid, motion, config)
    parts = [asked.nonzero()[:, 0], (~asked).nonzero()[:, 0]]
    renders = (_render_asked, _render_pieces)
    rendered = [
        render(density, logits, table, rays[part], grid, motion, config)
        for render, part in zip(renders, parts, strict=True)
    ]
    return _joined(rendered, parts)


def _render_pieces(
    density: Tensor,
    logits: Tensor,
    table: Tensor,
    rays: Rays,
    grid: VoxelGrid,
    motion: StaticWorld,
    config: RenderConfig,
) -> RenderedRays:
    """Rays whose motion is rigid piece by piece."""
    volumes, volume_index = _views(density, logits, rays, motion)
    pieces = motion.pieces(rays)
    flat = volumes.reshape(-1)
    crossings = traverse(pieces, volume_index[pieces.ray], grid, density.dtype, flat.detach(), config.min_transmittance)
    optical_depth = flat.index_select(0, crossings.cell) * crossings.length_m
    row = crossings.cell % density.numel() if len(volumes) > len(density) else crossings.cell
    return _rendered(crossings, optical_depth, row, None, table, rays, grid, config)


def _render_asked(
    density: Tensor,
    logits: Tensor,
    table: Tensor,
    rays: Rays,
    grid: VoxelGrid,
    motion: StaticWorld,
    config: RenderConfig,
) -> RenderedRays:
    """Rays whose content must be asked for at every crossing's midpoint.

    Content moves, so only after asking is it known where a ray stops: everything is asked without gradient, and what
    is reached once more with it.
    """
    batch_index = rays.batch_index.long()
    crossings = traverse(RayPieces.whole(rays), batch_index, grid, density.dtype)
    field = VoxelField(density, logits, grid, "trilinear" if motion.continuous else "nearest")
    with torch.no_grad():
        optical_depth, points_m = _ask(field, crossings, rays, motion)
        reach = transmittance_before(optical_depth, crossings.ray, len(rays))
        reached = (reach >= config.min_transmittance).nonzero()[:, 0]
        crossings = crossings.at(reached)
    optical_depth, points_m = _ask(field, crossings, rays, motion)
    if motion.continuous:
        row, share = corners(grid, points_m, batch_index[crossings.ray])  # [M, 8]
    else:
        row, share = cell_rows(grid, points_m, batch_index[crossings.ray])[0], None
    return _rendered(crossings, optical_depth, row, share, table, rays, grid, config)


def _ask(field: VoxelField, crossings: Crossings, rays: Rays, motion: StaticWorld) -> tuple[Tensor, Tensor]:
    """Optical depth [M] of crossings at their midpoints, and where what is there lies now, [M, 3]."""
    ray, middle_m = crossings.ray, crossings.start_m + 0.5 * crossings.length_m
    points_m = rays.origin_m[ray] + rays.direction[ray] * middle_m[:, None]
    batch_index = rays.batch_index[ray]
    points_m, present = motion.content(points_m, rays.time_index[ray], batch_index, field)
    return field.density(points_m, batch_index) * present * crossings.length_m, points_m


def _rendered(
    crossings: Crossings,
    optical_depth: Tensor,
    row: Tensor,
    share: Tensor | None,
    table: Tensor,
    rays: Rays,
    grid: VoxelGrid,
    config: RenderConfig,
) -> RenderedRays:
    """What crossings with optical depth [M] add up to; their logits are table rows [M], or shares [M, 8] of [M, 8]."""
    weight, range_m, passed = integrate(optical_depth, crossings.start_m, crossings.length_m, crossings.ray, len(rays))
    row_weight, row_ray = weight, crossings.ray
    if share is not None:
        row_weight, row_ray = (weight[:, None] * share).reshape(-1), row_ray.repeat_interleave(share.shape[1])
    rendered = bag_logits(row_weight, table, row.reshape(-1).int(), row_ray, len(rays), config.min_weight)
    opacity, far_m = 1 - passed, grid_segment(rays, grid)[1]
    return RenderedRays(
        with_remainder(range_m, opacity, far_m, config),
        rendered,
        opacity,
        far_m,
        RenderSamples(crossings.ray, crossings.start_m, crossings.length_m, weight),
    )


def _joined(parts: list[RenderedRays], places: list[Tensor]) -> RenderedRays:
    """Parts rendered apart, back in the order of their rays: ``places`` [R_i] says where each part's rays stood."""
    back = torch.cat(places).argsort()
    values = [torch.cat([getattr(p, n) for p in parts])[back] for n in ("range_m", "logits", "opacity", "far_m")]
    ray = torch.cat([place[part.samples.ray] for part, place in zip(parts, places, strict=True)])
    order = ray.argsort(stable=True)
    lists = (torch.cat([getattr(p.samples, n) for p in parts])[order] for n in ("start_m", "length_m", "weight"))
    return RenderedRays(*values, RenderSamples(ray[order], *lists))


def _views(density: Tensor, logits: Tensor, rays: Rays, motion: StaticWorld) -> tuple[Tensor, Tensor]:
    """Density as now and as neighbour frames see it, [V, Z, Y, X], and which view each ray [R] reads."""
    batch_index = rays.batch_index.long()
    presence = motion.neighbour_presence(logits)
    if presence is None:
        return density, batch_index
    neighbour = (rays.time_index != 0).long()
    return torch.cat([density, density * presence]), batch_index + neighbour * len(density)
