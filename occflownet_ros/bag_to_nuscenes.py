# SPDX-License-Identifier: Apache-2.0
"""``bag_to_nuscenes``: drives recorded with a ROS 2 vehicle as a data root in the nuScenes format, to learn from.

The opposite of ``nuscenes_to_bag``, and for any vehicle: cameras, a LiDAR, odometry or /tf, and /tf_static.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from occflownet_core.command_line import exit_status
from occflownet_core.errors import BagError, ConfigError
from occflownet_ros.bag import Bag
from occflownet_ros.bag_survey import Survey
from occflownet_ros.drive_plan import Planner
from occflownet_ros.drive_recording import read_recording
from occflownet_ros.drive_writer import DriveSummary, RootWriter
from occflownet_ros.topic_guess import TRANSFORMS
from occflownet_ros.topic_map import TopicMap, load_topic_map, topic_map_yaml

_HELP_END = """
what a bag must hold:
  cameras       sensor_msgs/CompressedImage or Image, and each one's CameraInfo; other than rectified JPEGs are
                rectified as the CameraInfo says and encoded as JPEG
  LiDAR         sensor_msgs/PointCloud2; a field of classes per point becomes lidarseg labels (see --map)
  ego motion    nav_msgs/Odometry or /tf; every measurement gets the vehicle's pose at its own stamp
  /tf_static    from base_link (middle of the rear axle, on the ground) to every sensor

topics.yaml, for bags whose names do not say which topic is what; --list --write-map makes one to edit:
  cameras:
    CAM_FRONT: {image: /front/image_raw/compressed, camera_info: /front/camera_info}
  lidar: {topic: /velodyne_points, label_field: label, label_names: {10: vehicle.car, 40: flat.driveable_surface}}
  ego_motion: {odometry: /odom}         # or {tf: map}
  base_frame: base_link
  max_camera_time_diff_ms: 60           # a camera's image of a keyframe, around the LiDAR's stamp

examples:
  bag_to_nuscenes --bag drive --list --write-map topics.yaml
  bag_to_nuscenes --bag drive1 drive2 --map topics.yaml --out data/own
  bag_to_nuscenes --bag drive --no-lidar --rate-hz 4 --out data/own
"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bag_to_nuscenes",
        description="Turn rosbag2 recordings of a vehicle into a data root in the nuScenes format, which training reads.",
        epilog=_HELP_END,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bag", type=Path, nargs="+", required=True, help="rosbag2 folders, .mcap or .db3 files")
    parser.add_argument("--out", type=Path, metavar="DIR", help="data root to make; it must not exist")
    parser.add_argument("--map", type=Path, metavar="YAML", help="which topic is what (default: guessed, see --list)")
    parser.add_argument(
        "--list", action="store_true", help="show what the bags hold and what is missing, write nothing"
    )
    parser.add_argument("--write-map", type=Path, metavar="YAML", help="with --list: write the mapping to a new file")
    parser.add_argument(
        "--rate-hz", type=float, default=2.0, help="keyframes per second; the LiDAR's stamps are taken (default: 2)"
    )
    parser.add_argument(
        "--scene-s", type=float, default=0.0, help="cut drives into scenes of at most this length (default: one scene)"
    )
    parser.add_argument(
        "--no-lidar", action="store_true", help="leave the LiDAR out; keyframes follow the front camera"
    )
    parser.add_argument("--jpeg-quality", type=int, default=95, help="of images encoded anew (default: %(default)s)")
    parser.add_argument("--version", default="v1.0-mini", help="folder of the tables (default: %(default)s)")
    return parser.parse_args(argv)


def convert(arguments: argparse.Namespace, console: Console, errors: Console) -> None:
    """Write the data root and print what became of each drive. It appears when all of it is written.

    Raises:
        OccflownetError: bad input; the message is one sentence.
    """
    _check(arguments)
    out: Path = arguments.out
    topic_map = load_topic_map(arguments.map) if arguments.map else None
    names = drive_names(arguments.bag)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=".nuscenes_") as temporary:
            unfinished = Path(temporary) / out.name
            unfinished.mkdir()
            writer = RootWriter(unfinished, arguments.version, arguments.jpeg_quality)
            summaries = [
                _add_drive(writer, path, name, topic_map, arguments, errors)
                for path, name in zip(arguments.bag, names, strict=True)
            ]
            writer.finish()
            unfinished.rename(out)
    except OSError as error:
        raise BagError(f"{out} cannot be written: {error}; make room, or choose another --out") from None
    for summary in summaries:
        console.print(summary_table(summary))
        for reason, count in summary.left_out.most_common():
            console.print(f"left out of {summary.name}: {count} moments: {reason}", soft_wrap=True, markup=False)
    console.print(
        f"{out}: {sum(len(s.scenes) for s in summaries)} scenes, {arguments.version}", soft_wrap=True, markup=False
    )


def _add_drive(
    writer: RootWriter,
    path: Path,
    name: str,
    topic_map: TopicMap | None,
    arguments: argparse.Namespace,
    errors: Console,
) -> DriveSummary:
    with Bag(path) as bag, _progress(errors) as progress:
        survey = Survey(bag, topic_map, wants_lidar=not arguments.no_lidar)
        problems = list(survey.problems())
        if problems:
            more = f" (and {len(problems) - 1} more: see --list)" if len(problems) > 1 else ""
            raise BagError(problems[0] + more)

        def stage(what: str):
            task = progress.add_task(f"{name}: {what}", total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        recording = read_recording(survey, not arguments.no_lidar, stage("reading stamps"))
        plan = Planner(survey, recording, arguments.rate_hz, arguments.scene_s, name).plan()
        summary = writer.add_drive(name, survey, plan, stage("writing keyframes"))
        _report_damage(bag, survey, errors)
    return summary


def _report_damage(bag: Bag, survey: Survey, errors: Console) -> None:
    for sentence in bag.damage:
        errors.print(f"bag_to_nuscenes: {sentence}", soft_wrap=True, markup=False)
    for topic, count in survey.refused.items():
        errors.print(
            f"bag_to_nuscenes: {count} poses on {topic} are no poses (NaN or zero) and are ignored", soft_wrap=True
        )


@contextmanager
def _progress(errors: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        yield progress


def drive_names(bags: list[Path]) -> list[str]:
    """A name for each bag's drive: its folder's or file's, which must differ."""
    names = [
        re.sub(r"[^\w+.-]+", "_", path.resolve().name.removesuffix(path.suffix if path.is_file() else ""))
        for path in bags
    ]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise BagError(f"two bags are called {twice}, and scenes are named after them; rename one")
    return names


def _check(arguments: argparse.Namespace) -> None:
    if arguments.out is None:
        raise ConfigError("--out is missing; name the data root to make, or pass --list to look into the bag only")
    if arguments.out.exists() or arguments.out.is_symlink():
        raise BagError(f"{arguments.out} exists already; name another --out")
    if not 0 < arguments.rate_hz <= 1000:
        raise ConfigError(f"--rate-hz is {arguments.rate_hz:g}; give a number above 0 and at most 1000")
    if arguments.scene_s < 0:
        raise ConfigError(f"--scene-s is {arguments.scene_s:g}; give a length in seconds, or 0 for no limit")
    if not 1 <= arguments.jpeg_quality <= 100:
        raise ConfigError(f"--jpeg-quality is {arguments.jpeg_quality}; give 1 to 100")
    if not re.fullmatch(r"[\w.-]+", arguments.version):
        raise ConfigError(f"--version is '{arguments.version}'; give the name of a folder, e.g. v1.0-mini")


def summary_table(summary: DriveSummary) -> Table:
    """Scenes with keyframes and length; by sensor, files, how many are as recorded, and points that are no return."""
    table = Table(title=escape(summary.name), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("scene or sensor", no_wrap=True)
    for heading in ("keyframes", "seconds", "MB", "unchanged", "no return"):
        table.add_column(heading, justify="right")
    for name, keyframes in summary.scenes.items():
        seconds = (keyframes[-1].stamp_ns - keyframes[0].stamp_ns) / 1e9
        table.add_row(escape(name), str(len(keyframes)), f"{seconds:.1f}")
    table.add_section()
    for channel, files in sorted(summary.files.items()):
        megabytes = sum(file.size for file in files) / 1e6
        dropped = sum(file.dropped_points for file in files)
        unchanged = str(sum(file.unchanged for file in files))
        table.add_row(channel, str(len(files)), "", f"{megabytes:.2f}", unchanged, str(dropped) if dropped else "")
    return table


def show(arguments: argparse.Namespace, console: Console) -> None:
    """Print what each bag holds, the role that each topic would get, and what is missing.

    Raises:
        OccflownetError: a bag or the mapping cannot be read, or the new mapping not be written.
    """
    topic_map = load_topic_map(arguments.map) if arguments.map else None
    for path in arguments.bag:
        with Bag(path) as bag:
            survey = Survey(bag, topic_map, wants_lidar=not arguments.no_lidar)
            console.print(topic_table(bag, survey.topic_map))
            problems = [*bag.damage, *survey.problems()]
            console.print("Missing for a conversion:" if problems else "Nothing is missing for a conversion.")
            for problem in problems:
                console.print(f"  - {problem}", soft_wrap=True, markup=False)
            if survey.cloud_fields() and not survey.topic_map.lidar.label_field:
                console.print(
                    f"No field of the clouds ({', '.join(survey.cloud_fields())}) is known to hold classes: name it in "
                    "--map (lidar.label_field), or label images after the conversion.",
                    soft_wrap=True,
                    markup=False,
                )
            if arguments.write_map:
                _write_map(arguments.write_map, survey.topic_map)
                console.print(
                    f"The mapping is in {arguments.write_map}; edit it, then pass it with --map.",
                    soft_wrap=True,
                    markup=False,
                )
                return


def _write_map(path: Path, topic_map: TopicMap) -> None:
    if path.exists():
        raise ConfigError(f"{path} exists already; name another file with --write-map")
    try:
        path.write_text(topic_map_yaml(topic_map), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); name another file with --write-map") from None


def topic_table(bag: Bag, topic_map: TopicMap) -> Table:
    """Topic, type, messages, mean rate over the bag, and the role in a conversion."""
    seconds = (bag.end_ns - bag.start_ns) / 1e9
    roles = topic_roles(topic_map)
    table = Table(title=escape(f"{bag.path}, {seconds:.1f} s"), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("topic", overflow="fold")
    table.add_column("type", overflow="fold")
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("Hz", justify="right", no_wrap=True)
    table.add_column("role", overflow="fold", style="bold")
    for name, topic in sorted(bag.topics.items()):
        rate = f"{(topic.message_count - 1) / seconds:.1f}" if topic.message_count > 1 and seconds else "-"
        role = roles.get(name, "transforms" if topic.msgtype == TRANSFORMS else "-")
        table.add_row(name, topic.msgtype.rsplit("/", 1)[-1], str(topic.message_count), rate, role)
    return table


def topic_roles(topic_map: TopicMap) -> dict[str, str]:
    """What each topic of a mapping is."""
    roles = {topic_map.ego_motion.odometry: "ego motion", topic_map.keyframes: "keyframes"}
    for channel, camera in topic_map.cameras.items():
        roles |= dict.fromkeys((camera.image, camera.camera_info), channel)
    if topic_map.lidar:
        labels = f", classes in '{topic_map.lidar.label_field}'" if topic_map.lidar.label_field else ""
        roles[topic_map.lidar.topic] = f"LIDAR_TOP{labels}"
    return roles


def main(argv: list[str] | None = None) -> int:
    """Console entry point; 2 on bad input."""
    arguments = parse_arguments(argv)
    if arguments.list:
        return exit_status("bag_to_nuscenes", lambda: show(arguments, Console()))
    console, complaints = Console(), Console(stderr=True, highlight=False)
    return exit_status("bag_to_nuscenes", lambda: convert(arguments, console, complaints))


if __name__ == "__main__":
    sys.exit(main())
