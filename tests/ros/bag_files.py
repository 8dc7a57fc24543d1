# SPDX-License-Identifier: Apache-2.0
"""Bags for tests, written by every writer there is: rosbags, the MCAP library, and sqlite3 as Humble lays it out."""

import sqlite3
from pathlib import Path

import numpy as np
import yaml
from mcap.writer import Writer as McapLibraryWriter
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from occflownet_ros import nuscenes_messages as messages
from occflownet_ros.bag import Bag, BagMessage

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


def same(received: list[BagMessage], expected: list[BagMessage]) -> bool:
    """Equality, for asserts whose failure should not print megabytes."""
    return received == expected
