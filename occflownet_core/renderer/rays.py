# SPDX-License-Identifier: Apache-2.0
"""Rays: what 2D supervision says along one line of sight, expressed in the current ego frame."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from occflownet_core.errors import GeometryError
from occflownet_core.labels import FREE

_UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Rays:
    """A batch of labelled lines of sight.

    A ray with a *return* says: free up to ``range_m``, there something of class ``label``. A ray *without return*
    (sky, no LiDAR echo) has ``range_m = +inf`` and ``label = FREE`` and says: free to the grid's edge.

    Attributes:
        origin_m: [R, 3] where it starts, current ego frame.
        direction: [R, 3] unit vectors.
        range_m: [R] Euclidean distance from the origin to the return; +inf without one.
        label: [R] int64, class of the return; ``FREE`` without one.
        time_index: [R] int64, keyframe offset of the observation: 0 now, -1 the keyframe before.
        camera_index: [R] int64, the camera's place in its rig; -1 where no camera is concerned.
        batch_index: [R] int64, the sample that the ray belongs to.
        axis_cosine: optional [R], cosine between the ray and its camera's optical axis: only the published habit of
            supervising range with camera z (``RenderConfig.range_target``) reads it.

    Raises:
        GeometryError: shapes or devices disagree.
    """

    origin_m: Tensor
    direction: Tensor
    range_m: Tensor
    label: Tensor
    time_index: Tensor
    camera_index: Tensor
    batch_index: Tensor
    axis_cosine: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.range_m)
        for name, tensor in self._tensors():
            shape = (count, 3) if name in ("origin_m", "direction") else (count,)
            if tuple(tensor.shape) != shape:
                raise GeometryError(f"rays: {name} has shape {tuple(tensor.shape)}; expected {shape}")
            if tensor.device != self.range_m.device:
                raise GeometryError(f"rays: {name} is on {tensor.device}, range_m on {self.range_m.device}; move both")

    def _tensors(self) -> list[tuple[str, Tensor]]:
        pairs = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return [(name, tensor) for name, tensor in pairs if tensor is not None]

    def _map(self, change: Callable[[Tensor], Tensor]) -> Rays:
        return Rays(**{name: change(tensor) for name, tensor in self._tensors()})

    def __len__(self) -> int:
        return len(self.range_m)

    def __getitem__(self, which: Tensor | slice) -> Rays:
        """The rays of a mask [R], of indices [n], or of a slice."""
        return self._map(lambda tensor: tensor[which])

    @property
    def returned(self) -> Tensor:
        """True [R] for rays with a return."""
        return torch.isfinite(self.range_m)

    @property
    def end_m(self) -> Tensor:
        """The returns' points [R, 3]; infinite or NaN without a return."""
        return self.origin_m + self.direction * self.range_m[:, None]

    def to(self, device: torch.device | str) -> Rays:
        """The same rays on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def sample(self, count: int, generator: torch.Generator | None = None) -> Rays:
        """At most ``count`` rays, drawn without replacement; all of them, in order, where there are no more."""
        if len(self) <= count:
            return self
        chosen = torch.randperm(len(self), generator=generator, device=generator.device if generator else None)[:count]
        return self[chosen.to(self.range_m.device)]

    @staticmethod
    def cat(parts: Iterable[Rays]) -> Rays:
        """All rays of the parts, in order; ``axis_cosine`` is kept only where every part has it.

        Raises:
            GeometryError: there are no parts.
        """
        parts = list(parts)
        if not parts:
            raise GeometryError("no rays to concatenate; give at least one (possibly empty) set")
        names = set.intersection(*({name for name, _ in part._tensors()} for part in parts))
        return Rays(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    @staticmethod
    def empty(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Rays:
        """No rays at all, as a frame without labelled points gives."""
        return Rays.from_numpy(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), np.zeros(0), dtype=dtype).to(device)

    @staticmethod
    def from_numpy(
        origin_m: np.ndarray,
        direction: np.ndarray,
        range_m: np.ndarray,
        label: np.ndarray,
        time_index: np.ndarray | int = 0,
        camera_index: np.ndarray | int = -1,
        batch_index: np.ndarray | int = 0,
        axis_cosine: np.ndarray | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Rays:
        """Rays from arrays (``origin_m`` may be one point for all, indices one number for all), checked in value.

        Raises:
            GeometryError: a direction is not of unit length, an origin is not finite, a range is NaN or not positive,
                a ray without return is not labelled FREE, or one with return has no class.
        """
        range_m = np.asarray(range_m, dtype=np.float64).reshape(-1)
        count = len(range_m)

        def per_ray(values: np.ndarray | int) -> Tensor:
            return torch.from_numpy(np.broadcast_to(np.asarray(values, dtype=np.int64), (count,)).copy())

        def real(values: np.ndarray, shape: tuple[int, ...]) -> Tensor:
            return torch.from_numpy(np.broadcast_to(np.asarray(values, dtype=np.float64), shape).copy()).to(dtype)

        rays = Rays(
            real(origin_m, (count, 3)),
            real(direction, (count, 3)),
            real(range_m, (count,)),
            per_ray(label),
            per_ray(time_index),
            per_ray(camera_index),
            per_ray(batch_index),
            None if axis_cosine is None else real(axis_cosine, (count,)),
        )
        rays.check()
        return rays

    def check(self) -> None:
        """Check values, which construction does not.

        Raises:
            GeometryError: see ``from_numpy``.
        """
        if not torch.isfinite(self.origin_m).all():
            raise GeometryError("rays: an origin is not finite; check the poses that it came from")
        length = self.direction.norm(dim=-1)
        wrong = ~((length - 1).abs() < _UNIT_TOLERANCE)
        if wrong.any():
            raise GeometryError(f"rays: a direction has length {length[wrong][0].item():.6g}; give unit vectors")
        wrong = ~(self.range_m > 0)
        if wrong.any():
            raise GeometryError(
                f"rays: a range is {self.range_m[wrong][0].item():g} m; give positive metres, or infinity for no return"
            )
        wrong = ~self.returned & (self.label != FREE)
        if wrong.any():
            raise GeometryError(
                f"rays: a ray without return has label {int(self.label[wrong][0])}; label it {FREE} (free)"
            )
        wrong = self.returned & ((self.label < 0) | (self.label >= FREE))
        if wrong.any():
            raise GeometryError(
                f"rays: a ray with return has label {int(self.label[wrong][0])}; something there has a class below {FREE}"
            )
