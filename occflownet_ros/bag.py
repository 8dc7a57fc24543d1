# SPDX-License-Identifier: Apache-2.0
"""Reading rosbag2 bags without a ROS installation: MCAP and sqlite3, compressed or not, whole or cut.

    with Bag("recording") as bag:
        for message in bag.messages(topics={"/odom"}):
            print(message.topic, message.time_ns, len(message.data))
        print(bag.damage)  # sentences about what could not be read, usually none

A bag is a folder that rosbag2 wrote (its ``metadata.yaml`` may be missing), or one ``.mcap`` or ``.db3`` file of it.
"""

from __future__ import annotations

import heapq
import re
import shutil
import sqlite3
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing, suppress
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import apsw
import yaml
from rosbags.rosbag2 import Reader
from rosbags.rosbag2.errors import ReaderError

from occflownet_core.errors import BagError
from occflownet_ros.bag_scan import BagMessage, BagTopic, ScannedFile, lenient_qos
from occflownet_ros.bag_scan_mcap import scan_mcap, zstd
from occflownet_ros.bag_scan_sqlite import is_cut, scan_sqlite

__all__ = ["Bag", "BagMessage", "BagTopic"]

_SUFFIXES = (".mcap", ".db3")
_COMPRESSED_SUFFIX = ".zstd"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# What rosbags raises on a file that is not as its index says; it does not wrap all of them.
_UNREADABLE = (
    ReaderError,
    apsw.Error,
    zstd.ZstdError,
    ArithmeticError,
    AssertionError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
_END_OF_TIME_NS = 2**63 - 1


class Bag:
    """An open bag. A context manager; ``close`` it otherwise.

    Attributes:
        path: the folder or file.
        topics: what it holds, by name.
        start_ns, end_ns: time of the first and the last message.
        message_count: messages in all topics.

    Raises:
        BagError: there is no such bag, one of its files is missing, none can be read, or its messages are not CDR.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stack = ExitStack()
        self._origins: dict[str, str] = {}  # temporary copies, and what they are copies of
        metadata = _metadata(self.path)
        try:
            self._files = [self._open(file) for file in _storage_files(self.path, metadata)]
            self.topics = _merged_topics(self._files, metadata)
            ranges = [file.time_range_ns for file in self._files if file.time_range_ns]
            if not ranges:
                raise BagError(f"bag {self.path} holds no messages; record it again, or give another bag")
        except BaseException:
            self.close()
            raise
        self.start_ns = min(first for first, _ in ranges)
        self.end_ns = max(last for _, last in ranges)
        self.message_count = sum(topic.message_count for topic in self.topics.values())

    def __enter__(self) -> Bag:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release files and temporary copies."""
        self._stack.close()

    @property
    def damage(self) -> list[str]:
        """One sentence per file that is cut or damaged. Some damage shows only once ``messages`` has met it."""
        return [self._named_as_given(file.damage) for file in self._files if file.damage]

    def messages(
        self, topics: Collection[str] | None = None, start_ns: int = 0, stop_ns: int = _END_OF_TIME_NS
    ) -> Iterator[BagMessage]:
        """Messages of the named topics (None: all) with start_ns <= time < stop_ns, in time order.

        What a cut or damaged file still holds is yielded; ``damage`` tells what was not.
        """
        sources = [file.messages(topics, start_ns, stop_ns) for file in self._files]
        for message in heapq.merge(*sources, key=lambda message: message.time_ns):
            yield _uncompressed(message)

    def _open(self, file: Path) -> _IndexedFile | ScannedFile:
        readable = file
        if file.suffix == _COMPRESSED_SUFFIX:
            readable = _decompressed(file, self._temporary_folder())
        elif _has_write_ahead_log(file):
            readable = _with_write_ahead_log(file, self._temporary_folder())
        self._origins[str(readable)] = str(file)
        try:
            opened = _open_readable(readable)
        except BagError as error:
            raise BagError(self._named_as_given(str(error))) from None
        self._stack.callback(opened.close)
        return opened

    def _named_as_given(self, sentence: str) -> str:
        for copy, original in self._origins.items():
            sentence = sentence.replace(copy, original)
        return sentence

    def _temporary_folder(self) -> Path:
        return Path(self._stack.enter_context(TemporaryDirectory(prefix="bag_")))


class _IndexedFile:
    """A file that rosbags opens; should it stumble on the way, the rest comes from a scan."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damage: str | None = None
        self._scanned: ScannedFile | None = None
        self._reader = Reader(path)
        self._reader.open()
        if path.suffix == ".mcap" and not self._reader.storage.chunks:
            self._reader.close()
            raise ReaderError("an MCAP file without chunks is read in file order by rosbags, not in time order")

    @property
    def topics(self) -> list[BagTopic]:
        return [
            BagTopic(c.topic, c.msgtype, c.ext.serialization_format, c.msgcount, c.ext.offered_qos_profiles)
            for c in self._reader.connections
        ]

    @property
    def time_range_ns(self) -> tuple[int, int] | None:
        return (self._reader.start_time, self._reader.end_time - 1) if self._reader.message_count else None

    def messages(self, topics: Collection[str] | None, start_ns: int, stop_ns: int) -> Iterator[BagMessage]:
        connections = [c for c in self._reader.connections if topics is None or c.topic in topics]
        count = 0
        try:
            if connections:
                for connection, time_ns, data in self._reader.messages(connections, start_ns, stop_ns):
                    yield BagMessage(connection.topic, connection.msgtype, time_ns, bytes(data))
                    count += 1
        except _UNREADABLE:
            if self._scanned is None:
                self._scanned = _scan(self.path)
                self.damage = self._scanned.damage
            # Both go by time and then by place in the file, so the scan yields the same messages first.
            yield from islice(self._scanned.messages(topics, start_ns, stop_ns), count, None)

    def close(self) -> None:
        self._reader.close()
        if self._scanned is not None:
            self._scanned.close()


def _open_readable(path: Path) -> _IndexedFile | ScannedFile:
    if path.suffix == ".db3" and is_cut(path):
        return _scan(path)
    try:
        return _IndexedFile(path)
    except _UNREADABLE:
        return _scan(path)


def _scan(path: Path) -> ScannedFile:
    """Scan a file that cannot be read through its index.

    Raises:
        BagError: it is no bag file, or nothing in it can be read.
    """
    scanned = scan_mcap(path) if path.suffix == ".mcap" else scan_sqlite(path)
    if scanned.damage and not scanned.entries:
        scanned.close()
        raise BagError(f"{scanned.damage}; record it again, or give another bag")
    return scanned


def _metadata(path: Path) -> dict:
    """The content of metadata.yaml; empty where there is none, as after a crash of the recorder."""
    try:
        content = yaml.safe_load((path / "metadata.yaml").read_text())
        return dict(content["rosbag2_bagfile_information"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return {}


def _storage_files(path: Path, metadata: dict) -> list[Path]:
    if not path.exists():
        raise BagError(f"there is no bag at {path}; give a rosbag2 folder, or a .mcap or .db3 file")
    if path.is_file():
        if _storage_suffix(path) not in _SUFFIXES:
            raise BagError(f"{path} is not a .mcap or .db3 file; give a rosbag2 folder or such a file")
        return [path]
    listed = [path / Path(name).name for name in metadata.get("relative_file_paths") or ()]
    for file in listed:
        if not file.is_file():
            raise BagError(f"bag {path} lacks {file.name}, which its metadata.yaml lists; copy the whole folder")
    files = listed or sorted((f for f in path.iterdir() if _storage_suffix(f) in _SUFFIXES), key=_natural_order)
    if not files:
        raise BagError(f"folder {path} holds no .mcap or .db3 file; give a folder that rosbag2 wrote")
    return files


def _storage_suffix(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix == _COMPRESSED_SUFFIX else file.suffix


def _natural_order(file: Path) -> list[int | str]:
    """bag_2 before bag_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)]


def _decompressed(file: Path, folder: Path) -> Path:
    """A copy of a file that was compressed as a whole; of a cut one, what precedes the cut."""
    copy = folder / file.stem
    # The scan of the copy reports a cut.
    with suppress(EOFError, zstd.ZstdError), zstd.open(file, "rb") as source, copy.open("wb") as target:
        shutil.copyfileobj(source, target)
    return copy


def _has_write_ahead_log(file: Path) -> bool:
    log = file.with_name(file.name + "-wal")
    return file.suffix == ".db3" and log.is_file() and log.stat().st_size > 0


def _with_write_ahead_log(file: Path, folder: Path) -> Path:
    """A copy that has the rows which a recorder that was killed, or still runs, left beside its database.

    rosbags opens databases as immutable, which hides those rows.
    """
    copy = folder / file.name
    shutil.copy(file, copy)
    shutil.copy(f"{file}-wal", f"{copy}-wal")
    with suppress(sqlite3.Error), closing(sqlite3.connect(copy)) as database:
        database.execute("PRAGMA journal_mode = DELETE")
    return copy


def _uncompressed(message: BagMessage) -> BagMessage:
    # Message-wise compression is noted in metadata.yaml alone, which may be lost; CDR never begins like zstd.
    if message.data[:4] != _ZSTD_MAGIC:
        return message
    try:
        return message._replace(data=zstd.decompress(message.data))
    except zstd.ZstdError as error:
        raise BagError(
            f"the message of {message.topic} at {message.time_ns} ns cannot be decompressed ({error}); leave its topic out"
        ) from None


def _merged_topics(files: list[_IndexedFile | ScannedFile], metadata: dict) -> dict[str, BagTopic]:
    """The topics of all files; QoS that old sqlite3 files lack comes from metadata.yaml."""
    topics: dict[str, BagTopic] = {}
    for topic in (topic for file in files for topic in file.topics):
        if topic.serialization != "cdr":
            raise BagError(
                f"{topic.name} is serialised as {topic.serialization!r}; only bags of ROS 2, in CDR, are read"
            )
        merged = topics.setdefault(topic.name, BagTopic(topic.name, topic.msgtype))
        merged.message_count += topic.message_count
        merged.qos = [*merged.qos, *(profile for profile in topic.qos if profile not in merged.qos)]
    for entry in metadata.get("topics_with_message_count") or ():
        described = entry.get("topic_metadata", {})
        topic = topics.get(described.get("name"))
        if topic is not None and not topic.qos:
            topic.qos = lenient_qos(described.get("offered_qos_profiles"))
    return topics
