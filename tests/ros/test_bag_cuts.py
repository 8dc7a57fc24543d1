# SPDX-License-Identifier: Apache-2.0
"""Reading bags that were cut or damaged: all that precedes the cut comes back, and nothing that never was."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mcap.writer import CompressionType
from rosbags.rosbag2 import CompressionMode, StoragePlugin

from occflownet_core.errors import BagError
from occflownet_ros.bag import Bag, BagMessage
from occflownet_ros.bag_scan_mcap import scan_mcap
from occflownet_ros.bag_scan_sqlite import scan_sqlite
from tests.ros.bag_files import read, recorded, same, write_like_humble, write_with_mcap_library, write_with_rosbags


@cache
def long_recording() -> list[BagMessage]:
    return recorded(400, image_bytes=30_000)


@cache
def file_to_cut(name: str) -> bytes:
    """The bytes of a whole file of ``long_recording``."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        if name == "rosbags.mcap":
            path = write_with_rosbags(path.with_suffix(""), long_recording()) / name
        elif name == "zstd.mcap":
            path = write_with_rosbags(path.with_suffix(""), long_recording(), mode=CompressionMode.STORAGE) / name
        elif name == "lz4.mcap":
            lz4 = CompressionType.LZ4
            path = write_with_mcap_library(path, long_recording(), compression=lz4, chunk_size=150_000)
        elif name == "plain.mcap":
            path = write_with_mcap_library(path, long_recording(), use_chunking=False)
        elif name == "humble.db3":
            path = write_like_humble(path.with_suffix(""), long_recording(), name) / name
        elif name == "rosbags.db3":
            path = write_with_rosbags(path.with_suffix(""), long_recording(), StoragePlugin.SQLITE3) / name
        return path.read_bytes()


FILES_TO_CUT = ("rosbags.mcap", "zstd.mcap", "lz4.mcap", "plain.mcap", "humble.db3", "rosbags.db3")


def wholly_before(data: bytes, cut: int, sent: list[BagMessage]) -> int:
    """How many messages lie before the cut byte for byte, found by looking for their bytes in the file."""
    return sum(data.find(message.data) >= 0 and data.find(message.data) + len(message.data) <= cut for message in sent)


@pytest.mark.parametrize("name", FILES_TO_CUT)
@settings(max_examples=12, deadline=None)
@given(fraction=st.floats(0.15, 0.97))
def test_what_precedes_a_cut_is_read(name, fraction, tmp_path_factory):
    data = file_to_cut(name)
    cut = int(fraction * len(data))
    path = tmp_path_factory.mktemp("cut") / name
    path.write_bytes(data[:cut])
    received, damage = read(path)
    sent = long_recording()
    assert len(received) < len(sent)
    (sentence,) = damage
    assert f"is cut at byte {cut}" in sentence
    assert f"the {len(received)} messages before it" in sentence
    if name in ("rosbags.mcap", "plain.mcap"):
        assert same(received, sent[: wholly_before(data, cut, sent)])
        return
    # zstd keeps blocks of 128 KiB, lz4 of 64 KiB. A leaf page of sqlite3 holds small rows beside the head of a large
    # one: where the large one is cut, the small ones behind it are still there.
    certain = max(0, int(len(sent) * (cut - 150_000) / len(data)))
    assert same(received[:certain], sent[:certain])
    assert is_subsequence(received, sent)
    if name == "zstd.mcap" or name == "lz4.mcap":
        assert same(received, sent[: len(received)])


def is_subsequence(part: list[BagMessage], whole: list[BagMessage]) -> bool:
    rest = iter(whole)
    return all(message in rest for message in part)


def test_half_a_page_never_becomes_a_message(tmp_path):
    """SQLite itself would read the missing part of its last page as zeros, and call it part of a message."""
    data = file_to_cut("humble.db3")
    middle, last = len(data) // 2 // 4096 * 4096, len(data) - 4096
    for cut in [*range(middle + 1, middle + 4096, 409), *range(last + 1, last + 4096, 409)]:
        path = tmp_path / "half.db3"
        path.write_bytes(data[:cut])
        received, damage = read(path)
        assert is_subsequence(received, long_recording())
        assert len(received) > 150
        assert f"is cut at byte {cut}" in damage[0]


def test_cut_bag_folder_with_metadata_and_second_file(tmp_path):
    sent = recorded(20)
    folder = write_like_humble(tmp_path / "bag", sent[:12])
    write_like_humble(folder, sent[12:], name="bag_1.db3")
    metadata = yaml.safe_load((folder / "metadata.yaml").read_text())
    metadata["rosbag2_bagfile_information"]["relative_file_paths"] = ["bag_0.db3", "bag_1.db3"]
    (folder / "metadata.yaml").write_text(yaml.safe_dump(metadata))
    first = folder / "bag_0.db3"
    first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    received, damage = read(folder)
    assert received[-12:] == sent[12:]  # the second file is whole
    assert len(damage) == 1
    assert "bag_0.db3" in damage[0]


def test_file_compression_that_was_cut(tmp_path):
    sent = recorded(30)
    folder = write_with_rosbags(tmp_path / "bag", sent, mode=CompressionMode.FILE)
    file = folder / "bag.mcap.zstd"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    received, damage = read(folder)
    assert received == sent[: len(received)]
    assert len(received) >= 12
    assert f"bag file {file} is cut" in damage[0]


@pytest.mark.parametrize("compression", [CompressionType.NONE, CompressionType.LZ4])
def test_one_damaged_chunk_costs_its_own_messages_only(tmp_path, compression):
    sent = recorded(40, image_bytes=60_000)
    path = write_with_mcap_library(tmp_path / "rec.mcap", sent, compression=compression, chunk_size=150_000)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    received, damage = read(path)
    assert len(received) == 48 - 18  # 150 kB are full with the third image: 3 images and 15 headers
    assert set(received) < set(sent)
    assert received == sorted(received, key=lambda m: m.time_ns)
    assert received[-1] == sent[-1]
    assert "damaged at byte" in damage[0]


def test_zero_filled_tail_is_a_cut(tmp_path):
    """After a power failure the file may have its length, but zeros at the end."""
    data = file_to_cut("plain.mcap")
    path = tmp_path / "tail.mcap"
    half = len(data) // 2
    path.write_bytes(data[:half] + bytes(len(data) - half))
    received, damage = read(path)
    # The record that spans the cut has its full length, with zeros in it: unchunked MCAP has no checksum to tell.
    assert same(received[:-1], long_recording()[: len(received) - 1])
    assert len(damage) == 1


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=400))
def test_garbage_behind_the_magic_gets_a_sentence(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("garbage") / "x.mcap"
    path.write_bytes(b"\x89MCAP0\r\n" + data)
    with pytest.raises(BagError, match=r"x\.mcap"):
        Bag(path)


@pytest.mark.parametrize("name", FILES_TO_CUT)
def test_scan_of_a_whole_file_equals_the_indexed_reader(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(file_to_cut(name))
    scanned = (scan_mcap if path.suffix == ".mcap" else scan_sqlite)(path)
    assert same(list(scanned.messages(None, 0, 2**63 - 1)), long_recording())
    assert same(read(path)[0], long_recording())
    assert scanned.damage is None
    scanned.close()
