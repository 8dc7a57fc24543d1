# SPDX-License-Identifier: Apache-2.0
"""Memory: bringing the previous frame's volume into the current ego frame."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from occflownet_core.grid import VoxelGrid


def warp_planar(state: torch.Tensor, previous_from_current: torch.Tensor, grid: VoxelGrid) -> torch.Tensor:
    """The previous volume as seen from the current ego frame; what was outside of it is zero.

    Ego motion is taken as planar (its z, roll and pitch are dropped): between two frames a vehicle's heave is far
    below a voxel, and a 2D GridSample runs natively on every inference runtime where a 3D one does not.

    Args:
        state: [B, C, Y, X], heights folded into the channels.
        previous_from_current: [B, 4, 4], pose of the current ego frame in the previous one.
        grid: the volume's grid.

    Returns:
        [B, C, Y, X].
    """
    # Half precision would misplace cells at the far end of the volume.
    dtype = torch.promote_types(state.dtype, torch.float32)
    centres_m, lower_m, upper_m = (t.to(state.device, dtype) for t in _plane(grid))
    motion = previous_from_current[:, None, None].to(dtype)  # [B, 1, 1, 4, 4]
    there_m = (motion[..., :2, :2] * centres_m[:, :, None, :]).sum(-1) + motion[..., :2, 3]  # [B, Y, X, 2]
    # GridSample counts from -1 at the box's lower edge to 1 at its upper one.
    normalised = (there_m - lower_m) * (2 / (upper_m - lower_m)) - 1
    warped = F.grid_sample(state.to(dtype), normalised, mode="bilinear", padding_mode="zeros", align_corners=False)
    return warped.to(state.dtype)


def _plane(grid: VoxelGrid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cell centres [Y, X, 2] (x, y in metres), and the box's lower and upper corner [2]."""
    # float32 from the start: a graph must hold no float64, which TensorRT lacks.
    centres_m = grid.centres()[:, :, 0, :2].transpose(1, 0, 2).astype(np.float32, order="C")
    return torch.from_numpy(centres_m), torch.tensor(grid.lower_m[:2]), torch.tensor(grid.upper_m[:2])
