# SPDX-License-Identifier: Apache-2.0
"""Memory: bringing the previous frame's volume into the current ego frame."""

from __future__ import annotations

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
    centres, lower, upper = _plane(grid, state)
    rotation = previous_from_current[:, None, None, :2, :2].to(state.dtype)  # [B, 1, 1, 2, 2]
    translation = previous_from_current[:, None, None, :2, 3].to(state.dtype)  # [B, 1, 1, 2]
    there_m = (rotation * centres[:, :, None, :]).sum(-1) + translation  # [B, Y, X, 2]
    # GridSample counts from -1 at the box's lower edge to 1 at its upper one.
    normalised = (there_m - lower) * (2 / (upper - lower)) - 1
    return F.grid_sample(state, normalised, mode="bilinear", padding_mode="zeros", align_corners=False)


def _plane(grid: VoxelGrid, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cell centres [Y, X, 2] (x, y in metres), and the box's lower and upper corner [2]."""
    centres = torch.from_numpy(grid.centres()[:, :, 0, :2]).transpose(0, 1)
    corners = torch.tensor([grid.lower_m[:2], grid.upper_m[:2]])
    return centres.to(like), corners[0].to(like), corners[1].to(like)
