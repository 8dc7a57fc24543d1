# SPDX-License-Identifier: Apache-2.0
"""What a bag file holds, when it is found by scanning the file instead of trusting its index.

The rosbags library reads intact files through their index and refuses the others: recordings that were cut, crashed or
damaged on the disk. A scan goes through such a file once, and every message that is whole becomes readable, in time order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rosbags.interfaces import Qos
from rosbags.rosbag2.errors import ReaderError
from rosbags.rosbag2.metadata import parse_qos


class BagMessage(NamedTuple):
    """One recorded message: ``data`` is its serialised CDR, ``time_ns`` when it was recorded."""

    topic: str
    msgtype: str
    time_ns: int
    data: bytes


@dataclass
class BagTopic:
    """A topic of a bag, its message type (``pkg/msg/Name``) and the QoS profiles that its publishers offered."""

    name: str
    msgtype: str
    serialization: str = "cdr"
    message_count: int = 0
    qos: list[Qos] = field(default_factory=list)


@dataclass
class ScannedFile(ABC):
    """What a scan found. ``entries`` are (time_ns, key of the topic, where), sorted by time."""

    path: Path
    topics_by_key: dict[int, BagTopic]
    entries: list[tuple[int, int, object]]
    damage: str | None

    def __post_init__(self) -> None:
        # Equal times keep the order in which they were recorded: the sort is stable.
        self.entries.sort(key=lambda entry: entry[0])
        for _, key, _ in self.entries:
            self.topics_by_key[key].message_count += 1

    @property
    def topics(self) -> list[BagTopic]:
        return list(self.topics_by_key.values())

    @property
    def time_range_ns(self) -> tuple[int, int] | None:
        return (self.entries[0][0], self.entries[-1][0]) if self.entries else None

    def messages(self, topics: Collection[str] | None, start_ns: int, stop_ns: int) -> Iterator[BagMessage]:
        """Messages of the named topics (None: all) with start_ns <= time < stop_ns, in time order."""
        for time_ns, key, where in self.entries:
            topic = self.topics_by_key[key]
            if start_ns <= time_ns < stop_ns and (topics is None or topic.name in topics):
                yield BagMessage(topic.name, topic.msgtype, time_ns, self._read(where))

    @abstractmethod
    def _read(self, where: object) -> bytes:
        """The message's bytes at a place that the scan noted."""

    @abstractmethod
    def close(self) -> None:
        """Release the file."""


def lenient_qos(profiles: object) -> list[Qos]:
    """The offered QoS profiles that a recorder stored; none where they are missing or of a form unknown here."""
    try:
        return parse_qos(profiles) if profiles else []
    except (ReaderError, KeyError, TypeError, ValueError):
        return []


def damage_sentence(
    path: Path,
    entries: list[tuple[int, int, object]],
    cut_at_byte: int | None,
    lost_chunks: Collection[int] = (),
    lost_rows: int = 0,
) -> str | None:
    """The sentence that says what of a file is lost, or None."""
    times = [time_ns for time_ns, _, _ in entries]
    if cut_at_byte is not None:
        seconds = f" ({(max(times) - min(times)) / 1e9:.3f} s)" if times else ""
        return f"bag file {path} is cut at byte {cut_at_byte}: the {len(times)} messages before it{seconds} are read, the rest is lost"
    if lost_chunks:
        places = ", ".join(map(str, lost_chunks))
        return f"bag file {path} is damaged at byte {places}: {len(times)} messages are read, those of {len(lost_chunks)} chunks are lost"
    if lost_rows:
        return f"bag file {path} is damaged: {len(times)} messages are read, {lost_rows} rows are lost"
    return None
