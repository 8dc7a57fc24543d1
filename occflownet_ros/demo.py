# SPDX-License-Identifier: Apache-2.0
"""``demo``: the shipped drive through the whole path, and what came out as a table, a report and a picture."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from occflownet_core import picture
from occflownet_core.command_line import exit_status
from occflownet_core.errors import OccflownetError
from occflownet_core.labels import CLASS_NAMES, COLORS_RGB, FREE
from occflownet_core.occupancy_frame import OccupancyFrame
from occflownet_core.runtime.bundle import Bundle, load_bundle
from occflownet_ros.ground_truth import score
from occflownet_ros.parameters import EVERY_SET
from occflownet_ros.private_graph import use_private_graph
from occflownet_ros.share import share_path

_PICTURE_WIDTH_PX = 1614

console = Console(highlight=False)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo",
        description="Replay a bag through the occupancy node: bag player process -> DDS -> node process -> subscribers. "
        "Without arguments it takes the drive and the model that ship with the package.",
        epilog="Writes report.json, voxels.png and node.log to --out.",
    )
    parser.add_argument("--bag", type=Path, help="rosbag2 folder (default: the demo drive)")
    parser.add_argument("--bundle", type=Path, help="model bundle (default: the demo model)")
    parser.add_argument("--calibration", type=Path, help="calibration file (default: calibration.yaml in the bag)")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for results (default: out/demo)")
    parser.add_argument("--rate", type=float, default=1.0, help="bag seconds per second (default: 1)")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Replay, report, draw.

    Raises:
        OccflownetError: with one sentence for the user.
    """
    bag = arguments.bag or share_path("demo", "bag")
    bundle_path = arguments.bundle or share_path("demo", "bundle")
    calibration = arguments.calibration or bag / "calibration.yaml"
    bundle = load_bundle(bundle_path)
    # rclpy is imported late: the transport's environment must stand before.
    from occflownet_ros.replay import process_environment, replay_bag

    use_private_graph()
    os.environ.update(process_environment())
    started_s = time.monotonic()
    with console.status(f"playing {bag.name} through the node"):
        replay = replay_bag(
            bag,
            {
                **EVERY_SET,
                "bundle": str(bundle_path),
                "calibration_file": str(calibration),
                "anchor_camera": "CAM_FRONT" if "CAM_FRONT" in bundle.cameras else bundle.cameras[0],
            },
            arguments.out,
            ("--rate", f"{arguments.rate:g}", "--no-progress"),
        )
    if not replay.frames:
        engine = replay.diagnostics.get("engine", {}).get("message", "it sent no diagnostics")
        raise OccflownetError(f"the node published no voxels ({engine}); see {arguments.out / 'node.log'}")
    report = summary(replay, bundle, bag)
    report["score"] = score(replay.frames, bag)
    report["seconds"] = round(time.monotonic() - started_s, 2)
    (arguments.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    frame = most_telling(list(replay.frames.values()))
    picture.save_png(str(arguments.out / "voxels.png"), overview(frame, bag, bundle))
    print_report(report, arguments.out)


def summary(replay, bundle: Bundle, bag: Path) -> dict:
    """The report as plain values."""
    frames = list(replay.frames.values())
    counts = replay.set_counts()
    voxels = np.array([np.bincount(f.labels.ravel(), minlength=FREE + 1)[:FREE] for f in frames])
    return {
        "bag": bag.name,
        "bundle": bundle.name,
        "model": bundle.provenance,
        "sets": {"received": counts.pop("opened", len(frames)), **counts},
        "results_received": len(frames),
        "latency_ms": {
            stage: {"p50": round(p50, 2), "p99": round(p99, 2)}
            for stage, (p50, p99) in replay.latency_percentiles().items()
        },
        "occupied_voxels_per_set": {CLASS_NAMES[c]: round(float(voxels[:, c].mean()), 1) for c in range(FREE)},
        "node": {
            "seconds_to_active": round(replay.seconds_to_active, 2),
            "peak_resident_mb": round(replay.node_resident_mb, 1),
        },
    }


def most_telling(frames: list[OccupancyFrame]) -> OccupancyFrame:
    """The frame for the picture: of those with the most classes, the one with the most voxels that move or stand up."""
    return max(
        frames, key=lambda f: (len(np.unique(f.labels)), int((f.labels < CLASS_NAMES.index("driveable_surface")).sum()))
    )


def overview(frame: OccupancyFrame, bag: Path, bundle: Bundle) -> np.ndarray:
    """The six images of a set beside the voxels predicted from them; uint8 RGB."""
    images = images_at(bag, frame.stamp_ns, bundle.cameras)
    cameras = picture.titled(
        picture.mosaic(images, _PICTURE_WIDTH_PX), "What the cameras see", f"stamp {frame.stamp_ns / 1e9:.3f} s"
    )
    behind = picture.draw_voxels(frame.labels, frame.grid, picture.view_from_behind(frame.grid))
    above = picture.draw_voxels(frame.labels, frame.grid, picture.view_from_above(frame.grid))
    width_m = frame.grid.upper_m[0] - frame.grid.lower_m[0]
    voxels = picture.side_by_side(
        [
            picture.titled(behind, "Predicted voxels, from behind", f"model {bundle.name}"),
            picture.titled(above, "From above", f"{width_m:g} m across, ahead is up"),
        ]
    )
    return picture.stacked([cameras, voxels, picture.legend(frame.labels, _PICTURE_WIDTH_PX, columns=4)])


def images_at(bag: Path, stamp_ns: int, cameras: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Each camera's image (uint8 RGB) nearest to a stamp, from a bag of compressed images."""
    from rclpy.serialization import deserialize_message
    from sensor_msgs.msg import CompressedImage

    from occflownet_ros.bag import Bag
    from occflownet_ros.conversions import nanoseconds

    nearest: dict[str, tuple[int, bytes]] = {}
    topics = {f"/{camera}/image_rect_compressed": camera for camera in cameras}
    with Bag(bag) as opened:
        for message in opened.messages(topics=set(topics)):
            image = deserialize_message(message.data, CompressedImage)
            distance_ns = abs(nanoseconds(image.header.stamp) - stamp_ns)
            camera = topics[message.topic]
            if camera not in nearest or distance_ns < nearest[camera][0]:
                nearest[camera] = (distance_ns, bytes(image.data))
    decoded = {
        camera: cv2.imdecode(np.frombuffer(nearest[camera][1], np.uint8), cv2.IMREAD_COLOR) for camera in cameras
    }
    return {camera: cv2.cvtColor(image, cv2.COLOR_BGR2RGB) for camera, image in decoded.items()}


def print_report(report: dict, out: Path) -> None:
    table = Table(title=f"{report['bag']} through {report['bundle']}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    sets = report["sets"]
    table.add_row("sets received", f"{sets['received']}")
    table.add_row("sets processed", f"{sets['processed']}")
    table.add_row("sets dropped", f"{sets['received'] - sets['processed']}")
    table.add_section()
    table.add_row("[dim]latency[/]", "[dim]p50 / p99[/]")
    for stage, latency in report["latency_ms"].items():
        table.add_row(stage, f"{latency['p50']:.1f} / {latency['p99']:.1f} ms")
    table.add_section()
    table.add_row("[dim]class[/]", "[dim]voxels per set[/]")
    for name, count in sorted(report["occupied_voxels_per_set"].items(), key=lambda item: -item[1]):
        if count:
            swatch = "#{:02x}{:02x}{:02x}".format(*COLORS_RGB[CLASS_NAMES.index(name)])
            table.add_row(f"[{swatch}]\u2588\u2588[/] {name.replace('_', ' ')}", f"{count:,.0f}")
    if report["score"]:
        table.add_section()
        table.add_row("[dim]against the bag's ground truth[/]", "")
        for name, value in headline(report["score"]).items():
            table.add_row(name, "-" if value is None else f"{100 * value:.1f} %")
    console.print(table)
    if report["model"].get("note"):
        console.print(report["model"]["note"])
    console.print(f"{out / 'voxels.png'}, {out / 'report.json'}")


def headline(scores: dict) -> dict[str, float | None]:
    """The few numbers of a score that a table has room for."""
    masked = scores["camera_mask"]
    shown = {"mIoU, 17 classes, camera mask": masked["miou_17"], "occupied or free, IoU": masked["geometric_iou"]}
    return {**shown, **({"RayIoU": scores["rays"]["ray_iou"]} if "rays" in scores else {})}


def main(argv: list[str] | None = None) -> int:
    """Console entry point; exit status 2 with one sentence on a user's mistake."""
    arguments = parse_arguments(argv)
    return exit_status("demo", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
