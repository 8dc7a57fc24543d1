# SPDX-License-Identifier: Apache-2.0
"""Scanning MCAP files (https://mcap.dev/spec): a chain of records, mostly in chunks.

The last chunk of a cut file may be cut itself; what lies before the cut in it counts.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lz4.frame

from occflownet_core.errors import BagError
from occflownet_ros.bag_scan import BagTopic, ScannedFile, damage_sentence, lenient_qos

try:
    from compression import zstd
except ImportError:
    from backports import zstd

_MCAP_MAGIC = b"\x89MCAP0\r\n"
_FOOTER, _SCHEMA, _CHANNEL, _MESSAGE, _CHUNK = 0x02, 0x03, 0x04, 0x05, 0x06
_MESSAGE_HEADER = struct.Struct("<HIQQ")  # channel, sequence, log time, publish time
_CHUNK_HEADER = struct.Struct("<QQQI")  # first time, last time, uncompressed size, CRC-32


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
    damage = damage_sentence(path, found.entries, cut_at_byte, found.lost_chunks)
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
