# SPDX-License-Identifier: Apache-2.0
"""A rig as plain matrices between its images and the ego frame, for the parts of a graph that know the cameras.

A mirrored image or a mirrored world has no ``Camera``, but it has matrices like any other: what augments training
only multiplies them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from occflownet_core import poses
from occflownet_core.camera import CameraRig

PARAMETERS = 17
"""Numbers that say all of a camera: five intrinsic ones in image widths, twelve of its pose in metres."""


@dataclass(frozen=True, eq=False)
class CameraTables:
    """What a graph is told about the cameras, N of them.

    Image coordinates are (u d, v d, d, 1): continuous pixels times depth, depth (as the network counts it), and 1.

    Attributes:
        image_from_ego: [N, 4, 4] float32; all zero for a camera whose image is missing.
        ego_from_image: [N, 4, 4] float32.
        camera_parameters: [N, 17] float32.
    """

    image_from_ego: np.ndarray
    ego_from_image: np.ndarray
    camera_parameters: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """By the names of the graph's inputs."""
        return dict(vars(self))

    def without(self, cameras: Collection[int]) -> CameraTables:
        """The tables when images of the given camera indices are missing: the next frame must not match theirs."""
        image_from_ego = self.image_from_ego.copy()
        image_from_ego[list(cameras)] = 0
        return replace(self, image_from_ego=image_from_ego)


@dataclass(frozen=True, eq=False)
class CameraMatrices:
    """The cameras of the network's images.

    Attributes:
        image_from_camera: [N, 4, 4] float64, image coordinates as in ``CameraTables``.
        camera_from_ego: [N, 4, 4] float64.
        width_px: of the images.
    """

    image_from_camera: np.ndarray
    camera_from_ego: np.ndarray
    width_px: int

    @classmethod
    def of(cls, rig: CameraRig, reference_focal_px: float | None = None) -> CameraMatrices:
        """The matrices of a rig whose images all have one width.

        Args:
            rig: cameras of the images that the network sees.
            reference_focal_px: see ``LiftSpec``.
        """
        image_from_camera = np.tile(np.eye(4), (len(rig), 1, 1))
        for matrix, camera in zip(image_from_camera, rig, strict=True):
            network_depth = reference_focal_px / camera.intrinsic[0, 0] if reference_focal_px else 1.0
            matrix[:3, :3] = network_depth * camera.intrinsic
        camera_from_ego = np.stack([poses.inverse(camera.ego_from_camera) for camera in rig])
        return cls(image_from_camera, camera_from_ego, rig[0].width_px)

    def mirrored(self, which: Sequence[bool]) -> CameraMatrices:
        """The same with left and right exchanged in the images of the cameras ``which`` [N]."""
        mirror = np.eye(4)
        mirror[0, [0, 2]] = -1, self.width_px
        turned = np.where(np.asarray(which)[:, None, None], mirror @ self.image_from_camera, self.image_from_camera)
        return replace(self, image_from_camera=turned)

    def in_frame(self, ego_from_other: np.ndarray) -> CameraMatrices:
        """The same seen from another frame [4, 4], be it a reflection."""
        return replace(self, camera_from_ego=self.camera_from_ego @ ego_from_other)

    @property
    def image_from_ego(self) -> np.ndarray:
        """[N, 4, 4] float64."""
        return self.image_from_camera @ self.camera_from_ego

    @property
    def ego_from_image(self) -> np.ndarray:
        """[N, 4, 4] float64."""
        return np.linalg.inv(self.image_from_ego)

    def tables(self) -> CameraTables:
        """What a graph is told."""
        intrinsic = self.image_from_camera[:, :3, :3] / self.image_from_camera[:, 2:3, 2:3]
        known = intrinsic[:, [0, 0, 0, 1, 1], [0, 1, 2, 1, 2]] / self.width_px  # [N, 5]
        pose = np.linalg.inv(self.camera_from_ego)[:, :3].reshape(-1, 12)
        return CameraTables(
            self.image_from_ego.astype(np.float32),
            self.ego_from_image.astype(np.float32),
            np.concatenate([known, pose], axis=1).astype(np.float32),
        )
