# SPDX-License-Identifier: Apache-2.0
"""Pictures of a training run for TensorBoard: rendered depth and classes beside the images, voxels from above."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from occflownet_core.camera import CameraRig
from occflownet_core.field import occupancy_probability
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import COLORS_RGB, FREE
from occflownet_core.model import ModelOutput
from occflownet_core.picture import draw_voxels, side_by_side, stacked, titled, view_from_above
from occflownet_core.renderer import Rays, RenderConfig, render

_PIXELS_PER_RAY = 4
_FAR_M = 45.0


class Pictures(Callback):
    """Adds pictures of the first validation sample to TensorBoard.

    Args:
        rig: cameras of the network's images for a keyframe token.
        every_steps: least number of steps between pictures; 0 for none.
    """

    def __init__(self, rig_of: Any, every_steps: int) -> None:
        self.rig_of, self.every_steps = rig_of, every_steps
        self._latest: int | None = None

    @torch.no_grad()
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch: Any, batch_idx: int, dataloader_idx: int = 0):
        due = self._latest is None or trainer.global_step >= self._latest + self.every_steps
        if batch_idx or trainer.sanity_checking or not (self.every_steps and due and trainer.is_global_zero):
            return
        self._latest = trainer.global_step
        output, now = pl_module(batch), batch[-1]
        config, threshold = pl_module.config, pl_module.threshold
        board = trainer.logger.experiment
        for name, picture in {
            "cameras: image, rendered depth, rendered class": camera_picture(
                output, now.images[0].cpu().numpy(), self.rig_of(now.tokens[0]), config.model.grid, config.rendering
            ),
            "voxels: predicted, truth": voxel_picture(
                output, now.labels[0].cpu().numpy(), config.model.grid, threshold
            ),
        }.items():
            board.add_image(name, picture, trainer.global_step, dataformats="HWC")


def camera_picture(
    output: ModelOutput, images: np.ndarray, rig: CameraRig, grid: VoxelGrid, config: RenderConfig
) -> np.ndarray:
    """Every camera's image with the depth and the class that its pixels see in the field of sample 0.

    Args:
        output: of the network.
        images: uint8 [N, H, W, 3].
        rig: their cameras.
        grid: cells to render.
        config: how.

    Returns:
        uint8 RGB: one row per camera.
    """
    rows = []
    for image, camera in zip(images, rig, strict=True):
        height, width = image.shape[0] // _PIXELS_PER_RAY, image.shape[1] // _PIXELS_PER_RAY
        rays = pixel_rays(camera, width, height).to(output.field.features.device)
        rendered = render(output.field, rays, grid, None, config)
        seen = (rendered.opacity > 0.5).view(height, width).cpu().numpy()
        depth = rendered.range_m.view(height, width).cpu().float().numpy()
        label = np.where(seen, rendered.logits.argmax(dim=1).view(height, width).cpu().numpy(), FREE)
        shaded = (matplotlib.colormaps["turbo"](1 - np.clip(depth / _FAR_M, 0, 1))[..., :3] * 255).astype(np.uint8)
        tiles = [shaded * seen[..., None].astype(np.uint8), COLORS_RGB[label]]
        rows.append(side_by_side([image, *(_enlarged(tile) for tile in tiles)], gap_px=4))
    return stacked(rows, gap_px=4)


def pixel_rays(camera, width: int, height: int) -> Rays:
    """Rays through the centres of equal blocks of pixels, row by row; what they meet is left open."""
    u = (np.arange(width) + 0.5) * camera.width_px / width
    v = (np.arange(height) + 0.5) * camera.height_px / height
    pixels = np.stack(np.meshgrid(u, v), axis=-1).reshape(-1, 2)
    direction = camera.unproject(pixels, np.ones(len(pixels))) - camera.ego_from_camera[:3, 3]
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    count = len(direction)
    return Rays.from_numpy(
        np.broadcast_to(camera.ego_from_camera[:3, 3], (count, 3)),
        direction,
        np.full(count, np.inf),
        np.full(count, FREE),
    )


def voxel_picture(output: ModelOutput, truth: np.ndarray, grid: VoxelGrid, threshold: float) -> np.ndarray:
    """Predicted voxels of sample 0 and the true ones, from above; uint8 RGB.

    Args:
        output: of the network.
        truth: uint8 [X, Y, Z].
        grid: of the labels.
        threshold: probability above which a voxel is occupied.
    """
    density, logits = output.field.lattice(grid)
    occupied = occupancy_probability(density[0], grid.voxel_size_m) > threshold
    labels = torch.where(occupied, logits[0].argmax(dim=0), FREE).permute(2, 1, 0).to(torch.uint8).cpu().numpy()
    view = view_from_above(grid, 480, 480)
    return side_by_side(
        [titled(draw_voxels(volume, grid, view), name) for name, volume in (("predicted", labels), ("truth", truth))]
    )


def _enlarged(tile: np.ndarray) -> np.ndarray:
    return tile.repeat(_PIXELS_PER_RAY, axis=0).repeat(_PIXELS_PER_RAY, axis=1)
