# SPDX-License-Identifier: Apache-2.0
"""``nuscenes_to_bag``: one scene of a nuScenes-format data set as a rosbag2 bag, without a ROS installation.

Topics are named as nuscenes2mcap names them; every message is stamped with its sensor's own time, and recorded at it.
The keyframes' ground truth is there to score a replay: std_msgs/UInt8MultiArray carries no stamp, so each
``/ground_truth/labels`` and ``/ground_truth/mask_camera`` follows, at the same bag time, the ``/keyframe`` that it
belongs to: a std_msgs/Header with LIDAR_TOP's stamp and, as frame_id, the sample token.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from occflownet_core.command_line import exit_status
from occflownet_core.errors import BagError, DatasetError
from occflownet_core.poses import RecordedPose
from occflownet_core.rig_file import save_rig
from occflownet_ros import nuscenes_messages as messages
from occflownet_ros.nuscenes_scene import (
    LIDAR,
    Keyframe,
    Scene,
    SensorFrame,
    open_nuscenes,
    read_jpeg,
    read_labels,
    read_lidarseg,
    read_points,
    read_scene,
)

_HELP_END = """
topics (header stamp = the sensor's own time = bag time):
  /CAM_X/image_rect_compressed  sensor_msgs/CompressedImage  the data set's JPEG, byte for byte
  /CAM_X/camera_info            sensor_msgs/CameraInfo       K, P = [K|0], R = I, no distortion
  /LIDAR_TOP                    sensor_msgs/PointCloud2      x, y, z, intensity, ring (and lidarseg, if asked for)
  /odom                         nav_msgs/Odometry            base_link in map at every sensor's stamp
  /tf, /tf_static               tf2_msgs/TFMessage           map -> base_link; base_link -> each sensor
  /keyframe                     std_msgs/Header              stamp of LIDAR_TOP, sample token as frame_id
  /ground_truth/labels, /ground_truth/mask_camera  std_msgs/UInt8MultiArray  Occ3D [X, Y, Z], where gts/ has them
BAG/calibration.yaml holds the camera calibration for machines without tf.

example:
  nuscenes_to_bag --dataroot /data/nuscenes --version v1.0-mini --scene scene-0061 --out scene-0061
"""


class Outgoing(NamedTuple):
    """A message still to be made: where and when it goes, and how to make it."""

    time_ns: int
    topic: str
    msgtype: str
    serialise: Callable[[], bytes]


@dataclass
class TopicSummary:
    """What was written on one topic."""

    messages: int = 0
    bytes: int = 0
    first_ns: int = 0
    last_ns: int = 0

    def add(self, time_ns: int, size: int) -> None:
        self.first_ns = self.first_ns if self.messages else time_ns
        self.last_ns = time_ns
        self.messages += 1
        self.bytes += size


def outgoing_messages(scene: Scene, lidar: bool = True, lidarseg: bool = False) -> list[Outgoing]:
    """All messages of a scene in time order; where times are equal, poses come before what was seen from them."""
    everything = [*_calibration_messages(scene), *_pose_messages(scene)]
    for frame in scene.frames:
        if frame.modality == "camera":
            everything += _camera_messages(frame)
        elif frame.channel == LIDAR and lidar:
            everything.append(
                Outgoing(
                    frame.stamp_ns,
                    f"/{LIDAR}",
                    "sensor_msgs/msg/PointCloud2",
                    lambda frame=frame: _cloud(frame, lidarseg),
                )
            )
    for keyframe in scene.keyframes:
        everything += _keyframe_messages(keyframe)
    return sorted(everything, key=lambda message: message.time_ns)  # stable: equal times keep the order above


def _calibration_messages(scene: Scene) -> Iterator[Outgoing]:
    mounts = {
        name: frame.mount
        for name, frame in sorted(scene.channels.items())
        if frame.modality == "camera" or name == LIDAR
    }
    time_ns = scene.frames[0].stamp_ns
    yield Outgoing(
        time_ns, "/tf_static", "tf2_msgs/msg/TFMessage", lambda: messages.transforms(time_ns, "base_link", mounts)
    )


def _pose_messages(scene: Scene) -> Iterator[Outgoing]:
    by_stamp = scene.ego_poses
    global_from_ego = np.stack([ego.matrix for ego in by_stamp.values()])
    linear_mps, angular_radps = messages.twists(np.array(list(by_stamp)), global_from_ego)
    for (stamp, pose), linear, angular in zip(by_stamp.items(), linear_mps, angular_radps, strict=True):

        def transform(stamp: int = stamp, pose: RecordedPose = pose) -> bytes:
            return messages.transforms(stamp, "map", {"base_link": pose})

        def odometry(s: int = stamp, p: RecordedPose = pose, v: np.ndarray = linear, w: np.ndarray = angular) -> bytes:
            return messages.odometry(s, p, v, w)

        yield Outgoing(stamp, "/tf", "tf2_msgs/msg/TFMessage", transform)
        yield Outgoing(stamp, "/odom", "nav_msgs/msg/Odometry", odometry)


def _camera_messages(frame: SensorFrame) -> list[Outgoing]:
    stamp, name = frame.stamp_ns, frame.channel
    return [
        Outgoing(
            stamp,
            f"/{name}/camera_info",
            "sensor_msgs/msg/CameraInfo",
            lambda: messages.camera_info(stamp, frame.camera()),
        ),
        Outgoing(
            stamp,
            f"/{name}/image_rect_compressed",
            "sensor_msgs/msg/CompressedImage",
            lambda: messages.compressed_image(stamp, name, read_jpeg(frame)),
        ),
    ]


def _cloud(frame: SensorFrame, lidarseg: bool) -> bytes:
    points = read_points(frame)
    labels = read_lidarseg(frame, len(points)) if lidarseg else None
    return messages.point_cloud(frame.stamp_ns, frame.channel, points, labels)


def _keyframe_messages(keyframe: Keyframe) -> Iterator[Outgoing]:
    time_ns, array = keyframe.stamp_ns, "std_msgs/msg/UInt8MultiArray"
    yield Outgoing(time_ns, "/keyframe", "std_msgs/msg/Header", lambda: messages.header(time_ns, keyframe.token))
    if keyframe.labels_path is not None:
        for i, topic in enumerate(("/ground_truth/labels", "/ground_truth/mask_camera")):
            yield Outgoing(
                time_ns, topic, array, lambda i=i: messages.label_array(read_labels(keyframe.labels_path)[i])
            )


def write_bag(
    scene: Scene,
    folder: Path,
    storage: str = "mcap",
    compression: str = "none",
    lidar: bool = True,
    force: bool = False,
    lidarseg: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, TopicSummary]:
    """Write a scene as a rosbag2 folder with ``calibration.yaml`` in it.

    The folder appears when all of it is written; a failure leaves what was there before.

    Args:
        scene: what to write.
        folder: the bag.
        storage: ``mcap`` or ``sqlite3``.
        compression: ``none`` or ``zstd`` (MCAP: per chunk, sqlite3: per message).
        lidar: whether point clouds are written.
        force: whether an older bag may be replaced.
        lidarseg: whether point clouds carry nuScenes-lidarseg labels, where the scene has them.
        on_progress: called with messages written and in total.

    Raises:
        BagError: the folder exists or cannot be written.
        DatasetError: a measurement is missing or cut short, or there are no lidarseg labels.
    """
    _require_room(folder, force)
    if lidarseg and not any(frame.lidarseg_path for frame in scene.frames):
        raise DatasetError(
            f"scene {scene.name} has no lidarseg labels; unpack nuScenes-lidarseg, or leave --lidarseg out"
        )
    plugin = StoragePlugin[storage.upper()]
    rig = scene.rig
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".bag_") as temporary:
            unfinished = Path(temporary) / folder.name  # rosbag2 names its files after the folder
            writer = Writer(unfinished, version=8, storage_plugin=plugin)
            if compression == "zstd":
                mode = CompressionMode.STORAGE if plugin is StoragePlugin.MCAP else CompressionMode.MESSAGE
                writer.set_compression(mode, CompressionFormat.ZSTD)
            with writer:
                summary = _write_messages(writer, outgoing_messages(scene, lidar, lidarseg), on_progress)
            mounts = {name: frame.mount for name, frame in scene.channels.items()}
            save_rig(rig, unfinished / "calibration.yaml", f"cameras of {scene.name}", mounts)
            if folder.exists():
                shutil.rmtree(folder)
            unfinished.rename(folder)
    except OSError as error:
        raise BagError(f"bag {folder} cannot be written: {error}; choose another --out") from None
    return summary


def _require_room(folder: Path, force: bool) -> None:
    """Refuse to write over anything, unless it is a bag and may be replaced."""
    if not folder.exists():
        return
    if not force:
        raise BagError(f"{folder} exists already; name another --out, or replace it with --force")
    if not folder.is_dir():
        raise BagError(f"{folder} is a file, not a bag; --force does not remove it")
    ours = {"metadata.yaml", "calibration.yaml"}
    strangers = [f.name for f in folder.iterdir() if f.name not in ours and f.suffix not in (".mcap", ".db3", ".zstd")]
    if strangers:
        raise BagError(f"{folder} is not only a bag: it holds {min(strangers)}; --force does not remove it")


def _write_messages(
    writer: Writer, outgoing: list[Outgoing], on_progress: Callable[[int, int], None]
) -> dict[str, TopicSummary]:
    connections, summary = {}, {}
    for done, message in enumerate(outgoing, start=1):
        if message.topic not in connections:
            connections[message.topic] = writer.add_connection(
                message.topic,
                message.msgtype,
                typestore=messages.typestore(),
                offered_qos_profiles=[_offered_qos(message.topic)],
            )
            summary[message.topic] = TopicSummary()
        data = message.serialise()
        writer.write(connections[message.topic], message.time_ns, data)
        summary[message.topic].add(message.time_ns, len(data))
        on_progress(done, len(outgoing))
    return summary


def _offered_qos(topic: str) -> Qos:
    """Reliable, so that subscribers of either kind match; /tf_static is kept for late joiners."""
    latched = topic == "/tf_static"
    endless = QosTime(9223372036, 854775807)
    return Qos(
        QosHistory.KEEP_LAST,
        1 if latched else 100,
        QosReliability.RELIABLE,
        QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE,
        endless,
        endless,
        QosLiveliness.AUTOMATIC,
        endless,
        False,
    )


def summary_table(summary: dict[str, TopicSummary]) -> Table:
    """Topics with messages, seconds from first to last, and megabytes."""
    table = Table()
    table.add_column("topic", no_wrap=True)
    for heading in ("messages", "seconds", "MB"):
        table.add_column(heading, justify="right")
    for name, topic in sorted(summary.items()):
        seconds = (topic.last_ns - topic.first_ns) / 1e9
        table.add_row(name, str(topic.messages), f"{seconds:.2f}", f"{topic.bytes / 1e6:.2f}")
    first, last = min(t.first_ns for t in summary.values()), max(t.last_ns for t in summary.values())
    table.add_section()
    table.add_row(
        "all",
        str(sum(t.messages for t in summary.values())),
        f"{(last - first) / 1e9:.2f}",
        f"{sum(t.bytes for t in summary.values()) / 1e6:.2f}",
    )
    return table


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nuscenes_to_bag",
        description="Write one scene of a nuScenes-format data set as a rosbag2 bag. Needs no ROS installation.",
        epilog=_HELP_END,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataroot", type=Path, required=True, help="folder with samples/ and the version's tables")
    parser.add_argument("--version", default="v1.0-mini", help="folder of the tables (default: %(default)s)")
    parser.add_argument("--scene", required=True, help="name of the scene, e.g. scene-0061")
    parser.add_argument("--out", type=Path, required=True, metavar="BAG", help="folder to make")
    parser.add_argument("--storage", choices=("mcap", "sqlite3"), default="mcap", help="default: %(default)s")
    parser.add_argument(
        "--compression",
        choices=("none", "zstd"),
        default="none",
        help="zstd helps point clouds and labels; JPEGs do not get smaller (default: %(default)s)",
    )
    parser.add_argument("--no-lidar", action="store_true", help="leave the point clouds out")
    parser.add_argument(
        "--lidarseg", action="store_true", help="add a field lidarseg to the point clouds: each point's class"
    )
    parser.add_argument("--keyframes-only", action="store_true", help="leave the sweeps between keyframes out")
    parser.add_argument("--force", action="store_true", help="replace a bag that is at BAG already")
    return parser.parse_args(argv)


def convert(arguments: argparse.Namespace, console: Console) -> None:
    """Read the scene, write the bag, print the summary.

    Raises:
        OccflownetError: bad input; the message is one sentence.
    """
    scene = read_scene(
        open_nuscenes(arguments.dataroot, arguments.version), arguments.scene, sweeps=not arguments.keyframes_only
    )
    for note in scene.notes:
        print(f"nuscenes_to_bag: {note}", file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} messages"))
    errors = Console(stderr=True, highlight=False)
    with Progress(
        *columns, TimeRemainingColumn(), console=errors, transient=True, disable=not errors.is_terminal
    ) as progress:
        task = progress.add_task(scene.name)
        summary = write_bag(
            scene,
            arguments.out,
            arguments.storage,
            arguments.compression,
            lidar=not arguments.no_lidar,
            force=arguments.force,
            lidarseg=arguments.lidarseg,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(summary_table(summary))
    size = sum(file.stat().st_size for file in arguments.out.iterdir())
    console.print(f"{arguments.out}: {size / 1e6:.1f} MB on the disk", soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Console entry point; 2 on bad input."""
    arguments = parse_arguments(argv)
    return exit_status("nuscenes_to_bag", lambda: convert(arguments, Console()))


if __name__ == "__main__":
    sys.exit(main())
