# SPDX-License-Identifier: Apache-2.0
"""A camera rig as a YAML file, for vehicles (and machines) that publish no extrinsics over tf."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

from occflownet_core import poses
from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import CalibrationError, GeometryError

_KEYS = ("width_px", "height_px", "intrinsic", "translation_m", "quaternion_xyzw")


def save_rig(
    rig: CameraRig,
    path: str | Path,
    comment: str = "",
    recorded_poses: Mapping[str, poses.RecordedPose] | None = None,
) -> None:
    """Write a rig so that ``load_rig`` reads the same numbers back (extrinsics to 1e-12).

    Args:
        rig: the cameras, extrinsics relative to ``base_link``.
        path: file to write.
        comment: one line for its head.
        recorded_poses: by camera name, extrinsics as recorded; these come back bit for bit.
    """
    recorded_poses = recorded_poses or {}
    cameras = {
        camera.name: {
            "width_px": camera.width_px,
            "height_px": camera.height_px,
            "intrinsic": camera.intrinsic.tolist(),
            **_pose_entries(camera, recorded_poses.get(camera.name)),
        }
        for camera in rig
    }
    head = "# Camera calibration: pinhole intrinsics in pixels, pose of each optical frame in base_link.\n"
    head += f"# {comment}\n" if comment else ""
    Path(path).write_text(head + yaml.safe_dump({"cameras": cameras}, sort_keys=False, default_flow_style=None))


def _pose_entries(camera: Camera, recorded: poses.RecordedPose | None) -> dict[str, list[float]]:
    if recorded is None:
        matrix = camera.ego_from_camera
        recorded = poses.RecordedPose(matrix[:3, 3], poses.quaternion_from_rotation(matrix))
    w, x, y, z = recorded.quaternion_wxyz
    return {"translation_m": list(recorded.translation_m), "quaternion_xyzw": [x, y, z, w]}


def load_rig(path: str | Path) -> CameraRig:
    """Read a rig that ``save_rig`` or a person wrote.

    Raises:
        CalibrationError: the file is missing, is not YAML of that form, or holds an impossible camera.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise CalibrationError(
            f"calibration file {path} cannot be read ({reason}); give a YAML file with 'cameras:'"
        ) from None
    cameras = content.get("cameras") if isinstance(content, dict) else None
    if not isinstance(cameras, dict) or not cameras:
        raise CalibrationError(f"calibration file {path} has no 'cameras:' table; list each camera under it by name")
    return CameraRig(tuple(_camera(str(name), entry, path) for name, entry in cameras.items()))


def _camera(name: str, entry: object, path: Path) -> Camera:
    missing = [key for key in _KEYS if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise CalibrationError(f"calibration file {path}: {name} lacks {', '.join(missing)}; add what is missing")
    try:
        return Camera(
            name,
            int(entry["width_px"]),
            int(entry["height_px"]),
            np.array(entry["intrinsic"], dtype=np.float64),
            poses.pose(np.array(entry["translation_m"], dtype=np.float64), np.roll(entry["quaternion_xyzw"], 1)),
        )
    except (GeometryError, CalibrationError, TypeError, ValueError) as error:
        raise CalibrationError(f"calibration file {path}: {name}: {error}") from None
