# SPDX-License-Identifier: Apache-2.0
"""Writing the tables of a data set in the nuScenes format: rows that are linked to each other as they are added.

    tables = NuscenesTables()
    tables.add_scene(...)
    tables.add_samples(...)
    tables.add_measurement(...)  # one row of sample_data and one of ego_pose
    tables.write(root, "v1.0-mini")

The thirteen tables of nuScenes (https://www.nuscenes.org/nuscenes, "Data format") are always written; ``lidarseg`` and
``panoptic`` where they have rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Sequence
from pathlib import Path

import cv2
import numpy as np

from occflownet_core.labels import LIDARSEG_NAMES

TABLES = (
    *("category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose"),
    *("log", "scene", "sample", "sample_data", "sample_annotation", "map"),
)
LABEL_TABLES = {"lidarseg": "bin", "panoptic": "npz"}
"""Optional tables of labels per LiDAR point, and the suffix of their files."""

ATTRIBUTES = {
    "vehicle.moving": "Vehicle is moving.",
    "vehicle.stopped": "Vehicle is standing in traffic.",
    "vehicle.parked": "Vehicle is parked.",
    "cycle.with_rider": "There is a rider on the bicycle or motorcycle.",
    "cycle.without_rider": "There is no rider on the bicycle or motorcycle.",
    "pedestrian.sitting_lying_down": "The person is sitting or lying down.",
    "pedestrian.standing": "The person is standing.",
    "pedestrian.moving": "The person is moving.",
}
VISIBILITIES = {"1": (0, 40), "2": (40, 60), "3": (60, 80), "4": (80, 100)}


def stable_token(*parts: object) -> str:
    """A nuScenes token (32 hexadecimal digits) that depends on its parts alone."""
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def point_labels_file(table: str, measurement_token: str, version: str) -> str:
    """Where the labels of a sweep's points (``lidarseg`` or ``panoptic``) belong in a data root."""
    return f"{table}/{version}/{measurement_token}_{table}.{LABEL_TABLES[table]}"


class NuscenesTables:
    """All tables of a data root, in the making.

    Args:
        namespace: what the tokens of the fixed rows (categories, attributes) begin with.

    Attributes:
        rows: rows by table.
    """

    def __init__(self, namespace: str) -> None:
        self.rows: dict[str, list[dict]] = {name: [] for name in (*TABLES, *LABEL_TABLES)}
        self._previous: dict[Hashable, dict] = {}
        self.rows["category"] = [
            {"token": stable_token(namespace, "category", name), "name": name, "description": "", "index": index}
            for index, name in enumerate(LIDARSEG_NAMES)
        ]
        self.rows["attribute"] = [
            {"token": stable_token(namespace, "attribute", name), "name": name, "description": text}
            for name, text in ATTRIBUTES.items()
        ]
        self.rows["visibility"] = [
            {"token": token, "level": f"v{a}-{b}", "description": f"visibility of whole object is between {a} and {b}%"}
            for token, (a, b) in VISIBILITIES.items()
        ]

    def add_log(self, token: str, name: str, vehicle: str, date: str, location: str) -> None:
        """One drive; ``date`` is YYYY-MM-DD."""
        row = {"token": token, "logfile": name, "vehicle": vehicle, "date_captured": date, "location": location}
        self.rows["log"].append(row)

    def add_map(self, token: str, filename: str) -> None:
        """A map image for all logs so far; nuscenes-devkit opens no root without one (see ``write_blank_map``)."""
        logs = [log["token"] for log in self.rows["log"]]
        self.rows["map"].append(
            {"token": token, "category": "semantic_prior", "filename": filename, "log_tokens": logs}
        )

    def add_sensor(self, token: str, channel: str, modality: str) -> None:
        """``modality`` is ``camera`` or ``lidar``."""
        self.rows["sensor"].append({"token": token, "channel": channel, "modality": modality})

    def add_calibrated_sensor(
        self,
        token: str,
        sensor_token: str,
        translation_m: Sequence[float],
        quaternion_wxyz: Sequence[float],
        intrinsic: np.ndarray | None = None,
    ) -> None:
        """A sensor's pose in the ego frame and, of a camera, its matrix [3, 3] in pixels."""
        self.rows["calibrated_sensor"].append(
            {
                "token": token,
                "sensor_token": sensor_token,
                "translation": list(translation_m),
                "rotation": list(quaternion_wxyz),
                "camera_intrinsic": [] if intrinsic is None else intrinsic.tolist(),
            }
        )

    def add_scene(
        self, token: str, name: str, log_token: str, samples: Sequence[tuple[str, int]], description: str = ""
    ) -> None:
        """A scene and its samples: (token, timestamp in microseconds) in order of time, at least one."""
        self.rows["scene"].append(
            {
                "token": token,
                "log_token": log_token,
                "nbr_samples": len(samples),
                "first_sample_token": samples[0][0],
                "last_sample_token": samples[-1][0],
                "name": name,
                "description": description,
            }
        )
        for sample_token, stamp_us in samples:
            row = {"token": sample_token, "timestamp": stamp_us, "prev": "", "next": "", "scene_token": token}
            self._append_linked("sample", row, chain=token)

    def add_measurement(
        self,
        token: str,
        sample_token: str,
        calibrated_sensor_token: str,
        stamp_us: int,
        filename: str,
        ego_translation_m: Sequence[float],
        ego_quaternion_wxyz: Sequence[float],
        chain: Hashable,
        size_px: tuple[int, int] = (0, 0),
        is_keyframe: bool = True,
    ) -> None:
        """One file of a sensor and where the vehicle was: a row of ``sample_data`` and one of ``ego_pose``.

        Args:
            token: of both rows.
            sample_token, calibrated_sensor_token: what it belongs to.
            stamp_us: when it was measured, microseconds.
            filename: relative to the data root.
            ego_translation_m, ego_quaternion_wxyz: the vehicle's pose in the global frame at that time, scalar first.
            chain: rows of the same chain are each other's ``prev`` and ``next``: a channel of a scene, in order of time.
            size_px: width and height of an image.
            is_keyframe: False for a sweep between keyframes.
        """
        width_px, height_px = size_px
        row = {
            "token": token,
            "sample_token": sample_token,
            "ego_pose_token": token,
            "calibrated_sensor_token": calibrated_sensor_token,
            "timestamp": stamp_us,
            "fileformat": "jpg" if filename.endswith(".jpg") else "pcd",
            "is_key_frame": is_keyframe,
            "height": height_px,
            "width": width_px,
            "filename": filename,
            "prev": "",
            "next": "",
        }
        self._append_linked("sample_data", row, chain)
        self.rows["ego_pose"].append(
            {
                "token": token,
                "timestamp": stamp_us,
                "rotation": list(ego_quaternion_wxyz),
                "translation": list(ego_translation_m),
            }
        )

    def add_point_labels(self, table: str, measurement_token: str, version: str) -> None:
        """List the labels of a sweep's points, which lie at ``point_labels_file``."""
        filename = point_labels_file(table, measurement_token, version)
        row = {"token": measurement_token, "sample_data_token": measurement_token, "filename": filename}
        self.rows[table].append(row)

    def write(self, root: Path, version: str) -> None:
        """Write every table to ``root/version/``."""
        folder = root / version
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in self.rows.items():
            if rows or name in TABLES:
                (folder / f"{name}.json").write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")

    def _append_linked(self, table: str, row: dict, chain: Hashable) -> None:
        previous = self._previous.get((table, chain))
        if previous is not None:
            row["prev"], previous["next"] = previous["token"], row["token"]
        self._previous[table, chain] = row
        self.rows[table].append(row)


def write_blank_map(path: Path) -> None:
    """An all-black map mask, for data sets that have none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", np.zeros((64, 64), dtype=np.uint8))[1].tobytes())
