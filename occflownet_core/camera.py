# SPDX-License-Identifier: Apache-2.0
"""Camera and CameraRig: pinhole intrinsics and extrinsics; projecting, unprojecting, resizing and cropping them.

Pixel coordinates are continuous: (0, 0) is the outer corner of the image's first pixel, pixel (i, j) covers
[i, i + 1) x [j, j + 1), and the image covers [0, width) x [0, height). Resizing therefore only scales them and
cropping only shifts them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from occflownet_core import poses
from occflownet_core.errors import CalibrationError


@dataclass(frozen=True, eq=False)
class Camera:
    """A rectified pinhole camera: x right, y down, z forward in its own frame (ROS optical frame).

    Attributes:
        name: channel, e.g. ``CAM_FRONT``.
        width_px, height_px: image size that the intrinsics belong to.
        intrinsic: [3, 3] float64, pixels.
        ego_from_camera: [4, 4] float64, the camera's pose in the ego frame.

    Raises:
        CalibrationError: a focal length is not positive and finite, the matrix is not upper triangular with 1 in its
            corner, or the size is not positive.
        GeometryError: the extrinsic is not rigid.
    """

    name: str
    width_px: int
    height_px: int
    intrinsic: np.ndarray
    ego_from_camera: np.ndarray

    def __post_init__(self) -> None:
        k = np.asarray(self.intrinsic, dtype=np.float64)
        if k.shape != (3, 3):
            raise CalibrationError(f"{self.name}: the intrinsic matrix has shape {k.shape}; give 3 x 3")
        if np.isfinite(np.diag(k)).all() and not np.isfinite(k).all():
            raise CalibrationError(
                f"{self.name}: the intrinsic matrix {k.tolist()} has a value that is not finite: calibrate the camera"
            )
        if not np.isfinite(k).all() or k[0, 0] <= 0 or k[1, 1] <= 0:
            raise CalibrationError(
                f"{self.name}: focal lengths are fx = {k[0, 0]:g}, fy = {k[1, 1]:g} px; "
                "both must be positive: calibrate the camera and publish its camera_info"
            )
        if np.abs(k[[1, 2, 2], [0, 0, 1]]).max() > 1e-6 or abs(k[2, 2] - 1) > 1e-6:
            raise CalibrationError(
                f"{self.name}: the intrinsic matrix {k.tolist()} is not [[fx, s, cx], [0, fy, cy], [0, 0, 1]]"
            )
        if self.width_px <= 0 or self.height_px <= 0:
            raise CalibrationError(
                f"{self.name}: image size is {self.width_px} x {self.height_px}; both must be positive"
            )
        object.__setattr__(self, "intrinsic", k)
        object.__setattr__(
            self, "ego_from_camera", poses.require_rigid(self.ego_from_camera, f"{self.name}: ego_from_camera")
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Camera) and (
            (self.name, self.width_px, self.height_px) == (other.name, other.width_px, other.height_px)
            and np.array_equal(self.intrinsic, other.intrinsic)
            and np.array_equal(self.ego_from_camera, other.ego_from_camera)
        )

    def project(self, points_ego_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where points of the ego frame appear.

        Args:
            points_ego_m: [..., 3].

        Returns:
            pixels [..., 2] continuous (u, v), depth_m [...] along the optical axis. Pixels mean something only where
            depth is positive; points in the camera's plane get infinite or NaN pixels.
        """
        in_camera = poses.transform_points(poses.inverse(self.ego_from_camera), points_ego_m)
        depth_m = in_camera[..., 2]
        homogeneous = in_camera @ self.intrinsic.T
        with np.errstate(divide="ignore", invalid="ignore"):
            return homogeneous[..., :2] / depth_m[..., None], depth_m

    def unproject(self, pixels: np.ndarray, depth_m: np.ndarray) -> np.ndarray:
        """Points [..., 3] in the ego frame at continuous pixels [..., 2] and depth [...] along the optical axis."""
        pixels = np.asarray(pixels, dtype=np.float64)
        homogeneous = np.concatenate([pixels, np.ones_like(pixels[..., :1])], axis=-1)
        in_camera = homogeneous @ np.linalg.inv(self.intrinsic).T * np.asarray(depth_m)[..., None]
        return poses.transform_points(self.ego_from_camera, in_camera)

    def sees(self, pixels: np.ndarray, depth_m: np.ndarray) -> np.ndarray:
        """True [...] where projected pixels [..., 2] at depth [...] are in front of the camera and inside the image."""
        u, v = pixels[..., 0], pixels[..., 1]
        return (depth_m > 0) & (u >= 0) & (u < self.width_px) & (v >= 0) & (v < self.height_px)

    def resized(self, width_px: int, height_px: int) -> Camera:
        """The camera after its image was resized to the given size."""
        scale = np.diag([width_px / self.width_px, height_px / self.height_px, 1.0])
        return replace(self, width_px=width_px, height_px=height_px, intrinsic=scale @ self.intrinsic)

    def cropped(self, left_px: int, top_px: int, width_px: int, height_px: int) -> Camera:
        """The camera after the given window was cut out of its image (a window may reach outside: padding)."""
        intrinsic = self.intrinsic.copy()
        intrinsic[:2, 2] -= (left_px, top_px)
        return replace(self, width_px=width_px, height_px=height_px, intrinsic=intrinsic)


@dataclass(frozen=True)
class CameraRig:
    """The cameras of one vehicle, in the order in which the network sees them.

    Raises:
        CalibrationError: the rig is empty or two cameras share a name.
    """

    cameras: tuple[Camera, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "cameras", tuple(self.cameras))
        if not self.cameras:
            raise CalibrationError("a camera rig needs at least one camera; none was given")
        if len(set(self.names)) != len(self.cameras):
            raise CalibrationError(f"two cameras share a name in {', '.join(self.names)}; give each its own")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(camera.name for camera in self.cameras)

    def __len__(self) -> int:
        return len(self.cameras)

    def __iter__(self) -> Iterator[Camera]:
        return iter(self.cameras)

    def __getitem__(self, index: int) -> Camera:
        return self.cameras[index]

    def ordered(self, names: Iterable[str]) -> CameraRig:
        """The cameras of the given names, in that order.

        Raises:
            CalibrationError: a name is not in the rig.
        """
        by_name = {camera.name: camera for camera in self.cameras}
        names = tuple(names)
        missing = [name for name in names if name not in by_name]
        if missing:
            raise CalibrationError(f"no calibration for {', '.join(missing)}; the rig has {', '.join(self.names)}")
        return CameraRig(tuple(by_name[name] for name in names))
