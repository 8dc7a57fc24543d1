# SPDX-License-Identifier: Apache-2.0
"""A log's images in one frame, and the field that explains them: a scene without LiDAR and without labels.

The field holds what stands still. Pixels that see into a box that moves are left out; without annotated boxes all
pixels are taken, and what moves makes them contradict each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from occflownet_core.boxes import MovingBoxes
from occflownet_core.labels import OCCUPIED_CLASSES
from occflownet_core.motion import StillWorld
from occflownet_core.photometric import PhotometricConfig, draw_pixels, photometric_losses
from occflownet_core.renderer import Rays
from occflownet_core.views import Views
from occflownet_core.voxel_field import VoxelField
from training.data.nuscenes import KeyframeIndex
from training.data.rays import SweepRays
from training.data.views import load_views
from training.scene import BOX_SCALE, Scene, grid_around, moving_objects, scene_keyframes, scene_rays, with_bays
from training.voxel_fitting import FitSettings, FittedVoxels, fit_lattice

RGB = 3
IMAGE_RECIPE = PhotometricConfig(matching_weight=1.0, color_weight=0.1)
"""What ``training/configs/minicity_tiny_photometric.yaml`` asks of images."""

PIXELS_PER_STEP = 4096


@dataclass(frozen=True, eq=False)
class ImageScene:
    """A log's images.

    Attributes:
        scene: its frame and grid; without rays, and nothing in it moves.
        views: all images, time index k + 1 for keyframe k, as in ``Scene``.
        moving: boxes of what moves, at those times.
    """

    scene: Scene
    views: Views
    moving: MovingBoxes


def load_image_scene(
    index: KeyframeIndex,
    name: str,
    width_px: int = 480,
    voxel_size_m: float = 0.4,
    sources: int = IMAGE_RECIPE.sources,
    on_keyframe: Callable[[], object] = lambda: None,
) -> ImageScene:
    """Read the images of one scene of a data root.

    Args:
        index, name, voxel_size_m, on_keyframe: as for ``scene.load_scene``.
        width_px: of the views; their height is in proportion to the first camera's.
        sources: how many other views a view is compared with.

    Raises:
        DatasetError: there is no such scene, or an image is missing or damaged.
    """
    keyframes, scene_from_global = scene_keyframes(index, name)
    camera = keyframes[0].cameras[0]
    width_px = min(width_px, camera.width_px)
    height_px = round(width_px * camera.height_px / camera.width_px)
    frames = {k + 1: (keyframe, scene_from_global @ keyframe.global_from_ego) for k, keyframe in enumerate(keyframes)}
    views = load_views(frames, width_px, height_px, sources, on_keyframe)
    static = grid_around(keyframes, scene_from_global, voxel_size_m)
    _, moving = with_bays(static, moving_objects(keyframes, scene_from_global))
    scene = Scene(keyframes, scene_from_global, static, Rays.empty(), MovingBoxes.empty(), static)
    return ImageScene(scene, views, moving)


def fit_to_images(
    images: ImageScene,
    settings: FitSettings,
    config: PhotometricConfig = IMAGE_RECIPE,
    on_step: Callable[[dict[str, Tensor]], object] = lambda terms: None,
) -> FittedVoxels:
    """Fit a field to a log's images; its logits are zero, since nothing says of which class anything is.

    Args:
        images: the log.
        settings: of the fit; a ray is a pixel's.
        config: terms and weights; of how many pixels, the settings say.
        on_step: called after each step with its terms.
    """
    grid = images.scene.grid
    still = StillWorld(images.moving, config.box_scale)

    def terms(field: VoxelField, done: float, generator: torch.Generator) -> dict[str, Tensor]:
        pixels = draw_pixels(images.views, settings.rays_per_step, still, grid, generator)
        colored = replace(field, logits_lattice=field.logits_lattice.sigmoid())
        return photometric_losses(colored, images.views, pixels, grid, config, generator=generator)

    fitted = fit_lattice(terms, RGB, grid, settings, on_step=on_step)
    x, y, z = grid.shape
    return replace(fitted, logits=torch.zeros(()).expand(1, OCCUPIED_CLASSES, z, y, x))


def still_lidar_rays(images: ImageScene) -> Rays:
    """LiDAR rays that meet nothing that moves, for a test of what was learned without them; none where there is no LiDAR."""
    scene = images.scene
    if any(keyframe.lidar is None for keyframe in scene.keyframes):
        return Rays.empty()
    rays = scene_rays(scene.keyframes, SweepRays("none"), scene.grid)
    return rays[StillWorld(images.moving, BOX_SCALE).keeps(rays, scene.grid)]
