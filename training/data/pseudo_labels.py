# SPDX-License-Identifier: Apache-2.0
"""Rays from pseudo-label images: depth and class per pixel, as any segmentation and depth network writes them."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np

from occflownet_core import poses
from occflownet_core.errors import DatasetError
from occflownet_core.labels import FREE
from training.data.nuscenes import Keyframe, SensorFrame, read_bytes
from training.data.rays import UNLABELLED, FrameRays, sensor_origins


class PseudoLabelRays:
    """A ray per (``stride``-th) pixel of every camera.

    Depth images are 16-bit PNG (times ``depth_unit_m``; 0 = unknown) or NPZ with the array ``depth`` in metres (0 or
    NaN = unknown), along the camera's axis. Class images are 8-bit PNG or NPZ with the array ``label``, with Occ3D's
    classes; 17 (free) means sky, a ray without return; 255 means unknown. Both may have another size than the camera's
    image, of which they must show the same view.

    Args:
        root: folder that the templates start from.
        depth: path template, e.g. ``pseudo/{channel}/{stem}_depth.png``. Known fields: ``{scene}``, ``{token}`` (of the
            keyframe), ``{channel}``, ``{stem}`` (the image file's name without extension).
        label: path template of the class images.
        depth_unit_m: depth of one step of a PNG.
        stride: take every n-th row and column, starting at the middle of the first n.

    Raises:
        DatasetError: a template has an unknown field, or a number is not positive.
    """

    def __init__(
        self, root: str | Path, depth: str, label: str, depth_unit_m: float = 1 / 256, stride: int = 4
    ) -> None:
        if depth_unit_m <= 0 or stride < 1:
            raise DatasetError(f"depth_unit_m is {depth_unit_m} and stride {stride}; both must be positive")
        self.root, self.depth, self.label = Path(root), depth, label
        self.depth_unit_m, self.stride = depth_unit_m, stride
        for template in (depth, label):
            _fill(template, scene="", token="", channel="", stem="")

    def frame_rays(self, keyframe: Keyframe) -> FrameRays:
        """See ``RaySource``."""
        parts = [self._camera_rays(keyframe, camera) for camera in range(len(keyframe.cameras))]
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        return FrameRays(sensor_origins(keyframe), *columns)

    def _camera_rays(self, keyframe: Keyframe, camera: int) -> tuple[np.ndarray, ...]:
        frame = keyframe.cameras[camera]
        depth_m, label = self._read(keyframe, frame)
        height, width = depth_m.shape
        rows, columns = (
            np.arange(self.stride // 2, height, self.stride),
            np.arange(self.stride // 2, width, self.stride),
        )
        column, row = (grid.ravel() for grid in np.meshgrid(columns, rows))
        depth_m, label = depth_m[row, column].astype(np.float32), label[row, column]
        depth_m = np.where(label == FREE, np.inf, np.nan_to_num(depth_m, posinf=0.0))
        known = depth_m > 0
        column, row, depth_m, label = column[known], row[known], depth_m[known], label[known]

        scale = np.array([frame.width_px / width, frame.height_px / height])
        pixel = (np.stack([column, row], axis=1) + 0.5) * scale
        sight = np.concatenate([pixel, np.ones((len(pixel), 1))], axis=1) @ np.linalg.inv(frame.intrinsic).T
        length = np.linalg.norm(sight, axis=1)
        ego_from_camera = poses.inverse(keyframe.global_from_ego) @ frame.global_from_sensor
        direction = poses.rotate_vectors(ego_from_camera, sight / length[:, None])
        return (
            np.full(len(pixel), camera),
            direction.astype(np.float32),
            (depth_m * length).astype(np.float32),
            label,
            pixel.astype(np.float32),
            depth_m.astype(np.float32),
        )

    def _read(self, keyframe: Keyframe, frame: SensorFrame) -> tuple[np.ndarray, np.ndarray]:
        fields = {"scene": keyframe.scene, "token": keyframe.token, "channel": frame.channel, "stem": frame.path.stem}
        depth_path = self.root / _fill(self.depth, **fields)
        label_path = self.root / _fill(self.label, **fields)
        depth = _read_image(depth_path, "depth", keyframe)
        label = _read_image(label_path, "label", keyframe)
        if depth.shape != label.shape or depth.ndim != 2:
            raise DatasetError(
                f"{depth_path} has shape {depth.shape} and {label_path} {label.shape} (split '{keyframe.split}'); "
                "write both with one channel at the same size"
            )
        known = label[label != UNLABELLED]
        if not np.issubdtype(label.dtype, np.integer) or (known.size and (known.min() < 0 or known.max() > FREE)):
            raise DatasetError(
                f"{label_path} (split '{keyframe.split}') holds classes up to {known.max()} as {label.dtype}; "
                f"write Occ3D's classes 0..{FREE}, or {UNLABELLED} for unknown"
            )
        depth_m = depth * self.depth_unit_m if np.issubdtype(depth.dtype, np.integer) else depth
        if (depth_m < 0).any():
            raise DatasetError(f"{depth_path} (split '{keyframe.split}') holds negative depths; write 0 for unknown")
        return depth_m, label.astype(np.uint8)


def _fill(template: str, **fields: str) -> str:
    try:
        return template.format(**fields)
    except (KeyError, IndexError, ValueError):
        raise DatasetError(
            f"path template '{template}' cannot be filled in; it may hold {', '.join('{' + name + '}' for name in fields)}"
        ) from None


def _read_image(path: Path, array: str, keyframe: Keyframe) -> np.ndarray:
    data = read_bytes(path, f"pseudo-{array} image", keyframe)
    if path.suffix == ".npz":
        try:
            with np.load(io.BytesIO(data)) as content:
                return content[array]
        except Exception as error:  # zip, NumPy and key errors alike mean a damaged or foreign file
            raise DatasetError(
                f"{path} (split '{keyframe.split}') holds no readable array '{array}' ({error}); write it again"
            ) from None
    image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    if image is None:
        raise DatasetError(f"{path} (split '{keyframe.split}') does not decode as an image; write it again")
    return image
