# SPDX-License-Identifier: Apache-2.0
"""Reading bags: every layout that rosbag2 writes gives back what was recorded; what is no bag gets a sentence."""

import shutil
import sqlite3
import struct

import pytest
from mcap.writer import CompressionType
from mcap.writer import Writer as McapLibraryWriter
from rosbags.interfaces import QosDurability, QosReliability
from rosbags.rosbag2 import CompressionMode, StoragePlugin

from occflownet_core.errors import BagError
from occflownet_ros import nuscenes_messages as messages
from occflownet_ros.bag import Bag
from occflownet_ros.bag_scan_mcap import scan_mcap
from tests.ros.bag_files import (
    IMAGE,
    assert_whole,
    read,
    recorded,
    write_like_humble,
    write_with_mcap_library,
    write_with_rosbags,
)

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


def test_cdr_never_looks_like_zstd():
    """Message-wise compression is recognised by its first bytes; CDR starts with a zero byte and its byte order."""
    assert messages.header(1, "x")[:2] == struct.pack(">H", 1)
