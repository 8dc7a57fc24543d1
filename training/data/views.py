# SPDX-License-Identifier: Apache-2.0
"""The images of several keyframes as views of one frame, each with the views that see most of what it sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from occflownet_core.camera import CameraRig
from occflownet_core.camera_matrices import CameraMatrices
from occflownet_core.errors import DatasetError, ImageError
from occflownet_core.preprocess import ImageTransform
from occflownet_core.views import Views
from training.data.augment import ImageWarp
from training.data.nuscenes import Keyframe, read_bytes

_LEAST_BASELINE_M = 0.5
"""Views whose centres are nearer than this tell no depths from one another."""
_LEAST_SHARE = 0.05
_KEYFRAMES_APART = 2
_PROBE_DEPTHS_M = (5.0, 10.0, 20.0, 40.0)
_PROBE_COLUMNS, _PROBE_ROWS = np.linspace(0.05, 0.95, 9), np.linspace(0.4, 0.95, 5)  # shares of the image; above is sky


def load_image(keyframe: Keyframe, camera: int, transform: ImageTransform | ImageWarp) -> np.ndarray:
    """One camera's image as the network takes it, uint8 RGB [H, W, 3].

    Raises:
        DatasetError: the file is missing, cut short, or of another size than the tables say.
    """
    path = keyframe.cameras[camera].path
    try:
        return transform.jpeg(read_bytes(path, "image", keyframe))
    except ImageError as error:
        raise DatasetError(f"image {path} (split '{keyframe.split}'): {error}") from None


def load_views(
    frames: Mapping[int, tuple[Keyframe, np.ndarray]],
    width_px: int,
    height_px: int,
    sources: int,
    on_keyframe: Callable[[], object] = lambda: None,
) -> Views:
    """All images of the given keyframes, one batch.

    Args:
        frames: time index -> keyframe, and the pose [4, 4] of its ego frame in the frame that views are seen from (a
            reflection where that is mirrored).
        width_px, height_px: size of the views; images are resized and cut as for the network.
        sources: how many other views a view is compared with.
        on_keyframe: called after each.

    Raises:
        DatasetError: an image is missing, cut short, or of another size than the tables say.
    """
    images, projections, times, cameras = [], [], [], []
    for time, (keyframe, frame_from_ego) in sorted(frames.items()):
        rig = keyframe.rig()
        fits = [ImageTransform.fit(camera.width_px, camera.height_px, width_px, height_px) for camera in rig]
        images += [load_image(keyframe, c, fit) for c, fit in enumerate(fits)]
        seen = CameraRig(tuple(fit.camera(camera) for camera, fit in zip(rig, fits, strict=True)))
        matrices = CameraMatrices.of(seen).in_frame(np.linalg.inv(frame_from_ego))
        projections.append(matrices.image_from_ego[:, :3])
        times += [time] * len(rig)
        cameras += range(len(rig))
        on_keyframe()
    views = Views(
        torch.from_numpy(np.stack(images)),
        torch.from_numpy(np.concatenate(projections)),
        torch.tensor(times),
        torch.tensor(cameras),
        torch.zeros(len(times), dtype=torch.int64),
        torch.full((len(times), sources), -1),
    )
    return replace(views, sources=source_views(views, sources))


def source_views(views: Views, sources: int) -> torch.Tensor:
    """Which views to compare each view with: those that see the largest share of what it sees at 5 to 40 m.

    Args:
        views: all images; the sources that they have are not read.
        sources: number of them.

    Returns:
        int64 [V, sources], the best first; -1 where there is none at least half a metre and at most two
        keyframes away that sees 5 % of it.
    """
    height_px, width_px = views.images.shape[1:3]
    image_from_ego, time_index = views.image_from_ego.numpy(), views.time_index.numpy()
    inverse, centre_m = views.ego_from_pixel.numpy(), views.centre_m.numpy()
    u, v = np.meshgrid(_PROBE_COLUMNS * width_px, _PROBE_ROWS * height_px)
    pixel = np.stack([u.ravel(), v.ravel(), np.ones(u.size)], axis=1)
    share = np.zeros((len(views), len(views)))
    for i in range(len(views)):
        ahead_m = np.concatenate([depth_m * (pixel @ inverse[i].T) for depth_m in _PROBE_DEPTHS_M])
        at = (centre_m[i] + ahead_m) @ image_from_ego[:, :, :3].transpose(0, 2, 1) + image_from_ego[:, None, :, 3]
        at_px = at[..., :2] / np.maximum(at[..., 2:], 1e-3)
        share[i] = ((at[..., 2] > 0) & (at_px >= 0).all(-1) & (at_px < (width_px, height_px)).all(-1)).mean(axis=1)
        apart = np.linalg.norm(centre_m - centre_m[i], axis=1) >= _LEAST_BASELINE_M
        share[i] *= apart & (np.abs(time_index - time_index[i]) <= _KEYFRAMES_APART)
    best = np.argsort(-share, axis=1, kind="stable")[:, :sources]
    found = np.where(np.take_along_axis(share, best, axis=1) >= _LEAST_SHARE, best, -1)
    return torch.from_numpy(np.pad(found, ((0, 0), (0, sources - found.shape[1])), constant_values=-1))
