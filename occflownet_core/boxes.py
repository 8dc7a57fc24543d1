# SPDX-License-Identifier: Apache-2.0
"""MovingBoxes: annotated objects with their poses now and at neighbour frames; BoxIndex finds who holds a point or
crosses a ray, at the cost of one table lookup per point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from occflownet_core.errors import GeometryError

if TYPE_CHECKING:  # the renderer imports this module
    from occflownet_core.renderer.rays import Rays

_COARSE_M = 2.0
_CORNERS = torch.tensor([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)]).double()


@dataclass(frozen=True)
class MovingBoxes:
    """One row per object and neighbour frame, all poses in the current ego frame, float64.

    Attributes:
        ego_from_box_now: [N, 4, 4], the box's pose at time 0; NaN where the object is not annotated then.
        ego_from_box_then: [N, 4, 4], its pose at ``time_index``; NaN where it is not annotated then.
        size_m: [N, 3], along the box's own x (length), y (width), z (height).
        label: [N] int64.
        time_index: [N] int64, never 0.
        batch_index: [N] int64.

    Raises:
        GeometryError: shapes disagree, a size is not positive, a row has no pose at all or is for time 0.
    """

    ego_from_box_now: Tensor
    ego_from_box_then: Tensor
    size_m: Tensor
    label: Tensor
    time_index: Tensor
    batch_index: Tensor

    def __post_init__(self) -> None:
        count = len(self.label)
        shapes = {"ego_from_box_now": (count, 4, 4), "ego_from_box_then": (count, 4, 4), "size_m": (count, 3)}
        for name in ("ego_from_box_now", "ego_from_box_then", "size_m", "time_index", "batch_index"):
            shape = shapes.get(name, (count,))
            if tuple(getattr(self, name).shape) != shape:
                raise GeometryError(f"boxes: {name} has shape {tuple(getattr(self, name).shape)}; expected {shape}")
        if not (self.size_m > 0).all():
            raise GeometryError(f"boxes: a size is {self.size_m.min().item():g} m; all three must be positive")
        if (self.time_index == 0).any():
            raise GeometryError("boxes: a row has time_index 0; give neighbour frames only, now is ego_from_box_now")
        if not (self.seen_now | self.seen_then).all():
            raise GeometryError("boxes: a row has a pose neither now nor then; leave it out")

    @staticmethod
    def from_numpy(
        ego_from_box_now: np.ndarray,
        ego_from_box_then: np.ndarray,
        size_m: np.ndarray,
        label: np.ndarray,
        time_index: np.ndarray,
        batch_index: np.ndarray | int = 0,
    ) -> MovingBoxes:
        """Boxes from arrays; ``batch_index`` may be one number for all. Raises as the class does."""
        count = len(label)
        batch = np.broadcast_to(np.asarray(batch_index, dtype=np.int64), (count,)).copy()

        def real(values: np.ndarray, shape: tuple[int, ...]) -> Tensor:
            return torch.from_numpy(np.asarray(values, dtype=np.float64).reshape(shape).copy())

        return MovingBoxes(
            real(ego_from_box_now, (count, 4, 4)),
            real(ego_from_box_then, (count, 4, 4)),
            real(size_m, (count, 3)),
            torch.from_numpy(np.asarray(label, dtype=np.int64).copy()),
            torch.from_numpy(np.asarray(time_index, dtype=np.int64).copy()),
            torch.from_numpy(batch),
        )

    @staticmethod
    def empty() -> MovingBoxes:
        """No boxes."""
        none = np.zeros((0, 4, 4))
        return MovingBoxes.from_numpy(none, none, np.zeros((0, 3)), np.zeros(0), np.zeros(0))

    @staticmethod
    def cat(parts: list[MovingBoxes]) -> MovingBoxes:
        """All rows of the parts."""
        names = MovingBoxes.__dataclass_fields__
        return (
            MovingBoxes(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})
            if parts
            else MovingBoxes.empty()
        )

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, which: Tensor) -> MovingBoxes:
        return MovingBoxes(**{name: getattr(self, name)[which] for name in self.__dataclass_fields__})

    def to(self, device: torch.device | str) -> MovingBoxes:
        """The same boxes on another device."""
        return MovingBoxes(**{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})

    @property
    def seen_now(self) -> Tensor:
        """True [N] where the object is annotated at time 0."""
        return self.ego_from_box_now.isfinite().all(dim=-1).all(dim=-1)

    @property
    def seen_then(self) -> Tensor:
        """True [N] where the object is annotated at its time."""
        return self.ego_from_box_then.isfinite().all(dim=-1).all(dim=-1)

    @property
    def paired(self) -> Tensor:
        """True [N] where the object is annotated at both times, so that its motion is known."""
        return self.seen_now & self.seen_then

    @property
    def now_from_then(self) -> Tensor:
        """M_b^-1 [N, 4, 4]: where what moved with the box at its time lies now; NaN without partner."""
        return self.ego_from_box_now @ rigid_inverse(self.ego_from_box_then)

    def to_now(self, points_m: Tensor, box: Tensor) -> Tensor:
        """Points [n, 3] at the boxes' time, carried back to time 0 by boxes [n]."""
        motion = self.now_from_then[box]
        return (motion[:, :3, :3] @ points_m[..., None])[..., 0] + motion[:, :3, 3]

    def turn_to_now(self, direction: Tensor, box: Tensor) -> Tensor:
        """Directions [n, 3], turned back to time 0 by boxes [n]."""
        return (self.now_from_then[box][:, :3, :3] @ direction[..., None])[..., 0]

    def standing(self, ego_from_box: Tensor, time_index: Tensor) -> MovingBoxes:
        """The same boxes at one time [N] each, at poses [N, 4, 4], and nowhere else."""
        nowhere = torch.full_like(ego_from_box, torch.nan)
        return MovingBoxes(nowhere, ego_from_box, self.size_m, self.label, time_index, self.batch_index)

    def scaled(self, factor: float) -> MovingBoxes:
        """The boxes about their own centres, ``factor`` times as large."""
        return MovingBoxes(
            self.ego_from_box_now,
            self.ego_from_box_then,
            self.size_m * factor,
            self.label,
            self.time_index,
            self.batch_index,
        )

    def smallest_first(self) -> MovingBoxes:
        """The boxes by volume, so that the lower index is the smaller box."""
        return self[self.size_m.prod(dim=-1).argsort(stable=True)]

    def moving(self, still_m: float) -> MovingBoxes:
        """Without the boxes none of whose corners moved further than ``still_m``.

        A still box stays in the list where it touches a box that moved away: its content must not be cleared with it.
        """
        corners_m = _CORNERS.to(self.size_m.device) * self.size_m[:, None]  # [N, 8, 3]
        there, here = (
            corners_m @ pose[:, :3, :3].mT + pose[:, None, :3, 3]
            for pose in (self.ego_from_box_then, self.ego_from_box_now)
        )
        moved = ~((there - here).norm(dim=-1).amax(dim=-1) <= still_m)  # NaN: no partner, kept
        group = self.time_index * (int(self.batch_index.max()) + 1 if len(self) else 1) + self.batch_index
        centre_m, radius_m = self.ego_from_box_now[:, :3, 3], self.size_m.norm(dim=-1) / 2
        distance_m = (centre_m[:, None] - centre_m[None]).norm(dim=-1)
        touch = (distance_m < radius_m[:, None] + radius_m[None]) & (group[:, None] == group[None])
        return self[moved | (touch & moved[None]).any(dim=1)]


def rigid_inverse(pose: Tensor) -> Tensor:
    """Inverse [..., 4, 4] of rigid transforms."""
    rotation = pose[..., :3, :3].mT
    result = torch.zeros_like(pose)
    result[..., :3, :3] = rotation
    result[..., :3, 3] = -(rotation @ pose[..., :3, 3, None])[..., 0]
    result[..., 3, 3] = 1
    return result


class BoxIndex:
    """Finds the boxes around points and across rays without testing all against all.

    Points: a coarse x-y table (2 m) per frame lists the boxes whose bounding circle reaches into each cell; most points
    fall into an empty list and cost one lookup. Rays: the distance from a box's centre to the line, from two matrix
    products per frame, leaves a few candidates for the slab test.

    Each box stands in the index twice: at its time ("then") and, marked ``now``, at time 0 as seen from its time.
    """

    def __init__(self, boxes: MovingBoxes) -> None:
        count = len(boxes)
        rows = torch.arange(count, device=boxes.label.device)
        seen = torch.cat([boxes.seen_then, boxes.seen_now])
        self._box = torch.cat([rows, rows])[seen]  # [E] row in boxes
        self._now = torch.cat([torch.zeros_like(rows), torch.ones_like(rows)]).bool()[seen]
        pose = torch.cat([boxes.ego_from_box_then, boxes.ego_from_box_now])[seen]
        self._centre_m = pose[:, :3, 3]
        self._box_from_ego = rigid_inverse(pose)
        self._half_m = boxes.size_m[self._box] / 2
        self._radius_m = self._half_m.norm(dim=-1)
        self._frames = torch.stack([boxes.time_index, boxes.batch_index], dim=1)[self._box]  # [E, 2]
        if len(self._box):
            self._build_table()

    def _build_table(self) -> None:
        """List, per frame and coarse cell, the entries that reach into it (compressed rows)."""
        device = self._box.device
        reach = self._half_m[:, :2].norm(dim=-1, keepdim=True).maximum(self._radius_m[:, None])
        low, high = self._centre_m[:, :2] - reach, self._centre_m[:, :2] + reach
        self._origin = low.amin(dim=0)
        first = ((low - self._origin) / _COARSE_M).long()
        span = ((high - self._origin) / _COARSE_M).long() - first + 1  # [E, 2]
        self._width = (first + span).amax(dim=0)  # [2]
        self._slots, frame = self._frames.unique(dim=0, return_inverse=True)
        each = span.prod(dim=1)
        entry = torch.repeat_interleave(torch.arange(len(each), device=device), each)
        rank = torch.arange(len(entry), device=device) - (each.cumsum(0) - each)[entry]
        x = first[entry, 0] + rank % span[entry, 0]
        y = first[entry, 1] + rank // span[entry, 0]
        key = (frame[entry] * self._width[1] + y) * self._width[0] + x
        order = key.argsort(stable=True)
        self._listed = entry[order]
        self._list_length = torch.bincount(key, minlength=len(self._slots) * int(self._width.prod()))
        self._list_start = self._list_length.cumsum(0) - self._list_length

    def _slot(self, time_index: Tensor, batch_index: Tensor) -> Tensor:
        """Place [N] of each (time, batch) among the indexed frames; -1 for frames without boxes."""
        low = self._slots.amin(dim=0)
        size = self._slots.amax(dim=0) - low + 1
        table = torch.full((int(size[0]), int(size[1])), -1, device=low.device)
        table[self._slots[:, 0] - low[0], self._slots[:, 1] - low[1]] = torch.arange(
            len(self._slots), device=low.device
        )
        t, b = time_index - low[0], batch_index - low[1]
        known = (t >= 0) & (t < size[0]) & (b >= 0) & (b < size[1])
        return torch.where(known, table[t.clamp(0, size[0] - 1), b.clamp(0, size[1] - 1)], -1)

    @torch.no_grad()
    def inside(self, points_m: Tensor, time_index: Tensor, batch_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All pairs of a point and a box of its frame that holds it.

        Args:
            points_m: [N, 3]; time_index, batch_index: [N].

        Returns:
            point [n] in 0..N-1, box [n] row, now [n] bool: the box at time 0 rather than at the point's own.
        """
        if len(self._box) == 0 or len(points_m) == 0:
            none = self._box.new_zeros(0)
            return none, none, none.bool()
        slot = self._slot(time_index, batch_index)
        cell = ((points_m[:, :2] - self._origin.to(points_m.dtype)) / _COARSE_M).floor()
        near = (slot >= 0) & ((cell >= 0) & (cell < self._width)).all(dim=-1)
        point = near.nonzero()[:, 0]
        key = (slot[point] * self._width[1] + cell[point, 1].long()) * self._width[0] + cell[point, 0].long()
        listed = self._list_length[key]
        pair = torch.repeat_interleave(torch.arange(len(point), device=point.device), listed)
        rank = torch.arange(len(pair), device=point.device) - (listed.cumsum(0) - listed)[pair]
        entry = self._listed[self._list_start[key[pair]] + rank]
        point = point[pair]
        pose = self._box_from_ego[entry]
        local_m = (pose[:, :3, :3] @ points_m[point].double()[..., None])[..., 0] + pose[:, :3, 3]
        holds = (local_m.abs() <= self._half_m[entry]).all(dim=-1)
        entry = entry[holds]
        return point[holds], self._box[entry], self._now[entry]

    @torch.no_grad()
    def crossed(self, rays: Rays) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All pairs of a ray and a box of its frame that it passes through.

        Returns:
            ray [h], box [h] row, now [h] bool, enter_m [h], exit_m [h] float64 distances along the ray, exit positive.
        """
        none = self._box.new_zeros(0)
        rays_hit, entries = [none], [none]
        if len(self._box):
            slot = self._slot(rays.time_index, rays.batch_index)
            for frame, (t, b) in enumerate(self._slots.tolist()):
                ray = (slot == frame).nonzero()[:, 0]
                entry = ((self._frames[:, 0] == t) & (self._frames[:, 1] == b)).nonzero()[:, 0]
                i, j = _near_lines(
                    rays.origin_m[ray], rays.direction[ray], self._centre_m[entry], self._radius_m[entry]
                )
                rays_hit.append(ray[i])
                entries.append(entry[j])
        ray, entry = torch.cat(rays_hit), torch.cat(entries)
        pose = self._box_from_ego[entry]
        origin = (pose[:, :3, :3] @ rays.origin_m[ray].double()[..., None])[..., 0] + pose[:, :3, 3]
        direction = (pose[:, :3, :3] @ rays.direction[ray].double()[..., None])[..., 0]
        enter_m, exit_m = slab(origin, direction, -self._half_m[entry], self._half_m[entry])
        hit = (exit_m > enter_m) & (exit_m > 0)
        return ray[hit], self._box[entry[hit]], self._now[entry[hit]], enter_m[hit], exit_m[hit]


def _near_lines(origin_m: Tensor, direction: Tensor, centre_m: Tensor, radius_m: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (ray, sphere) that may meet: |c - o|^2 - ((c - o) . d)^2 <= r^2, with a margin for float32."""
    centre, radius = centre_m.to(origin_m.dtype), radius_m.to(origin_m.dtype)
    along = direction @ centre.T - (origin_m * direction).sum(dim=-1, keepdim=True)  # [n, E]
    square = (origin_m * origin_m).sum(dim=-1, keepdim=True) - 2 * (origin_m @ centre.T)  # [n, E]
    square += (centre * centre).sum(dim=-1)
    meets = (square - along * along <= (radius + 0.05) ** 2 + 0.05) & (along > -(radius + 0.05))
    i, j = meets.nonzero(as_tuple=True)
    return i, j


def slab(origin: Tensor, direction: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Where lines [n, 3] enter and leave axis-aligned boxes (Kay and Kajiya 1986): enter [n], exit [n].

    A line parallel to a face is inside its slab where its origin lies in [lower, upper), as for cells; a miss has
    ``exit <= enter``.
    """
    a, b = (lower - origin) / direction, (upper - origin) / direction
    parallel = direction == 0
    between = (origin >= lower) & (origin < upper)
    infinity = torch.full_like(origin, torch.inf)
    low = torch.where(parallel, torch.where(between, -infinity, infinity), torch.minimum(a, b))
    high = torch.where(parallel, torch.where(between, infinity, -infinity), torch.maximum(a, b))
    return low.amax(dim=-1), high.amin(dim=-1)
