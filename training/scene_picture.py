# SPDX-License-Identifier: Apache-2.0
"""A fitted scene beside the photographs of a keyframe: what each camera sees in the field, and the voxels around the car."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch

from occflownet_core import poses
from occflownet_core.errors import DatasetError, ImageError
from occflownet_core.grid import OCC3D_GRID
from occflownet_core.labels import COLORS_RGB, FREE
from occflownet_core.picture import draw_voxels, legend, mosaic, side_by_side, stacked, titled, view_from_behind
from occflownet_core.preprocess import decoded
from occflownet_core.renderer import Rays
from training.data.nuscenes import Keyframe, read_bytes
from training.pictures import pixel_rays
from training.scene import KeyframeLabels, Scene, predicted_range_m
from training.voxel_fitting import FittedVoxels

_RAYS_ACROSS = 200
_FAR_M = 50.0
_MOSAIC_PX = 900


def scene_picture(
    scene: Scene, fitted: FittedVoxels, k: int, found: KeyframeLabels, threshold: float, with_classes: bool
) -> np.ndarray:
    """Photographs, ranges that the field shows to the same cameras, and voxels; uint8 RGB.

    Args:
        scene, fitted: field and frame.
        k: keyframe.
        found: its labels.
        threshold: probability above which a voxel is drawn.
        with_classes: whether voxels are coloured by class; otherwise by height.

    Raises:
        DatasetError: a photograph is missing or damaged.
    """
    keyframe = scene.keyframes[k]
    photographs = {camera.channel: _photograph(camera.path, keyframe) for camera in keyframe.cameras}
    ranges = range_images(scene, fitted, k)
    left = titled(mosaic(photographs, _MOSAIC_PX), "cameras")
    right = titled(
        mosaic({name: shaded(range_m) for name, range_m in ranges.items()}, _MOSAIC_PX),
        "range to where the field is opaque",
        f"red near, blue {_FAR_M:g} m, white: nothing",
    )
    voxels = voxels_by_class(found, threshold) if with_classes else voxels_by_height(found, threshold)
    return stacked([side_by_side([left, right]), voxels])


def range_images(scene: Scene, fitted: FittedVoxels, k: int) -> dict[str, np.ndarray]:
    """Camera -> predicted range [h, w], metres, of 200 rays across and as many down as make them square; infinite where nothing is met."""
    keyframe: Keyframe = scene.keyframes[k]
    scene_from_ego = scene.scene_from_global @ keyframe.global_from_ego
    images = {}
    for camera in keyframe.rig():
        width, height = _RAYS_ACROSS, round(_RAYS_ACROSS * camera.height_px / camera.width_px)
        rays = _moved(pixel_rays(camera, width, height), scene_from_ego, k + 1)
        images[camera.name] = predicted_range_m(scene, fitted, rays).reshape(height, width)
    return images


def _moved(rays: Rays, scene_from_ego: np.ndarray, time_index: int) -> Rays:
    """Rays of an ego frame, in the scene's."""
    return replace(
        rays,
        origin_m=torch.from_numpy(poses.transform_points(scene_from_ego, rays.origin_m.numpy())).float(),
        direction=torch.from_numpy(poses.rotate_vectors(scene_from_ego, rays.direction.numpy())).float(),
        time_index=torch.full_like(rays.time_index, time_index),
    )


def _photograph(path: Path, keyframe: Keyframe) -> np.ndarray:
    try:
        bgr = decoded(np.frombuffer(read_bytes(path, "image", keyframe), np.uint8), cv2.IMREAD_REDUCED_COLOR_2)
    except ImageError as error:
        raise DatasetError(f"image {path} (split '{keyframe.split}'): {error}") from None
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def shaded(range_m: np.ndarray) -> np.ndarray:
    """uint8 RGB [h, w, 3] of ranges."""
    colour = matplotlib.colormaps["turbo"](1 - np.clip(range_m / _FAR_M, 0, 1))[..., :3]
    small = np.where(np.isfinite(range_m)[..., None], 255 * colour, 255).astype(np.uint8)
    return cv2.resize(small, None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST)


def voxels_by_class(found: KeyframeLabels, threshold: float) -> np.ndarray:
    labels = found.labels_at(threshold)
    view = view_from_behind(OCC3D_GRID, 2 * _MOSAIC_PX, 700)
    return stacked([titled(draw_voxels(labels, OCC3D_GRID, view), "voxels"), legend(labels, 2 * _MOSAIC_PX, columns=6)])


def voxels_by_height(found: KeyframeLabels, threshold: float) -> np.ndarray:
    layers = OCC3D_GRID.shape[2]
    layer = np.broadcast_to(np.arange(layers, dtype=np.uint8), OCC3D_GRID.shape)
    colors = COLORS_RGB.copy()
    colors[:layers] = 255 * matplotlib.colormaps["viridis"](np.linspace(0.05, 1, layers))[:, :3]
    volume = np.where(found.probability > threshold, layer, FREE).astype(np.uint8)
    view = view_from_behind(OCC3D_GRID, 2 * _MOSAIC_PX, 700)
    return titled(draw_voxels(volume, OCC3D_GRID, view, colors), "voxels", "coloured by height, -1.0 to 5.4 m")
