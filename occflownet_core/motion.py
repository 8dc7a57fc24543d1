# SPDX-License-Identifier: Apache-2.0
"""Where the content of point p at time t is in the current field, and whether there is any: StaticWorld,
DynamicFilter, BoxFlow, StillWorld, LearnedFlow (OccFlowNet, arXiv 2402.12792, sections 3.3 and 3.4; here points move, voxels do
not). All points, poses and velocities are expressed in the current ego frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from occflownet_core.boxes import BoxIndex, MovingBoxes
from occflownet_core.errors import GeometryError
from occflownet_core.labels import FILTERED_CLASSES

if TYPE_CHECKING:  # the renderer imports this module
    from occflownet_core.grid import VoxelGrid
    from occflownet_core.renderer.rays import Rays
    from occflownet_core.voxel_field import Field

_FAR_M = 1e6
_SLIVER_M = 1e-9


@dataclass(frozen=True)
class RayPieces:
    """Rays cut where the motion of what they pass through changes; sorted by ray, then along it.

    A stretch that no piece covers is empty. Within a piece, content at time t lies in the current field on the line
    ``origin_m + s * direction`` for the same ``s`` as on the ray itself.

    Attributes:
        ray: [P] int64, the ray that the piece belongs to.
        origin_m, direction: [P, 3] float64.
        start_m, end_m: [P] float64, distances from the ray's own origin.
    """

    ray: Tensor
    origin_m: Tensor
    direction: Tensor
    start_m: Tensor
    end_m: Tensor

    @staticmethod
    def whole(rays: Rays) -> RayPieces:
        """Every ray in one piece, unmoved."""
        start_m = torch.zeros(len(rays), dtype=torch.float64, device=rays.range_m.device)
        index = torch.arange(len(rays), device=rays.range_m.device)
        return RayPieces(index, rays.origin_m.double(), rays.direction.double(), start_m, start_m + _FAR_M)


class StaticWorld:
    """Nothing moves. Also the base of the other motions: each overrides what differs."""

    continuous: bool = False
    """Whether ``content`` moves points differentiably, so that the field must be interpolated where they come from."""

    def keeps(self, rays: Rays, grid: VoxelGrid) -> Tensor:
        """True [R] for rays that still say something true about the current field."""
        return torch.ones(len(rays), dtype=torch.bool, device=rays.range_m.device)

    def content(self, points_m: Tensor, time_index: Tensor, batch_index: Tensor, field: Field) -> tuple[Tensor, Tensor]:
        """Where what is at a point at its time lies in the current field.

        Args:
            points_m: [N, 3], current ego frame.
            time_index: [N] integer, when the point is asked about.
            batch_index: [N] integer.
            field: the current field, for motions that depend on what is predicted.

        Returns:
            points_now_m [N, 3]; present [N] bool, False where nothing of the current field belongs.
        """
        return points_m, torch.ones(len(points_m), dtype=torch.bool, device=points_m.device)

    def pieces(self, rays: Rays) -> RayPieces:
        """The rays cut into stretches of one rigid motion each."""
        return RayPieces.whole(rays)

    def concerns(self, rays: Rays) -> Tensor:
        """True [R] for rays along which ``content`` may say anything but "where it was"."""
        return rays.time_index != 0

    def asks_points(self, rays: Rays) -> Tensor:
        """True [R] for rays whose pieces do not tell all: ``content`` must be asked along them."""
        return torch.zeros(len(rays), dtype=torch.bool, device=rays.range_m.device)

    def neighbour_presence(self, logits: Tensor) -> Tensor | None:
        """What of the lattice neighbour frames (t != 0) see: bool [B, Z, Y, X] of logits [B, K, Z, Y, X]; None: all."""
        return None


class DynamicFilter(StaticWorld):
    """Content predicted as a dynamic class is not there in neighbour frames, and rays labelled as one are dropped."""

    def __init__(self, classes: tuple[int, ...] = FILTERED_CLASSES) -> None:
        self.classes = classes

    def _predicted(self, logits: Tensor) -> Tensor:
        """True [N, ...] where a dynamic class has the highest of logits [N, K, ...]; 15 times as fast as an arg-max."""
        dynamic = [logits[:, k] for k in range(logits.shape[1]) if k in self.classes]
        static = [logits[:, k] for k in range(logits.shape[1]) if k not in self.classes]
        if not dynamic or not static:
            return torch.full_like(logits[:, 0], bool(dynamic), dtype=torch.bool)
        return reduce(torch.maximum, dynamic) > reduce(torch.maximum, static)

    def keeps(self, rays: Rays, grid: VoxelGrid) -> Tensor:
        dynamic = torch.isin(rays.label, torch.tensor(self.classes, device=rays.label.device))
        return (rays.time_index == 0) | ~dynamic

    @torch.no_grad()
    def content(self, points_m: Tensor, time_index: Tensor, batch_index: Tensor, field: Field) -> tuple[Tensor, Tensor]:
        present = torch.ones(len(points_m), dtype=torch.bool, device=points_m.device)
        neighbour = (time_index != 0).nonzero()[:, 0]
        present[neighbour] = ~self._predicted(field.semantics(points_m[neighbour], batch_index[neighbour]))
        return points_m, present

    def neighbour_presence(self, logits: Tensor) -> Tensor | None:
        return ~self._predicted(logits.detach())


class BoxFlow(StaticWorld):
    """What is inside an annotated box moves with it.

    Inside box b at time t: p0 = M_b^-1 p. Inside a box at time 0 and in none at t: empty. Elsewhere: where it was.
    Where boxes at t overlap, the smaller one wins. A box that exists at t only has no content in the current field:
    it moves nothing, and rays that end in it are dropped, as are those whose content lies outside the grid now.

    Args:
        boxes: the annotated objects, one row per object and neighbour frame.
        scale: boxes are this much larger than annotated.
        require_class: move (or clear) only content predicted as the box's own class; the ground that reaches into a
            box then stays. Traversal looks such rays' content up at the midpoint of every crossing.
        still_m: objects none of whose corners moved further than this are left alone.
    """

    def __init__(
        self, boxes: MovingBoxes, scale: float = 1.15, require_class: bool = False, still_m: float = 0.05
    ) -> None:
        if not scale > 0:
            raise GeometryError(f"box scale is {scale}; give a positive factor, 1.15 as published")
        self.require_class = require_class
        self.boxes = boxes.scaled(scale).moving(still_m).smallest_first()
        self._index = BoxIndex(self.boxes)

    def keeps(self, rays: Rays, grid: VoxelGrid) -> Tensor:
        kept = torch.ones(len(rays), dtype=torch.bool, device=rays.range_m.device)
        asked = ((rays.time_index != 0) & rays.returned).nonzero()[:, 0]
        ends_m = rays.end_m[asked]
        point, box, now = self._index.inside(ends_m, rays.time_index[asked], rays.batch_index[asked])
        point, box = point[~now], box[~now]
        came_from_m = self.boxes.to_now(ends_m[point].double(), box)
        lower_m, upper_m = (came_from_m.new_tensor(corner) for corner in (grid.lower_m, grid.upper_m))
        # NaN (no partner) compares false, so it counts as unknown too.
        known = ((came_from_m >= lower_m) & (came_from_m < upper_m)).all(dim=-1)
        kept[asked[point[~known]]] = False
        return kept

    @torch.no_grad()
    def content(self, points_m: Tensor, time_index: Tensor, batch_index: Tensor, field: Field) -> tuple[Tensor, Tensor]:
        present = torch.ones(len(points_m), dtype=torch.bool, device=points_m.device)
        point, box, now = self._index.inside(points_m, time_index, batch_index)
        if len(point) == 0:
            return points_m, present
        paired = now | self.boxes.paired[box]
        point, box, now = point[paired], box[paired], now[paired]
        source_m = points_m[point].double()
        source_m = torch.where(now[:, None], source_m, self.boxes.to_now(source_m, box)).to(points_m.dtype)
        if self.require_class:
            predicted = field.semantics(source_m, batch_index[point]).argmax(dim=-1)
            agrees = predicted == self.boxes.label[box]
            point, box, now, source_m = point[agrees], box[agrees], now[agrees], source_m[agrees]
        present[point[now]] = False
        moved = ~now
        point, box, source_m = point[moved], box[moved], source_m[moved]
        chosen = _smallest_box_of_each(point, box)
        present[point[chosen]] = True
        return points_m.index_copy(0, point[chosen], source_m[chosen]), present

    def pieces(self, rays: Rays) -> RayPieces:
        whole = RayPieces.whole(rays)
        if self.require_class:
            return whole
        ray, box, now, enter_m, exit_m = self._index.crossed(rays)
        paired = now | self.boxes.paired[box]
        ray, box, now, enter_m, exit_m = ray[paired], box[paired], now[paired], enter_m[paired], exit_m[paired]
        if len(ray) == 0:
            return whole
        touched, slot, first = _padded_slots(ray)
        width = int(slot.max()) + 1
        # Unused places hold an empty interval, which covers nothing.
        enter = enter_m.new_full((len(touched), width), _FAR_M).index_put((first, slot), enter_m)  # [Q, H]
        leave = enter_m.new_full((len(touched), width), _FAR_M).index_put((first, slot), exit_m)
        carrier = box.new_full((len(touched), width), len(self.boxes)).index_put((first, slot), box)
        is_now = torch.zeros_like(carrier, dtype=torch.bool).index_put((first, slot), now)

        ends = enter.new_tensor([0.0, _FAR_M]).expand(len(touched), 2)
        cuts = torch.cat([ends, enter, leave], dim=1).clamp(0.0, _FAR_M).sort(dim=1).values  # [Q, 2 + 2H]
        start, end = cuts[:, :-1], cuts[:, 1:]
        middle = (0.5 * (start + end))[:, :, None]
        covers = (middle > enter[:, None]) & (middle < leave[:, None])  # [Q, 1 + 2H, H]
        absent = len(self.boxes)
        mover = torch.where(covers & ~is_now[:, None], carrier[:, None], absent).amin(dim=2)
        empty = (mover == absent) & (covers & is_now[:, None]).any(dim=2)
        row, column = ((end - start > _SLIVER_M) & ~empty).nonzero(as_tuple=True)

        owner, mover = touched[row], mover[row, column]
        origin_m, direction = whole.origin_m[owner], whole.direction[owner]
        moved = (mover < absent).nonzero()[:, 0]
        origin_m[moved] = self.boxes.to_now(origin_m[moved], mover[moved])
        direction[moved] = self.boxes.turn_to_now(direction[moved], mover[moved])
        untouched = torch.ones(len(rays), dtype=torch.bool, device=ray.device)
        untouched[touched] = False
        order = torch.cat([whole.ray[untouched], owner]).sort(stable=True)
        return RayPieces(
            order.values,
            torch.cat([whole.origin_m[untouched], origin_m])[order.indices],
            torch.cat([whole.direction[untouched], direction])[order.indices],
            torch.cat([whole.start_m[untouched], start[row, column]])[order.indices],
            torch.cat([whole.end_m[untouched], end[row, column]])[order.indices],
        )

    def concerns(self, rays: Rays) -> Tensor:
        concerned = torch.zeros(len(rays), dtype=torch.bool, device=rays.range_m.device)
        concerned[self._index.crossed(rays)[0]] = True
        return concerned

    def asks_points(self, rays: Rays) -> Tensor:
        return self.concerns(rays) if self.require_class else super().asks_points(rays)


class StillWorld(StaticWorld):
    """The part of the world that nothing moves in: rays that cross a moving box, wherever they end, are dropped.

    For rays whose end is not known, and for fields that hold only what stands still.

    Args:
        boxes: poses now and at other times; what is annotated at one of the two only counts as moving.
        scale: boxes are this much larger than annotated.
        still_m: objects none of whose corners moved further than this are left alone.
    """

    def __init__(self, boxes: MovingBoxes, scale: float = 1.3, still_m: float = 0.3) -> None:
        if not scale > 0:
            raise GeometryError(f"box scale is {scale}; give a positive factor")
        moving = boxes.moving(still_m).scaled(scale)
        # An index has boxes of other times only: those of time 0 stand in it at one that nobody else has.
        self._now = max([0, *moving.time_index.tolist()]) + 1
        then, now = moving[moving.seen_then], moving[moving.seen_now]
        everywhen = MovingBoxes.cat(
            [
                then.standing(then.ego_from_box_then, then.time_index),
                now.standing(now.ego_from_box_now, torch.full_like(now.time_index, self._now)),
            ]
        )
        self._index = BoxIndex(everywhen)

    def keeps(self, rays: Rays, grid: VoxelGrid) -> Tensor:
        asked = replace(rays, time_index=torch.where(rays.time_index == 0, self._now, rays.time_index))
        kept = torch.ones(len(rays), dtype=torch.bool, device=rays.range_m.device)
        kept[self._index.crossed(asked)[0]] = False
        return kept


class LearnedFlow(StaticWorld):
    """A predicted velocity field moves everything: p = p0 + v(p0) dt, solved for p0 by fixed-point steps.

    Converges where the velocity's spatial slope times dt is below one; at the edge of a moving object, where it is not,
    the last iterate is taken. Differentiable in the velocity through the last step: exact where velocity is the same all
    around, as within a rigid object that does not turn, and of first order in its slope times dt elsewhere.

    Args:
        velocity: (points_m [N, 3], batch_index [N]) -> [N, 3], m/s, current ego frame.
        frame_interval_s: time between keyframes.
        steps: number of fixed-point steps.
    """

    continuous = True

    def __init__(
        self, velocity: Callable[[Tensor, Tensor], Tensor], frame_interval_s: float = 0.5, steps: int = 3
    ) -> None:
        if steps < 1:
            raise GeometryError(f"learned flow takes {steps} fixed-point steps; give at least 1")
        self.velocity = velocity
        self.frame_interval_s = frame_interval_s
        self.steps = steps

    def content(self, points_m: Tensor, time_index: Tensor, batch_index: Tensor, field: Field) -> tuple[Tensor, Tensor]:
        present = torch.ones(len(points_m), dtype=torch.bool, device=points_m.device)
        neighbour = (time_index != 0).nonzero()[:, 0]
        then_m, batch = points_m[neighbour], batch_index[neighbour]
        elapsed_s = (time_index[neighbour] * self.frame_interval_s).to(points_m.dtype)[:, None]
        now_m = then_m
        with torch.no_grad():
            for _ in range(self.steps - 1):
                now_m = then_m - self.velocity(now_m, batch) * elapsed_s
        now_m = then_m - self.velocity(now_m, batch) * elapsed_s
        return points_m.index_copy(0, neighbour, now_m), present

    def asks_points(self, rays: Rays) -> Tensor:
        return rays.time_index != 0


def box_velocities(boxes: MovingBoxes, grid: VoxelGrid, frame_interval_s: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Velocity that annotated boxes give the cells inside them: displacement to the next and previous keyframe over time.

    Args:
        boxes: with rows of time_index 1 and -1; others are not read.
        grid: the cells.
        frame_interval_s: time between keyframes.

    Returns:
        sample [n], cell [n] in Z * Y * X order, velocity_mps [n, 3] float64; a cell may come twice, once for each keyframe.
    """
    boxes = boxes[boxes.paired & (boxes.time_index.abs() == 1)]
    centres_m = torch.from_numpy(grid.centres().transpose(2, 1, 0, 3).reshape(-1, 3)).to(boxes.size_m)  # [V, 3]
    offset_m = centres_m[None] - boxes.ego_from_box_now[:, None, :3, 3]  # [N, V, 3]
    local_m = offset_m @ boxes.ego_from_box_now[:, :3, :3]
    box, cell = (local_m.abs() <= boxes.size_m[:, None] / 2).all(dim=-1).nonzero(as_tuple=True)
    then_m = (boxes.ego_from_box_then[box, :3, :3] @ local_m[box, cell][..., None])[..., 0]
    then_m = then_m + boxes.ego_from_box_then[box, :3, 3]
    elapsed_s = boxes.time_index[box] * frame_interval_s
    return boxes.batch_index[box], cell, (then_m - centres_m[cell]) / elapsed_s[:, None]


def _padded_slots(ray: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Places for hits [h] in a padded table: rays hit [Q], and column and row [h] of each hit."""
    touched, row, count = ray.unique(return_inverse=True, return_counts=True)
    order = row.argsort(stable=True)
    rank = torch.arange(len(ray), device=ray.device) - (count.cumsum(0) - count)[row[order]]
    return touched, torch.empty_like(rank).index_copy(0, order, rank), row


def _smallest_box_of_each(point: Tensor, box: Tensor) -> Tensor:
    """Which pairs to keep so that every point has one: the one with the lowest box index, which is the smallest box."""
    order = (point * (int(box.max()) + 1 if len(box) else 1) + box).argsort()
    first = torch.ones(len(order), dtype=torch.bool, device=point.device)
    first[1:] = point[order][1:] != point[order][:-1]
    return order[first]
