# SPDX-License-Identifier: Apache-2.0
"""A recorded drive as an engine takes it: frame after frame, the memory carried along."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from occflownet_core.camera import CameraRig
from occflownet_core.runtime.engine import Engine, Prediction


@dataclass(frozen=True, eq=False)
class EngineInput:
    """One frame as an engine takes it.

    Attributes:
        name: of the frame, for people.
        images: uint8 RGB [N, H, W, 3] at the bundle's size, in the bundle's order.
        previous_from_current: [4, 4], or None where the memory begins anew.
        rig: the cameras, before resizing.
        truth: uint8 [X, Y, Z] labels, or None.
        camera_mask: bool [X, Y, Z] of voxels that count, or None.
    """

    name: str
    images: np.ndarray
    previous_from_current: np.ndarray | None
    rig: CameraRig
    truth: np.ndarray | None = None
    camera_mask: np.ndarray | None = None


def predictions(engine: Engine, frames: Iterable[EngineInput]) -> Iterator[tuple[EngineInput, Prediction]]:
    """What an engine says of each frame, calibrated anew wherever the rig changes.

    Args:
        engine: whose memory begins as it is.
        frames: in order of time.

    Raises:
        EngineError, CalibrationError: the engine refuses a frame or its rig.
    """
    calibrated = None
    for frame in frames:
        if frame.rig is not calibrated:
            engine.calibrate(frame.rig)
            calibrated = frame.rig
        yield frame, engine.infer(frame.images, frame.previous_from_current)
