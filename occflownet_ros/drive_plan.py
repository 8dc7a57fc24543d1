# SPDX-License-Identifier: Apache-2.0
"""Which measurements of a drive become keyframes, and where the vehicle was at each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from occflownet_core.errors import BagError
from occflownet_core.nuscenes_tables import stable_token
from occflownet_core.poses import RecordedPose
from occflownet_ros.bag_keyframes import keyframes_of
from occflownet_ros.bag_survey import LIDAR, Survey
from occflownet_ros.camera_model import CameraModel
from occflownet_ros.drive_recording import Recording
from occflownet_ros.transform_tree import FramePath

_LONGEST_GAP_INTERVALS = 2.5


@dataclass(frozen=True, eq=False)
class Measurement:
    """One message that becomes a file.

    Attributes:
        channel: of the sensor.
        topic, stamp_ns: which message of the bag: the topic's first with that stamp in its header.
        ego_from_sensor: the sensor's mount then (of a camera, of its rectified image).
        global_from_ego: the vehicle's pose then.
        model: of a camera.
    """

    channel: str
    topic: str
    stamp_ns: int
    ego_from_sensor: RecordedPose
    global_from_ego: RecordedPose
    model: CameraModel | None


@dataclass(frozen=True)
class PlannedKeyframe:
    """A sample: one measurement of every sensor."""

    token: str
    stamp_ns: int
    measurements: tuple[Measurement, ...]


@dataclass(frozen=True)
class _Moment:
    """What may become a keyframe: the stamp of each sensor's measurement, None where there is none near enough."""

    stamp_ns: int
    token: str
    stamps_ns: dict[str, int | None]


@dataclass
class Plan:
    """The scenes of a drive, keyframes in order of time, and why other moments became none: count by reason."""

    scenes: list[list[PlannedKeyframe]]
    left_out: Counter[str] = field(default_factory=Counter)


class Planner:
    """Puts keyframes together.

    Args:
        survey: mapping and transforms.
        recording: stamps.
        rate_hz: of keyframes, where the bag does not mark them.
        scene_s: longest scene; 0 for any length.
        name: of the drive; tokens depend on it.
    """

    def __init__(self, survey: Survey, recording: Recording, rate_hz: float, scene_s: float, name: str) -> None:
        self.recording, self.scene_s, self.name = recording, scene_s, name
        self.bag, self.topic_map = survey.bag.path, survey.topic_map
        self.interval_ns = round(1e9 / rate_hz)
        self.ego_path = survey.ego_path
        self.mounts: dict[str, FramePath] = {channel: survey.camera_path(channel) for channel in self.topic_map.cameras}
        if LIDAR in recording.sensors:
            self.mounts[LIDAR] = survey.lidar_path()

    def plan(self) -> Plan:
        """The keyframes that have everything.

        Raises:
            BagError: none has.
        """
        moments, left_out = self._moments(), Counter()
        found = []
        for moment in moments:
            keyframe = self._keyframe(moment)
            if isinstance(keyframe, str):
                left_out[keyframe] += 1
            elif found and (stale := _shared_channel(found[-1], keyframe)):
                left_out[f"no new measurement of {stale}"] += 1
            else:
                found.append(keyframe)
        if not found:
            raise BagError(self._nothing_found(len(moments), left_out))
        return Plan(self._scenes(found), left_out)

    def _moments(self) -> list[_Moment]:
        """As the bag marks them, else at the rate."""
        sensors, limit_ms = self.recording.sensors, self.topic_map.max_camera_time_diff_ms
        cameras = list(self.topic_map.cameras)
        anchor = cameras.index("CAM_FRONT") if "CAM_FRONT" in cameras else 0
        if self.recording.keyframes:
            images = [sensors[camera].stamps_ns for camera in cameras]
            marked = keyframes_of(self.recording.keyframes, images, anchor, limit_ms)
            return [
                self._moment(k.stamp_ns, k.token, dict(zip(cameras, k.image_stamps_ns, strict=True))) for k in marked
            ]
        leader = sensors[LIDAR if LIDAR in sensors else cameras[anchor]].stamps_ns
        moments = []
        for stamp_ns in choose_stamps(leader, self.interval_ns):
            offsets_ns = {camera: round(t.offset_ms * 1e6) for camera, t in self.topic_map.cameras.items()}
            images = {c: sensors[c].nearest(stamp_ns + offset_ns, limit_ms) for c, offset_ns in offsets_ns.items()}
            moments.append(self._moment(stamp_ns, stable_token(self.name, "sample", stamp_ns), images))
        return moments

    def _moment(self, stamp_ns: int, token: str, images_ns: dict[str, int | None]) -> _Moment:
        if LIDAR not in self.recording.sensors:
            return _Moment(stamp_ns, token, images_ns)
        sweep_ns = self.recording.sensors[LIDAR].nearest(stamp_ns, self.topic_map.max_camera_time_diff_ms)
        return _Moment(stamp_ns, token, {**images_ns, LIDAR: sweep_ns})

    def _keyframe(self, moment: _Moment) -> PlannedKeyframe | str:
        """The keyframe of a moment, or what it lacks."""
        measurements = []
        for channel, stamp_ns in moment.stamps_ns.items():
            if stamp_ns is None:
                return f"no measurement of {channel} within {self.topic_map.max_camera_time_diff_ms:g} ms"
            measurement = self._measurement(channel, stamp_ns)
            if isinstance(measurement, str):
                return measurement
            measurements.append(measurement)
        return PlannedKeyframe(moment.token, moment.stamp_ns, tuple(measurements))

    def _measurement(self, channel: str, stamp_ns: int) -> Measurement | str:
        ego, mount = self.ego_path.at(stamp_ns), self.mounts[channel].at(stamp_ns)
        if ego is None:
            return "no pose of the vehicle"
        if mount is None:
            return f"no transform to {channel}"
        topic = self.recording.sensors[channel].topic
        if channel == LIDAR:
            return Measurement(channel, topic, stamp_ns, mount, ego, None)
        model = self.recording.models[channel].at(stamp_ns)
        return Measurement(channel, topic, stamp_ns, mount, ego, model)

    def _scenes(self, keyframes: Sequence[PlannedKeyframe]) -> list[list[PlannedKeyframe]]:
        """Cut where keyframes are missing, and where a scene gets too long."""
        stamps_ns = [keyframe.stamp_ns for keyframe in keyframes]
        interval_ns = (
            np.median(np.diff(stamps_ns)) if self.recording.keyframes and len(keyframes) > 1 else self.interval_ns
        )
        scenes = [[keyframes[0]]]
        for keyframe in keyframes[1:]:
            gap_ns = keyframe.stamp_ns - scenes[-1][-1].stamp_ns
            length_s = (keyframe.stamp_ns - scenes[-1][0].stamp_ns) / 1e9
            if gap_ns > _LONGEST_GAP_INTERVALS * interval_ns or (self.scene_s and length_s > self.scene_s):
                scenes.append([])
            scenes[-1].append(keyframe)
        return scenes

    def _nothing_found(self, marks: int, left_out: Counter[str]) -> str:
        if not marks:
            return f"bag {self.bag} has no moment that could become a keyframe; record cameras and LiDAR longer"
        reason, count = left_out.most_common(1)[0]
        times = ", ".join(
            f"{what} {_range_s(stamps)}"
            for what, stamps in (
                *((channel, sensor.stamps_ns) for channel, sensor in self.recording.sensors.items()),
                ("poses", self.ego_path.range_ns or ()),
            )
        )
        return (
            f"none of the {marks} moments of bag {self.bag} can become a keyframe: at {count} of them there is {reason} "
            f"({times}); record all sensors at the same time with synchronised clocks, or widen the limits in --map"
        )


def _shared_channel(first: PlannedKeyframe, second: PlannedKeyframe) -> str | None:
    """A sensor of which both have the same measurement: keyframes are faster than it is."""
    pairs = zip(first.measurements, second.measurements, strict=True)
    return next((a.channel for a, b in pairs if a.stamp_ns == b.stamp_ns), None)


def _range_s(stamps_ns: Sequence[int]) -> str:
    return f"{stamps_ns[0] / 1e9:.3f} to {stamps_ns[-1] / 1e9:.3f} s" if len(stamps_ns) else "never"


def choose_stamps(stamps_ns: Sequence[int], interval_ns: int) -> list[int]:
    """Some of the ascending stamps: one near every moment that is due, and never two within half an interval.

    Moments are due at even intervals from the first stamp on; the first stamp not earlier than half its own period
    before one is taken.
    """
    if not stamps_ns:
        return []
    slack_ns = min(np.median(np.diff(stamps_ns)), interval_ns) / 2 if len(stamps_ns) > 1 else 0
    chosen, due_ns = [], stamps_ns[0]
    for stamp_ns in stamps_ns:
        if stamp_ns >= due_ns - slack_ns and (not chosen or stamp_ns - chosen[-1] >= interval_ns / 2):
            chosen.append(stamp_ns)
            late = round((stamp_ns - due_ns) / interval_ns)  # more than none after a gap
            due_ns += interval_ns * (max(late, 0) + 1)
    return chosen
