# SPDX-License-Identifier: Apache-2.0
"""Small fields with boxes in them, and what rays see of them through a motion."""

import numpy as np
import torch

from occflownet_core.boxes import MovingBoxes
from occflownet_core.grid import VoxelGrid
from occflownet_core.motion import BoxFlow
from occflownet_core.renderer import Rays, RenderConfig, render
from occflownet_core.voxel_field import VoxelField

GRID = VoxelGrid((-4, -4, -1), (4, 4, 1), 0.5)
EXACT = RenderConfig(min_transmittance=0.0, min_weight=0.0)
ABSENT = np.full((4, 4), np.nan)
CAR, ROAD, WALL = 4, 11, 15


def boxes(*rows, time: int = 1) -> MovingBoxes:
    """Rows of (pose now, pose then, size) and perhaps a label."""
    return MovingBoxes.from_numpy(
        np.array([r[0] for r in rows]),
        np.array([r[1] for r in rows]),
        np.array([r[2] for r in rows]),
        np.array([r[3] if len(r) > 3 else CAR for r in rows]),
        np.full(len(rows), time),
    )


def empty_field() -> tuple[torch.Tensor, torch.Tensor]:
    shape = GRID.shape[::-1]
    return torch.zeros(1, *shape).double(), torch.zeros(1, 17, *shape).double()


def put(field, lower, upper, density, label):
    """Fill the cells whose centres lie between two corners."""
    centres = GRID.centres().transpose(2, 1, 0, 3)
    chosen = torch.tensor(((centres > lower) & (centres < upper)).all(axis=-1))
    field[0][0, chosen] = density
    field[1][0, :, chosen] = 0.0
    field[1][0, label, chosen] = 5.0


def one_ray(origin, direction, time=1, **kwargs) -> Rays:
    return Rays.from_numpy([origin], [direction], [1.0], [CAR], time_index=time, dtype=torch.float64, **kwargs)


def seen_along(field, rays, motion, config=EXACT):
    return render(VoxelField(*field, GRID), rays, GRID, motion, config)


def content_by_loops(flow_boxes: MovingBoxes, scale: float, point: np.ndarray, time: int):
    """METHOD section 4's sentence, word by word; None is empty. Where boxes overlap the smaller one wins."""

    def holds(pose, size):
        local = np.linalg.inv(pose) @ np.append(point, 1)
        return (np.abs(local[:3]) <= scale * size / 2).all()

    order = np.argsort([float(s.prod()) for s in flow_boxes.size_m], kind="stable")
    rows = [i for i in order if int(flow_boxes.time_index[i]) == time]
    for i in rows:
        now, then = flow_boxes.ego_from_box_now[i].numpy(), flow_boxes.ego_from_box_then[i].numpy()
        if np.isfinite(now).all() and np.isfinite(then).all() and holds(then, flow_boxes.size_m[i].numpy()):
            return (now @ np.linalg.inv(then) @ np.append(point, 1))[:3]
    for i in rows:
        now = flow_boxes.ego_from_box_now[i].numpy()
        if np.isfinite(now).all() and holds(now, flow_boxes.size_m[i].numpy()):
            return None
    return point


def moved_scene(now: np.ndarray, then: np.ndarray, size=(2.0, 1.0, 1.0)):
    """A random object in a random world: the field now; and the field at t, its content placed there by brute force."""
    generator = torch.Generator().manual_seed(0)
    shape = GRID.shape[::-1]
    field = (
        torch.rand((1, *shape), generator=generator, dtype=torch.float64) * 2,
        torch.randn((1, 17, *shape), generator=generator, dtype=torch.float64),
    )
    placed = (field[0].clone(), field[1].clone())
    there = boxes((now, then, size))
    for index in np.ndindex(GRID.shape):
        x, y, z = index
        source = content_by_loops(there, 1.0, GRID.centres()[index], 1)
        if source is None:
            placed[0][0, z, y, x] = 0
            continue
        (i, j, k), inside = GRID.cells(source)
        placed[0][0, z, y, x] = field[0][0, k, j, i] if inside else 0
        placed[1][0, :, z, y, x] = field[1][0, :, k, j, i] if inside else 0
    return field, placed, BoxFlow(there, scale=1.0)
