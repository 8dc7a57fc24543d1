# SPDX-License-Identifier: Apache-2.0
"""Reading bags: every layout that rosbag2 writes gives back what was recorded, and a cut one all that precedes the cut."""

import shutil
import sqlite3
import struct
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mcap.writer import CompressionType
from mcap.writer import Writer as McapLibraryWriter
from rosbags.interfaces import QosDurability, QosReliability
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from occflownet_core.errors import BagError
from occflownet_ros import nuscenes_messages as messages
from occflownet_ros.bag import Bag, BagMessage
from occflownet_ros.bag_scan_mcap import scan_mcap
from occflownet_ros.bag_scan_sqlite import scan_sqlite

IMAGE, HEADER = "sensor_msgs/msg/CompressedImage", "std_msgs/msg/Header"


def recorded(count: int, image_bytes: int = 300_000) -> list[BagMessage]:
    """A header every 10 ms and an image every 50 ms; a header and an image that coincide keep this order."""
    rng = np.random.default_rng(7)
    result = []
    for i in range(count):
        stamp = 1_000_000_000 + 10_000_000 * i
        result.append(BagMessage("/keyframe", HEADER, stamp, messages.header(stamp, f"token-{i}")))
        if i % 5 == 0:
            jpeg = rng.integers(0, 256, image_bytes, dtype=np.uint8).tobytes()
            result.append(BagMessage("/image", IMAGE, stamp, messages.compressed_image(stamp, "CAM", jpeg)))
    return result


def write_with_rosbags(
    path: Path, sent: list[BagMessage], plugin=StoragePlugin.MCAP, mode=CompressionMode.NONE
) -> Path:
    writer = Writer(path, version=9, storage_plugin=plugin)
    writer.set_compression(mode, CompressionFormat.ZSTD)
    with writer:
        connections = {}
        for message in sent:
            if message.topic not in connections:
                connections[message.topic] = writer.add_connection(
                    message.topic, message.msgtype, typestore=messages.typestore()
                )
            writer.write(connections[message.topic], message.time_ns, message.data)
    return path


def write_with_mcap_library(path: Path, sent: list[BagMessage], **options) -> Path:
    """As rosbag2_storage_mcap does it: profile ros2, schemas as ros2msg, QoS in the channel's metadata."""
    with path.open("wb") as file:
        writer = McapLibraryWriter(file, **options)
        writer.start(profile="ros2", library="libmcap")
        channels = {}
        for message in sent:
            if message.topic not in channels:
                definition, _ = messages.typestore().generate_msgdef(message.msgtype, ros_version=2)
                schema = writer.register_schema(message.msgtype, "ros2msg", definition.encode())
                channels[message.topic] = writer.register_channel(
                    message.topic, "cdr", schema, {"offered_qos_profiles": QOS_OF_HUMBLE}
                )
            writer.add_message(channels[message.topic], message.time_ns, message.data, message.time_ns)
        writer.finish()
    return path


QOS_OF_HUMBLE = """\
- history: 1
  depth: 5
  reliability: 2
  durability: 2
  deadline:
    sec: 9223372036
    nsec: 854775807
  lifespan:
    sec: 9223372036
    nsec: 854775807
  liveliness: 1
  liveliness_lease_duration:
    sec: 9223372036
    nsec: 854775807
  avoid_ros_namespace_conventions: false"""


def write_like_humble(folder: Path, sent: list[BagMessage], name: str = "bag_0.db3", commit_every: int = 10**9) -> Path:
    """The sqlite3 layout of rosbag2 in Humble: database schema 3, metadata.yaml version 5."""
    folder.mkdir(exist_ok=True)
    database = sqlite3.connect(folder / name)
    database.executescript(
        """
        CREATE TABLE schema(schema_version INTEGER PRIMARY KEY, ros_distro TEXT NOT NULL);
        CREATE TABLE metadata(id INTEGER PRIMARY KEY, metadata_version INTEGER NOT NULL, metadata TEXT NOT NULL);
        CREATE TABLE topics(id INTEGER PRIMARY KEY, name TEXT NOT NULL, type TEXT NOT NULL,
                            serialization_format TEXT NOT NULL, offered_qos_profiles TEXT NOT NULL);
        CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id INTEGER NOT NULL, timestamp INTEGER NOT NULL,
                              data BLOB NOT NULL);
        CREATE INDEX timestamp_idx ON messages (timestamp ASC);
        INSERT INTO schema VALUES (3, 'humble');
        """
    )
    topics = {}
    for i, message in enumerate(sent):
        if message.topic not in topics:
            topics[message.topic] = len(topics) + 1
            row = (topics[message.topic], message.topic, message.msgtype, "cdr", QOS_OF_HUMBLE)
            database.execute("INSERT INTO topics VALUES (?, ?, ?, ?, ?)", row)
        row = (topics[message.topic], message.time_ns, message.data)
        database.execute("INSERT INTO messages(topic_id, timestamp, data) VALUES (?, ?, ?)", row)
        if i % commit_every == commit_every - 1:
            database.commit()
    database.commit()
    database.close()
    information = {
        "version": 5,
        "storage_identifier": "sqlite3",
        "relative_file_paths": [name],
        "duration": {"nanoseconds": sent[-1].time_ns - sent[0].time_ns},
        "starting_time": {"nanoseconds_since_epoch": sent[0].time_ns},
        "message_count": len(sent),
        "topics_with_message_count": [
            {
                "topic_metadata": {
                    "name": topic,
                    "type": next(m.msgtype for m in sent if m.topic == topic),
                    "serialization_format": "cdr",
                    "offered_qos_profiles": QOS_OF_HUMBLE,
                },
                "message_count": sum(m.topic == topic for m in sent),
            }
            for topic in topics
        ],
        "compression_format": "",
        "compression_mode": "",
    }
    (folder / "metadata.yaml").write_text(yaml.safe_dump({"rosbag2_bagfile_information": information}))
    return folder


def read(path: Path) -> tuple[list[BagMessage], list[str]]:
    with Bag(path) as bag:
        received = list(bag.messages())
        assert bag.message_count >= len(received)
        return received, bag.damage


def assert_whole(path: Path, expected: list[BagMessage]) -> None:
    received, damage = read(path)
    assert damage == []
    assert same(received, expected)


LAYOUTS = [(plugin, mode) for plugin in StoragePlugin for mode in CompressionMode]
LAYOUTS.remove((StoragePlugin.SQLITE3, CompressionMode.STORAGE))  # sqlite3 has no compression of its own


@pytest.mark.parametrize(("plugin", "mode"), LAYOUTS)
@pytest.mark.parametrize("keep_metadata", [True, False])
def test_rosbags_layouts_round_trip(tmp_path, plugin, mode, keep_metadata):
    sent = recorded(12)
    path = write_with_rosbags(tmp_path / "bag", sent, plugin, mode)
    if not keep_metadata:
        (path / "metadata.yaml").unlink()
    assert_whole(path, sent)


def test_attributes_filters_and_single_files(tmp_path):
    sent = recorded(12)
    folder = write_with_rosbags(tmp_path / "bag", sent)
    with Bag(folder / "bag.mcap") as bag:
        assert (bag.start_ns, bag.end_ns) == (1_000_000_000, 1_110_000_000)
        assert {name: topic.message_count for name, topic in bag.topics.items()} == {"/keyframe": 12, "/image": 3}
        assert bag.topics["/image"].msgtype == IMAGE
        times = [m.time_ns for m in bag.messages({"/image"}, start_ns=1_050_000_000)]
        assert times == [1_050_000_000, 1_100_000_000]
        assert [m.time_ns for m in bag.messages({"/image"}, stop_ns=1_050_000_000)] == [1_000_000_000]
        assert list(bag.messages({"/nothing"})) == []


@pytest.mark.parametrize(
    "options",
    [
        {"compression": CompressionType.NONE},
        {"compression": CompressionType.LZ4, "chunk_size": 100_000},
        {"use_chunking": False},
        {"use_chunking": False, "use_statistics": False, "use_summary_offsets": False},
        {"compression": CompressionType.NONE, "index_types": 0, "enable_crcs": False},
    ],
)
def test_files_of_the_mcap_library_round_trip(tmp_path, options):
    from mcap.writer import IndexType

    if "index_types" in options:
        options = {**options, "index_types": IndexType.NONE}
    sent = recorded(12)
    path = write_with_mcap_library(tmp_path / "rec.mcap", sent, **options)
    assert_whole(path, sent)
    scanned = scan_mcap(path)  # the slow twin agrees
    assert list(scanned.messages(None, 0, 2**63 - 1)) == sent
    assert scanned.damage is None
    with Bag(path) as bag:
        assert bag.topics["/image"].qos[0].reliability is QosReliability.BEST_EFFORT
        assert bag.topics["/image"].qos[0].durability is QosDurability.VOLATILE
        assert bag.topics["/image"].qos[0].depth == 5


def test_unsorted_files_come_out_in_time_order(tmp_path):
    sent = recorded(12)
    shuffled = sent[::-1]
    for name, options in (("a", {"use_chunking": False}), ("b", {"compression": CompressionType.NONE})):
        path = write_with_mcap_library(tmp_path / f"{name}.mcap", shuffled, **options)
        times = [m.time_ns for m in read(path)[0]]
        assert times == sorted(m.time_ns for m in sent)


def test_bag_that_humble_wrote(tmp_path):
    sent = recorded(12)
    folder = write_like_humble(tmp_path / "bag", sent)
    assert_whole(folder, sent)
    with Bag(folder) as bag:
        assert bag.topics["/keyframe"].qos[0].reliability is QosReliability.BEST_EFFORT


def test_split_bag_is_one_bag_in_natural_order_of_its_parts(tmp_path):
    sent = recorded(22)
    folder = tmp_path / "bag"
    for part, begin in ((2, 0), (10, 9), (11, 18)):  # 10 sorts before 2 as text
        write_like_humble(folder, sent[begin : begin + 9], name=f"bag_{part}.db3")
    (folder / "metadata.yaml").unlink()
    assert_whole(folder, sent)


def test_write_ahead_log_of_a_killed_recorder_is_read(tmp_path):
    sent = recorded(6)
    folder = write_like_humble(tmp_path / "whole", sent[:4])
    database = sqlite3.connect(folder / "bag_0.db3")
    database.execute("PRAGMA journal_mode = WAL")
    for message in sent[4:]:
        topic = {"/keyframe": 1, "/image": 2}[message.topic]
        row = (topic, message.time_ns, message.data)
        database.execute("INSERT INTO messages(topic_id, timestamp, data) VALUES (?, ?, ?)", row)
    database.commit()
    killed = tmp_path / "killed"
    shutil.copytree(folder, killed)  # while the writer still has its rows in the log
    database.close()
    assert (killed / "bag_0.db3-wal").stat().st_size > 0
    assert_whole(killed, sent)


# Cuts


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


def same(received: list[BagMessage], expected: list[BagMessage]) -> bool:
    """Equality, for asserts whose failure should not print megabytes."""
    return received == expected


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


# Sentences


def test_what_is_no_bag_gets_one_sentence(tmp_path):
    with pytest.raises(BagError, match="there is no bag at"):
        Bag(tmp_path / "nothing")
    with pytest.raises(BagError, match="holds no"):
        Bag(tmp_path)
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(BagError, match="is not a"):
        Bag(tmp_path / "text.txt")
    for name, sentence in (("text.mcap", "does not start as an MCAP file"), ("text.db3", "no rosbag2 database")):
        (tmp_path / name).write_text("x" * 5000)
        with pytest.raises(BagError, match=sentence):
            Bag(tmp_path / name)
    (tmp_path / "empty.db3").write_bytes(b"")
    with pytest.raises(BagError, match="no rosbag2 database"):
        Bag(tmp_path / "empty.db3")
    sqlite3.connect(tmp_path / "other.db3").execute("CREATE TABLE t(x)").connection.close()
    with pytest.raises(BagError, match="no rosbag2 database"):
        Bag(tmp_path / "other.db3")


def test_missing_part_and_empty_bag_get_one_sentence(tmp_path):
    folder = write_like_humble(tmp_path / "bag", recorded(5))
    (folder / "bag_0.db3").rename(folder / "other.db3")
    with pytest.raises(BagError, match=r"lacks bag_0\.db3"):
        Bag(folder)
    empty = write_with_rosbags(tmp_path / "empty", [])
    with pytest.raises(BagError, match="holds no messages"):
        Bag(empty)


def test_other_serialisations_are_refused(tmp_path):
    path = tmp_path / "json.mcap"
    with path.open("wb") as file:
        writer = McapLibraryWriter(file)
        writer.start(profile="ros2", library="x")
        schema = writer.register_schema("a/msg/B", "jsonschema", b"{}")
        writer.add_message(writer.register_channel("/b", "json", schema), 1, b"{}", 1)
        writer.finish()
    with pytest.raises(BagError, match="/b is serialised as 'json'"):
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


def test_cdr_never_looks_like_zstd():
    """Message-wise compression is recognised by its first bytes; CDR starts with a zero byte and its byte order."""
    assert messages.header(1, "x")[:2] == struct.pack(">H", 1)
