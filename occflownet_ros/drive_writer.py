# SPDX-License-Identifier: Apache-2.0
"""Planned keyframes of a drive into the files and tables of a data root in the nuScenes format."""

from __future__ import annotations

import datetime
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import BagError, ImageError
from occflownet_core.nuscenes_tables import NuscenesTables, point_labels_file, stable_token, write_blank_map
from occflownet_core.rig_file import save_rig
from occflownet_ros.bag_decoding import decode, stamp_of
from occflownet_ros.bag_survey import LIDAR, Survey
from occflownet_ros.camera_model import rectified_jpeg
from occflownet_ros.drive_plan import Measurement, Plan, PlannedKeyframe
from occflownet_ros.drive_recording import Progress
from occflownet_ros.point_cloud import deskewed, sweep_of_cloud

_MAP_FILE = "maps/blank.png"
_NAMESPACE = "bag_to_nuscenes"
CALIBRATION_FILE = "calibration.yaml"
"""Beside the tables: the cameras, for vehicles and machines without /tf_static."""


@dataclass(frozen=True)
class Written:
    """A file that was written.

    Attributes:
        size: bytes.
        unchanged: whether it holds the sensor's own bytes: an image as it was sent, all points where they were.
        dropped_points: points that are no return and were left out.
    """

    size: int
    unchanged: bool
    dropped_points: int = 0


@dataclass
class DriveSummary:
    """What became of a drive.

    Attributes:
        name: of the drive.
        scenes: keyframes written, by scene.
        left_out: moments that became no keyframe, count by reason.
        files: by sensor.
    """

    name: str
    scenes: dict[str, list[PlannedKeyframe]]
    left_out: Counter[str]
    files: dict[str, list[Written]]


class RootWriter:
    """A data root in the making.

    Args:
        root: its folder, which exists.
        version: name of its folder of tables.
        jpeg_quality: of images that have to be encoded anew, 1..100.
    """

    def __init__(self, root: Path, version: str, jpeg_quality: int) -> None:
        self.root, self.version, self.jpeg_quality = root, version, jpeg_quality
        self._tables = NuscenesTables(_NAMESPACE)
        self._calibrated: set[str] = set()
        self._first: PlannedKeyframe | None = None

    def add_drive(
        self, name: str, survey: Survey, plan: Plan, on_progress: Progress = lambda done, total: None
    ) -> DriveSummary:
        """Write a drive's keyframes; one whose message turns out unreadable is left out.

        Args:
            name: of the drive, and of its scene (or, numbered, its scenes).
            survey, plan: what to write.
            on_progress: called with messages read and in total.

        Raises:
            BagError: no keyframe could be read.
            CalibrationError, ConfigError: the mapping or a camera_info does not fit what is recorded.
            OSError: a file cannot be written.
        """
        files = MeasurementFiles(self.root, self.version, self.jpeg_quality, name, survey)
        written, broken = _write_files(files, survey, plan, on_progress)
        scenes = [[keyframe for keyframe in scene if keyframe.token not in broken] for scene in plan.scenes]
        scenes = [scene for scene in scenes if scene]
        if not scenes:
            raise BagError(f"no keyframe of bag {survey.bag.path} can be read: {next(iter(broken.values()))}")
        names = [name] if len(scenes) == 1 else [f"{name}-{i:04d}" for i in range(1, len(scenes) + 1)]
        summary = DriveSummary(
            name, dict(zip(names, scenes, strict=True)), plan.left_out + Counter(broken.values()), _by_channel(written)
        )
        self._first = self._first or scenes[0][0]
        self._add_rows(summary, labelled=bool(survey.topic_map.lidar and survey.topic_map.lidar.label_field))
        return summary

    def finish(self) -> None:
        """Write the tables, and the first drive's cameras as the node's ``calibration_file`` takes them."""
        self._tables.add_map(stable_token(_NAMESPACE, "map"), _MAP_FILE)
        write_blank_map(self.root / _MAP_FILE)
        self._tables.write(self.root, self.version)
        images = [m for m in self._first.measurements if m.model]
        rig = CameraRig(
            tuple(
                Camera(m.channel, m.model.width_px, m.model.height_px, m.model.intrinsic, m.ego_from_sensor.matrix)
                for m in images
            )
        )
        mounts = {m.channel: m.ego_from_sensor for m in images}
        save_rig(rig, self.root / CALIBRATION_FILE, "of the first drive", mounts)

    def _add_rows(self, summary: DriveSummary, labelled: bool) -> None:
        first_ns = next(iter(summary.scenes.values()))[0].stamp_ns
        date = datetime.datetime.fromtimestamp(first_ns / 1e9, tz=datetime.timezone.utc).date().isoformat()
        log = stable_token(_NAMESPACE, summary.name, "log")
        self._tables.add_log(log, summary.name, "", date, "")
        for scene, keyframes in summary.scenes.items():
            samples = [(keyframe.token, keyframe.stamp_ns // 1000) for keyframe in keyframes]
            self._tables.add_scene(stable_token(_NAMESPACE, scene, "scene"), scene, log, samples)
            for keyframe in keyframes:
                for measurement in keyframe.measurements:
                    self._add_measurement(summary.name, scene, keyframe, measurement)
                    if labelled and measurement.channel == LIDAR:
                        self._tables.add_point_labels("lidarseg", token_of(summary.name, measurement), self.version)

    def _add_measurement(self, drive: str, scene: str, keyframe: PlannedKeyframe, measurement: Measurement) -> None:
        model = measurement.model
        self._tables.add_measurement(
            token_of(drive, measurement),
            keyframe.token,
            self._calibrated_sensor(drive, measurement),
            measurement.stamp_ns // 1000,
            filename_of(drive, measurement),
            measurement.global_from_ego.translation_m,
            measurement.global_from_ego.quaternion_wxyz,
            chain=(scene, measurement.channel),
            size_px=(model.width_px, model.height_px) if model else (0, 0),
        )

    def _calibrated_sensor(self, drive: str, measurement: Measurement) -> str:
        """The row of this drive and calibration, made when it is first met."""
        channel, mount, model = measurement.channel, measurement.ego_from_sensor, measurement.model
        intrinsic = None if model is None else model.intrinsic
        sensor = stable_token(_NAMESPACE, "sensor", channel)
        numbers = (mount.translation_m, mount.quaternion_wxyz, None if model is None else intrinsic.tolist())
        token = stable_token(_NAMESPACE, drive, "calibrated_sensor", channel, *numbers)
        if sensor not in self._calibrated:
            self._tables.add_sensor(sensor, channel, "camera" if model else "lidar")
        if token not in self._calibrated:
            self._tables.add_calibrated_sensor(token, sensor, mount.translation_m, mount.quaternion_wxyz, intrinsic)
        self._calibrated |= {sensor, token}
        return token


class MeasurementFiles:
    """Writes single measurements of a drive.

    Args:
        root, version, jpeg_quality: see ``RootWriter``.
        drive: its name.
        survey: mapping and transforms.
    """

    def __init__(self, root: Path, version: str, jpeg_quality: int, drive: str, survey: Survey) -> None:
        self.root, self.version, self.jpeg_quality, self.drive = root, version, jpeg_quality, drive
        self.topic_map, self._ego_path, self._lidar_path = survey.topic_map, survey.ego_path, survey.lidar_path()

    def write(self, measurement: Measurement, message: object) -> Written:
        """Write a decoded message's file.

        Raises:
            ImageError, BagError: the message is damaged.
        """
        data, written = (self._image if measurement.model else self._points)(measurement, message)
        self._put(filename_of(self.drive, measurement), data)
        return written

    def remove(self, measurement: Measurement) -> None:
        """Take what was written back."""
        (self.root / filename_of(self.drive, measurement)).unlink(missing_ok=True)
        (self.root / self._labels_file(measurement)).unlink(missing_ok=True)

    def _image(self, measurement: Measurement, message: object) -> tuple[bytes, Written]:
        topics = self.topic_map.cameras[measurement.channel]
        data, unchanged = rectified_jpeg(message, measurement.model, topics.are_rectified, self.jpeg_quality)
        return data, Written(len(data), unchanged)

    def _points(self, measurement: Measurement, message: object) -> tuple[bytes, Written]:
        sweep = sweep_of_cloud(message, measurement.stamp_ns, self.topic_map.lidar)
        points, moves = sweep.points, sweep.time_ns is not None
        if moves:
            points = deskewed(sweep, measurement.stamp_ns, self._global_from_lidar)
        if sweep.raw_label is not None:
            self._put(self._labels_file(measurement), sweep.raw_label.tobytes())
        data = points.astype("<f4").tobytes()
        return data, Written(len(data), not moves and not sweep.dropped, sweep.dropped)

    def _global_from_lidar(self, stamp_ns: int) -> np.ndarray | None:
        ego, mount = self._ego_path.at(stamp_ns), self._lidar_path.at(stamp_ns)
        return None if ego is None or mount is None else ego.matrix @ mount.matrix

    def _labels_file(self, measurement: Measurement) -> str:
        return point_labels_file("lidarseg", token_of(self.drive, measurement), self.version)

    def _put(self, name: str, data: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _write_files(
    files: MeasurementFiles, survey: Survey, plan: Plan, on_progress: Progress
) -> tuple[dict[Measurement, Written], dict[str, str]]:
    """Write what the plan wants: the files of whole keyframes, and why others are broken, by token."""
    keyframes = [keyframe for scene in plan.scenes for keyframe in scene]
    wanted = {(m.topic, m.stamp_ns): (m, keyframe.token) for keyframe in keyframes for m in keyframe.measurements}
    topics = {topic for topic, _ in wanted}
    total = sum(survey.bag.topics[topic].message_count for topic in topics)
    written: dict[Measurement, Written] = {}
    broken: dict[str, str] = {}
    for done, message in enumerate(survey.bag.messages(topics), start=1):
        measurement, token = wanted.pop((message.topic, stamp_of(message)), (None, None))
        if measurement and token not in broken:
            try:
                written[measurement] = files.write(measurement, decode(message))
            except (ImageError, BagError) as error:
                broken[token] = f"{measurement.channel}: {error}"
        on_progress(done, total)
    for measurement in (m for keyframe in keyframes if keyframe.token in broken for m in keyframe.measurements):
        files.remove(measurement)
        written.pop(measurement, None)
    return written, broken


def _by_channel(written: dict[Measurement, Written]) -> dict[str, list[Written]]:
    result: dict[str, list[Written]] = {}
    for measurement, file in written.items():
        result.setdefault(measurement.channel, []).append(file)
    return result


def token_of(drive: str, measurement: Measurement) -> str:
    """The token of a measurement's rows."""
    return stable_token(_NAMESPACE, drive, "sample_data", measurement.channel, measurement.stamp_ns)


def filename_of(drive: str, measurement: Measurement) -> str:
    """Where a measurement's file belongs in the data root, named as nuScenes names its own."""
    suffix = "jpg" if measurement.model else "pcd.bin"
    channel = measurement.channel
    return f"samples/{channel}/{drive}__{channel}__{measurement.stamp_ns // 1000}.{suffix}"
