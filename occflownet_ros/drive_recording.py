# SPDX-License-Identifier: Apache-2.0
"""When every sensor of a drive measured: one pass over a bag that reads the heads of its messages."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

from occflownet_ros.bag import BagMessage
from occflownet_ros.bag_decoding import decode, stamp_of
from occflownet_ros.bag_survey import LIDAR, Survey, nanoseconds, require_usable
from occflownet_ros.camera_model import CameraModel
from occflownet_ros.topic_map import CameraTopics

Progress = Callable[[int, int], None]
"""Called with messages done and in total."""


@dataclass
class SensorStamps:
    """When one sensor measured.

    Attributes:
        topic: its messages.
        stamps_ns: of their headers, in order of recording; after ``finish`` in order of time, each once.
    """

    topic: str
    stamps_ns: list[int] = field(default_factory=list)

    def finish(self) -> None:
        """Call once all are there. A message that carries no stamp measured at no time that is known."""
        self.stamps_ns = sorted({stamp_ns for stamp_ns in self.stamps_ns if stamp_ns > 0})

    def nearest(self, stamp_ns: int, limit_ms: float) -> int | None:
        """The stamp nearest to a moment, None where none is within the limit."""
        after = bisect_left(self.stamps_ns, stamp_ns)
        near = self.stamps_ns[max(after - 1, 0) : after + 1]
        nearest = min(near, key=lambda mine: abs(mine - stamp_ns), default=None)
        return nearest if nearest is not None and abs(nearest - stamp_ns) <= limit_ms * 1e6 else None


@dataclass
class CameraHistory:
    """A camera's models over time: (stamp since which it holds, model)."""

    changes: list[tuple[int, CameraModel]] = field(default_factory=list)

    def add(self, stamp_ns: int, model: CameraModel, topics: CameraTopics) -> None:
        """Take over a camera_info.

        Raises:
            CalibrationError: it is new, and the camera's images cannot be rectified by it.
        """
        if not self.changes or model != self.changes[-1][1]:
            require_usable(model, topics)
            self.changes.append((stamp_ns, model))

    def finish(self, otherwise: CameraModel) -> None:
        """Call once all are there; where there are none, the other model holds."""
        self.changes = sorted(self.changes, key=lambda change: change[0]) or [(0, otherwise)]

    def at(self, stamp_ns: int) -> CameraModel:
        """The model that held at a moment; before the first, the first."""
        index = bisect_right(self.changes, stamp_ns, key=lambda change: change[0])
        return self.changes[max(index - 1, 0)][1]


@dataclass
class Recording:
    """The stamps of a drive.

    Attributes:
        sensors: by channel; cameras, and LIDAR_TOP where there is a LiDAR.
        models: by camera.
        keyframes: (stamp in nanoseconds, sample token) of the bag's own marks, in order of time.
    """

    sensors: dict[str, SensorStamps]
    models: dict[str, CameraHistory]
    keyframes: list[tuple[int, str]] = field(default_factory=list)


def read_recording(survey: Survey, with_lidar: bool, on_progress: Progress = lambda done, total: None) -> Recording:
    """The stamps of the survey's sensors.

    Raises:
        BagError: a message cannot be read.
        CalibrationError: a camera_info cannot be used.
    """
    topic_map = survey.topic_map
    sensors = {channel: SensorStamps(topics.image) for channel, topics in topic_map.cameras.items()}
    if with_lidar and topic_map.lidar:
        sensors[LIDAR] = SensorStamps(topic_map.lidar.topic)
    recording = Recording(sensors, {channel: CameraHistory() for channel in topic_map.cameras})
    readers = _readers(survey, recording)
    total = sum(survey.bag.topics[name].message_count for name in readers)
    for done, message in enumerate(survey.bag.messages(set(readers)), start=1):
        for read in readers[message.topic]:
            read(message)
        on_progress(done, total)
    for sensor in sensors.values():
        sensor.finish()
    for channel, model in survey.models.items():
        recording.models[channel].finish(model)
    recording.keyframes.sort()
    return recording


def _readers(survey: Survey, recording: Recording) -> dict[str, list[Callable[[BagMessage], None]]]:
    """What to do with each topic's messages."""
    readers: dict[str, list[Callable[[BagMessage], None]]] = {}

    def read(topic: str, reader: Callable[[BagMessage], None]) -> None:
        if topic in survey.bag.topics:
            readers.setdefault(topic, []).append(reader)

    for sensor in recording.sensors.values():
        read(sensor.topic, lambda message, stamps=sensor.stamps_ns: stamps.append(stamp_of(message)))
    for channel, topics in survey.topic_map.cameras.items():
        history = recording.models[channel]
        read(topics.camera_info, lambda message, h=history, t=topics: _add_model(h, message, t))
    marks = survey.topic_map.keyframes
    if marks:
        read(marks, lambda message: recording.keyframes.append(_mark(message)))
    return readers


def _add_model(history: CameraHistory, message: BagMessage, topics: CameraTopics) -> None:
    info = decode(message)
    history.add(nanoseconds(info.header.stamp), CameraModel.from_message(info), topics)


def _mark(message: BagMessage) -> tuple[int, str]:
    header = decode(message)
    return nanoseconds(header.stamp), header.frame_id
