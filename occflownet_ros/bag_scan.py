# SPDX-License-Identifier: Apache-2.0
"""Reading bag files whose index is missing or wrong: recordings that were cut, crashed, or damaged on the disk.

The rosbags library reads intact files through their index and refuses the others. Here a file is scanned from its
start once, and every message that is whole becomes readable, in time order.

- MCAP (https://mcap.dev/spec): a chain of records; the last chunk may be cut, and what lies before the cut in it counts.
- sqlite3: rows are stored in the order in which they were recorded, so a cut takes the last ones.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import apsw
import lz4.frame
from rosbags.interfaces import Qos
from rosbags.rosbag2.errors import ReaderError
from rosbags.rosbag2.metadata import parse_qos

from occflownet_core.errors import BagError

try:
    from compression import zstd
except ImportError:
    from backports import zstd

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_MCAP_MAGIC = b"\x89MCAP0\r\n"
_FOOTER, _SCHEMA, _CHANNEL, _MESSAGE, _CHUNK = 0x02, 0x03, 0x04, 0x05, 0x06
_MESSAGE_HEADER = struct.Struct("<HIQQ")  # channel, sequence, log time, publish time
_CHUNK_HEADER = struct.Struct("<QQQI")  # first time, last time, uncompressed size, CRC-32


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
class ScannedFile:
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

    def _read(self, where: object) -> bytes:
        raise NotImplementedError

    def close(self) -> None:
        """Release the file."""


def scan(path: Path) -> ScannedFile:
    """Scan a ``.mcap`` or ``.db3`` file.

    Raises:
        BagError: the file is neither, or cut before its first message.
    """
    scanned = scan_mcap(path) if path.suffix == ".mcap" else scan_sqlite(path)
    if scanned.damage and not scanned.entries:
        scanned.close()
        raise BagError(f"{scanned.damage}; record it again, or give another bag")
    return scanned


# MCAP


class _Chunk(NamedTuple):
    data: memoryview
    compression: str

    def records(self) -> bytes | memoryview:
        """The chunk's records, uncompressed; of a cut chunk, as many as its compression lets through."""
        if not self.compression:
            return self.data
        if self.compression == "zstd":
            return zstd.ZstdDecompressor().decompress(self.data)
        if self.compression == "lz4":
            return lz4.frame.LZ4FrameDecompressor().decompress(bytes(self.data))
        raise BagError(f"chunk compression {self.compression!r} is unknown; MCAP knows zstd and lz4")


class ScannedMcap(ScannedFile):
    """Entries point into a chunk: (chunk number or None for the file itself, first byte, last byte + 1)."""

    def __init__(self, path: Path, buffer: memoryview, chunks: list[_Chunk], **scanned: object) -> None:
        self._buffer = buffer
        self._chunks = chunks
        self._unpacked: tuple[int, bytes | memoryview] | None = None
        super().__init__(path, **scanned)

    def _read(self, where: tuple[int | None, int, int]) -> bytes:
        chunk, begin, end = where
        if chunk is None:
            return bytes(self._buffer[begin:end])
        if self._unpacked is None or self._unpacked[0] != chunk:
            self._unpacked = (chunk, self._chunks[chunk].records())
        return bytes(self._unpacked[1][begin:end])

    def close(self) -> None:
        self._unpacked = None
        self._chunks.clear()
        self._buffer.release()


def scan_mcap(path: Path) -> ScannedMcap:
    """Scan an MCAP file from its start, whether or not it has a summary, an index or an end.

    Raises:
        BagError: it does not start as an MCAP file, or uses an unknown compression.
    """
    with path.open("rb") as file:
        if file.read(len(_MCAP_MAGIC)) != _MCAP_MAGIC:
            raise BagError(f"{path} does not start as an MCAP file; give a file that rosbag2 or MCAP tools wrote")
        buffer = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    found = _McapScan()
    found.take(buffer, len(_MCAP_MAGIC), None)
    cut_at_byte = None if found.ended else len(buffer)
    damage = _damage(path, found.entries, cut_at_byte, found.lost_chunks)
    return ScannedMcap(path, buffer, found.chunks, topics_by_key=found.topics, entries=found.entries, damage=damage)


class _McapScan:
    """Collects what is readable while it walks through the records."""

    def __init__(self) -> None:
        self.schemas: dict[int, str] = {}
        self.topics: dict[int, BagTopic] = {}
        self.entries: list[tuple[int, int, object]] = []
        self.chunks: list[_Chunk] = []
        self.lost_chunks: list[int] = []
        self.ended = False

    def take(self, records: bytes | memoryview, position: int, chunk: int | None) -> None:
        """Take all whole records of the file (chunk None) or of a chunk; a chunk itself need not be whole."""
        for op, begin, end in _records(records, position):
            if op == _CHUNK and chunk is None:
                self._take_chunk(begin, records[begin:end], complete=end <= len(records))
            elif end > len(records):
                return
            elif op == _SCHEMA:
                self.schemas[_uint(records, begin, 2)] = _string(records[begin:end], 2)[0]
            elif op == _CHANNEL:
                key, topic = _channel(records[begin:end], self.schemas)
                self.topics.setdefault(key, topic)
            elif op == _MESSAGE:
                key, _, time_ns, _ = _MESSAGE_HEADER.unpack_from(records[begin:end])
                if key in self.topics:
                    self.entries.append((time_ns, key, (chunk, begin + _MESSAGE_HEADER.size, end)))
            elif op == _FOOTER:
                self.ended = True
                return

    def _take_chunk(self, begin: int, body: memoryview, complete: bool) -> None:
        try:
            crc = _CHUNK_HEADER.unpack_from(body)[3]
            compression, position = _string(body, _CHUNK_HEADER.size)
            chunk = _Chunk(body[position + 8 :], compression)
            records = chunk.records()
            if complete and crc and zlib.crc32(records) != crc:
                raise struct.error("checksum differs")
            self.chunks.append(chunk)
            self.take(records, 0, len(self.chunks) - 1)
        except (zstd.ZstdError, RuntimeError, struct.error, UnicodeDecodeError):
            self.lost_chunks.append(begin)


def _records(buffer: bytes | memoryview, position: int) -> Iterator[tuple[int, int, int]]:
    """(operation, first byte, last byte + 1) of each record; the last one may reach beyond the buffer."""
    while position + 9 <= len(buffer) and buffer[position] != 0:
        begin = position + 9
        end = begin + _uint(buffer, position + 1, 8)
        yield buffer[position], begin, end
        position = end


def _channel(body: memoryview, schemas: dict[int, str]) -> tuple[int, BagTopic]:
    name, position = _string(body, 4)
    serialization, position = _string(body, position)
    end = position + 4 + _uint(body, position, 4)
    metadata, position = {}, position + 4
    while position < end:
        key, position = _string(body, position)
        metadata[key], position = _string(body, position)
    msgtype = schemas.get(_uint(body, 2, 2), "")
    return _uint(body, 0, 2), BagTopic(
        name, msgtype, serialization, qos=lenient_qos(metadata.get("offered_qos_profiles"))
    )


def _uint(buffer: bytes | memoryview, position: int, size: int) -> int:
    return int.from_bytes(buffer[position : position + size], "little")


def _string(buffer: bytes | memoryview, position: int) -> tuple[str, int]:
    """A length-prefixed string and the position behind it."""
    begin = position + 4
    end = begin + _uint(buffer, position, 4)
    if end > len(buffer):
        raise struct.error("string reaches beyond its record")
    return bytes(buffer[begin:end]).decode(), end


# sqlite3


class _WholePages(apsw.VFS):
    """A file system in which a cut database ends with its last whole page.

    SQLite rounds the size up and reads the missing part of a page as zeros, which would end up in a message unnoticed.
    """

    name = "occflownet_whole_pages"

    def __init__(self) -> None:
        super().__init__(self.name, "")

    def xOpen(self, name: object, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        return _WholePagesFile("", name, flags)


class _WholePagesFile(apsw.VFSFile):
    def xFileSize(self) -> int:  # noqa: N802
        size = super().xFileSize()
        if size < 100:
            return 0
        page_size = int.from_bytes(super().xRead(2, 16), "big")
        page_size = 65536 if page_size == 1 else page_size
        return size - size % page_size if page_size else 0


class ScannedSqlite(ScannedFile):
    """Entries point to a row by its id."""

    def __init__(self, path: Path, connection: apsw.Connection, **scanned: object) -> None:
        self._connection = connection
        super().__init__(path, **scanned)

    def _read(self, where: int) -> bytes:
        return self._connection.execute("SELECT data FROM messages WHERE id = ?", (where,)).fetchone()[0]

    def close(self) -> None:
        self._connection.close()


def scan_sqlite(path: Path) -> ScannedSqlite:
    """Scan a rosbag2 database row by row; a write-ahead log left by a recorder that was killed is read too.

    Raises:
        BagError: it is no SQLite database, or has no rosbag2 tables.
    """
    vfs = _WholePages()
    connection = None
    entries: list[tuple[int, int, object]] = []
    damaged = False
    try:
        if has_write_ahead_log(path):
            connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        else:
            flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
            connection = apsw.Connection(f"{path.absolute().as_uri()}?immutable=1", flags=flags, vfs=vfs.name)
        # Without this SQLite refuses every file that is shorter than its header says.
        connection.execute("PRAGMA writable_schema = ON")
        topics = _sqlite_topics(connection)
    except apsw.Error as error:
        if connection is not None:
            connection.close()
        raise BagError(f"{path} is no rosbag2 database ({error}); give a file that rosbag2 wrote") from None
    try:
        rows = connection.execute("SELECT id, topic_id, timestamp, data FROM messages NOT INDEXED ORDER BY id")
        for row, key, time_ns, _ in rows:
            if key in topics:
                entries.append((time_ns, key, row))
    except apsw.Error:
        damaged = True
    size = path.stat().st_size
    damage = _damage(path, entries, cut_at_byte=size if damaged else None)
    return ScannedSqlite(path, connection, topics_by_key=topics, entries=entries, damage=damage)


def has_write_ahead_log(path: Path) -> bool:
    """Whether rows may wait beside the database, because its writer was killed or still runs."""
    log = path.with_name(path.name + "-wal")
    return log.is_file() and log.stat().st_size > 0


def _sqlite_topics(connection: apsw.Connection) -> dict[int, BagTopic]:
    columns = [row[1] for row in connection.execute("PRAGMA table_info(topics)")]
    topics = {}
    for row in connection.execute("SELECT * FROM topics"):
        values = dict(zip(columns, row, strict=True))
        qos = lenient_qos(values.get("offered_qos_profiles"))
        topics[values["id"]] = BagTopic(values["name"], values["type"], values["serialization_format"], qos=qos)
    return topics


# Both


def lenient_qos(profiles: object) -> list[Qos]:
    """The offered QoS profiles that a recorder stored; none where they are missing or of a form unknown here."""
    try:
        return parse_qos(profiles) if profiles else []
    except (ReaderError, KeyError, TypeError, ValueError):
        return []


def _damage(path: Path, entries: list, cut_at_byte: int | None, lost_chunks: Collection[int] = ()) -> str | None:
    """The sentence that says what is missing, or None."""
    times = [time_ns for time_ns, _, _ in entries]
    readable = f"the {len(times)} messages before it"
    if times:
        readable += f" ({(max(times) - min(times)) / 1e9:.3f} s)"
    if cut_at_byte is not None:
        return f"bag file {path} is cut at byte {cut_at_byte}: {readable} are read, the rest is lost"
    if lost_chunks:
        places = ", ".join(map(str, lost_chunks))
        return f"bag file {path} is damaged at byte {places}: the messages of {len(lost_chunks)} chunks are lost, {len(times)} are read"
    return None
