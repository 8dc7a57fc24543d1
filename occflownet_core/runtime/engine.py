# SPDX-License-Identifier: Apache-2.0
"""The inference engine's protocol, and the factory that picks one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from occflownet_core.camera import CameraRig
from occflownet_core.runtime.bundle import Bundle


@dataclass(frozen=True)
class Prediction:
    """What one inference yields.

    Attributes:
        labels: uint8 [X, Y, Z] on the bundle's grid.
        probability: float [X, Y, Z], probability of being occupied, or None where the graph has no such output.
        velocity_mps: float [X, Y, Z, 3] in the ego frame, or None.
    """

    labels: np.ndarray
    probability: np.ndarray | None = None
    velocity_mps: np.ndarray | None = None


class Engine(Protocol):
    """Runs a bundle's graph and keeps its recurrent memory between calls.

    Used from one thread at a time. ``calibrate`` comes first and again whenever, and only when, a calibration changes.
    """

    bundle: Bundle
    name: str

    def calibrate(self, rig: CameraRig) -> None:
        """Build the calibration tables.

        Args:
            rig: the vehicle's cameras as their images arrive (before resizing), at least the bundle's by name or,
                if no name agrees, as many as the bundle has, in its order.

        Raises:
            CalibrationError: the number of cameras differs from the bundle's, or a camera cannot be used.
        """

    def infer(
        self,
        images: np.ndarray,
        previous_from_current: np.ndarray | None,
        missing_cameras: Collection[int] = (),
    ) -> Prediction:
        """Run the graph on one set of images and advance the memory.

        Args:
            images: uint8 RGB [N, H, W, 3] at the bundle's image size, in the bundle's camera order.
            previous_from_current: [4, 4], pose of the current ego frame in the ego frame of the previous call;
                None forgets the memory first (first frame, time jump, pose jump, no odometry).
            missing_cameras: indices whose images are absent (their content is ignored).

        Raises:
            EngineError: ``calibrate`` was not called, the images have another shape, or the backend failed.
        """

    def reset(self) -> None:
        """Forget the memory."""
