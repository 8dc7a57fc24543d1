# SPDX-License-Identifier: Apache-2.0
"""Scanning sqlite3 bag files page by page (https://sqlite.org/fileformat2.html).

A row is found by its own page, not through the tree above it: an upper page of the tree may lie behind the cut while
most rows lie before it. Pages of a bag are never freed, so that every leaf page holds rows that count.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from occflownet_core.errors import BagError
from occflownet_ros.bag_scan import BagTopic, ScannedFile, damage_sentence, lenient_qos

_MAGIC = b"SQLite format 3\0"
_FILE_HEADER_BYTES, _LEAF_HEADER_BYTES = 100, 8
_TABLE_LEAF = 0x0D
_INTEGER_BYTES = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8, 7: 8, 8: 0, 9: 0}


class ScannedSqlite(ScannedFile):
    """Entries point to the row's cell: its byte in the file."""

    def __init__(self, path: Path, pages: _Pages, **scanned: object) -> None:
        self._pages = pages
        super().__init__(path, **scanned)

    def _read(self, where: int) -> bytes:
        return _record(self._pages.payload(where))[3]

    def close(self) -> None:
        self._pages.buffer.release()


def scan_sqlite(path: Path) -> ScannedSqlite:
    """Scan a rosbag2 database, whole or cut.

    Raises:
        BagError: it is no SQLite database, or no table of topics is left in it.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC or path.stat().st_size < _FILE_HEADER_BYTES:
            raise BagError(f"{path} is no rosbag2 database; give a file that rosbag2 wrote")
        pages = _Pages(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    topics: dict[int, BagTopic] = {}
    rows: dict[int, tuple[int, int, object]] = {}
    unreadable = 0
    for cell in pages.leaf_cells():
        try:
            record = _record(pages.payload(cell))
        except (IndexError, ValueError):
            unreadable += 1
            continue
        if _is_topic(record):
            topics[pages.rowid(cell)] = _topic(record)
        elif _is_message(record):
            rows.setdefault(pages.rowid(cell), (record[2], record[1], cell))
    if not topics:
        raise BagError(f"{path} is no rosbag2 database, or was cut before its topics; give a file that rosbag2 wrote")
    entries = [entry for _, entry in sorted(rows.items()) if entry[1] in topics]
    size = len(pages.buffer)
    cut_at_byte = size if size < pages.announced_bytes else None
    damage = damage_sentence(path, entries, cut_at_byte, lost_rows=unreadable)
    return ScannedSqlite(path, pages, topics_by_key=topics, entries=entries, damage=damage)


def is_cut(path: Path) -> bool:
    """Whether a database is shorter than its header says.

    SQLite refuses such a file, unless the cut is in its last page: then it reads the missing part as zeros, unnoticed.
    """
    with path.open("rb") as file:
        header = file.read(_FILE_HEADER_BYTES)
    page_bytes = _uint(header, 16, 2)
    return path.stat().st_size < _uint(header, 28, 4) * (65536 if page_bytes == 1 else page_bytes)


class _Pages:
    """The whole pages of a database file; a page that was cut is none of them."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        page_bytes = _uint(buffer, 16, 2)
        self.page_bytes = 65536 if page_bytes == 1 else max(page_bytes, 512)
        self.usable_bytes = self.page_bytes - buffer[20]
        self.count = len(buffer) // self.page_bytes
        self.announced_bytes = _uint(buffer, 28, 4) * self.page_bytes

    def leaf_cells(self) -> Iterator[int]:
        """Where each row of each table begins in the file."""
        for page in range(self.count):
            begin = page * self.page_bytes
            header = begin + (_FILE_HEADER_BYTES if page == 0 else 0)
            if self.buffer[header] != _TABLE_LEAF:
                continue
            pointers = header + _LEAF_HEADER_BYTES
            most = (begin + self.page_bytes - pointers) // 2
            for i in range(min(_uint(self.buffer, header + 3, 2), most)):
                yield begin + _uint(self.buffer, pointers + 2 * i, 2)

    def rowid(self, cell: int) -> int:
        _, position = _varint(self.buffer, cell)
        return _varint(self.buffer, position)[0]

    def payload(self, cell: int) -> bytes:
        """The row's record, collected from its overflow pages.

        Raises:
            ValueError: one of them lies behind the cut.
        """
        total, position = _varint(self.buffer, cell)
        _, position = _varint(self.buffer, position)
        local = self._local_bytes(total)
        parts = [self.buffer[position : position + local]]
        missing = total - local
        page = _uint(self.buffer, position + local, 4) if missing else 0
        while missing:
            if not 0 < page <= self.count:
                raise ValueError("the row continues behind the end of the file")
            begin = (page - 1) * self.page_bytes
            size = min(missing, self.usable_bytes - 4)
            parts.append(self.buffer[begin + 4 : begin + 4 + size])
            missing -= size
            page = _uint(self.buffer, begin, 4)
        return b"".join(parts)

    def _local_bytes(self, total: int) -> int:
        """How much of a record its leaf page holds itself (file format, section 1.6)."""
        most = self.usable_bytes - 35
        if total <= most:
            return total
        least = (self.usable_bytes - 12) * 32 // 255 - 23
        fitting = least + (total - least) % (self.usable_bytes - 4)
        return fitting if fitting <= most else least


def _record(payload: bytes) -> list[int | bytes | None]:
    """The row's values, text as bytes (file format, section 2.1)."""
    header_end, position = _varint(payload, 0)
    values, body = [], header_end
    while position < header_end:
        kind, position = _varint(payload, position)
        size = (kind - 12) // 2 if kind >= 12 else _INTEGER_BYTES.get(kind, 0)
        data = payload[body : body + size]
        if len(data) < size:
            raise ValueError("a value reaches beyond its row")
        body += size
        if kind >= 12:
            values.append(data)
        else:
            values.append({0: None, 8: 0, 9: 1}.get(kind, int.from_bytes(data, "big", signed=True)))
    return values


def _is_topic(record: list) -> bool:
    # id, name, type, serialization_format [, offered_qos_profiles [, type_description_hash]]
    texts = record[1:4]
    return record[:1] == [None] and len(texts) == 3 and all(isinstance(t, bytes) for t in texts) and b"/" in texts[1]


def _topic(record: list) -> BagTopic:
    name, msgtype, serialization = (value.decode() for value in record[1:4])
    qos = record[4].decode() if len(record) > 4 and isinstance(record[4], bytes) else ""
    return BagTopic(name, msgtype, serialization, qos=lenient_qos(qos))


def _is_message(record: list) -> bool:
    # id (always NULL: it is the row id), topic_id, timestamp, data
    kinds = [type(value) for value in record]
    return kinds == [type(None), int, int, bytes]


def _varint(buffer: bytes | memoryview, position: int) -> tuple[int, int]:
    """A big-endian integer of 1 to 9 bytes, 7 bits each (8 in the ninth), and the position behind it."""
    value = 0
    for i in range(8):
        byte = buffer[position + i]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, position + i + 1
    return value << 8 | buffer[position + 8], position + 9


def _uint(buffer: bytes | memoryview, position: int, size: int) -> int:
    return int.from_bytes(buffer[position : position + size], "big")
