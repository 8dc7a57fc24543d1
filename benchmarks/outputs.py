# SPDX-License-Identifier: Apache-2.0
"""What an output costs: markers, cloud, depth images, meshes built and published to another process, beside obvious twins.

The limit of markers and cloud is memory traffic: 640 kB of labels are read, 24 bytes a voxel laid out, copied into the
message and copied by Fast DDS into its shared-memory segment, 3 to 4 copies of 1 MB at the speed of memcpy (measured
beside: 0.03 ms each in cache, 0.2 ms from cold memory). Where last measured, of 2.8 ms of markers 0.6 went to finding the
surface, 0.5 to listing and sorting it by class, 0.5 to its centres, 0.5 to the bytes of CDR, 0.5 to rclpy and Fast DDS;
of 2.9 ms of cloud 0.7 to rclpy and Fast DDS.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rclpy
from geometry_msgs.msg import Point, Vector3
from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import LifecycleNode
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.serialization import serialize_message
from sensor_msgs.msg import Image, PointCloud2
from std_msgs.msg import ColorRGBA
from visualization_msgs.msg import Marker, MarkerArray

from benchmarks.report import Figure, publish
from occflownet_core.command_line import exit_status
from occflownet_core.depth_tables import DepthTable, depth_camera
from occflownet_core.errors import OccflownetError
from occflownet_core.grid import OCC3D_GRID
from occflownet_core.labels import CLASS_NAMES, COLORS_RGB, FREE
from occflownet_core.mesh import Mesh, extract_mesh
from occflownet_core.occupancy_frame import OccupancyFrame, surface_voxels
from occflownet_core.rig_file import load_rig
from occflownet_core.runtime.bundle import Bundle, load_bundle
from occflownet_core.runtime.drive import predictions
from occflownet_core.runtime.factory import create_engine
from occflownet_core.runtime.field_query import FieldQuery
from occflownet_ros import conversions
from occflownet_ros.engine_inputs import bag_inputs
from occflownet_ros.parameters import Settings
from occflownet_ros.private_graph import use_private_graph
from occflownet_ros.publishers import Outputs
from occflownet_ros.replay import process_environment
from occflownet_ros.share import share_path

MOST_MS = 3.0
SURFACE_VOXELS = 40_000
DEPTH_WIDTH_PX = 176
MESH_CELLS_M, MESH_ROUNDS = (0.8, 0.4, 0.2), 5
_WARM_UP, _PAUSE_S = 2, 0.02
_SECONDS_TO_MATCH = 20.0
_LISTENER = "--listen"
_NODE = "occflownet_outputs"
_TOPICS = {"occupancy": PointCloud2, "voxels": MarkerArray, "mesh": Marker}


def street(surface: int = SURFACE_VOXELS) -> OccupancyFrame:
    """Ground with blocks on it, grown until at least so many voxels can be seen; seeded."""
    rng = np.random.default_rng(0)
    labels = np.full(OCC3D_GRID.shape, FREE, dtype=np.uint8)
    labels[:, :130, 2] = CLASS_NAMES.index("driveable_surface")
    while surface_voxels(labels).sum() < surface:
        (x, y), (length, width, height) = rng.integers(0, 190, 2), rng.integers(3, 12, 3)
        labels[x : x + length, y : y + width, 2 : 2 + height] = rng.integers(0, FREE)
    probability = rng.random(OCC3D_GRID.shape, dtype=np.float32)
    return OccupancyFrame(1_532_402_927_612_460_000, "base_link", OCC3D_GRID, labels, probability)


def obvious_cloud(frame: OccupancyFrame) -> PointCloud2:
    """The cloud, one voxel after another."""
    message = conversions.cloud_message(frame)
    data = bytearray()
    for i, j, k in np.argwhere(frame.labels != FREE).tolist():
        label = int(frame.labels[i, j, k])
        x, y, z = (low + (c + 0.5) * 0.4 for low, c in zip(frame.grid.lower_m, (i, j, k), strict=True))
        red, green, blue = COLORS_RGB[label].tolist()
        rgb = red << 16 | green << 8 | blue
        data += struct.pack("<fffIfI", x, y, z, rgb, frame.probability[i, j, k], label)
    message.data = bytes(data)
    return message


def obvious_markers(frame: OccupancyFrame) -> MarkerArray:
    """The markers, one Point object after another."""
    message, surface = MarkerArray(), surface_voxels(frame.labels)
    for label in range(FREE):
        red, green, blue = (COLORS_RGB[label] / 255.0).tolist()
        marker = Marker(ns=CLASS_NAMES[label], id=label, type=Marker.CUBE_LIST)
        marker.header = conversions.header_message(frame)
        marker.pose.orientation.w, marker.scale = 1.0, Vector3(x=0.4, y=0.4, z=0.4)
        marker.color = ColorRGBA(r=red, g=green, b=blue, a=0.9)
        for cell in np.argwhere(surface & (frame.labels == label)).tolist():
            x, y, z = (low + (c + 0.5) * 0.4 for low, c in zip(frame.grid.lower_m, cell, strict=True))
            marker.points.append(Point(x=x, y=y, z=z))
        if marker.points:
            message.markers.append(marker)
    return message


def obvious_depth(table: DepthTable, labels: np.ndarray) -> np.ndarray:
    """Whether every pixel's ray meets something, cell after cell; True [height, width]."""
    occupied, cells, first = (labels != FREE).ravel().tolist(), table.cell.tolist(), table.first.tolist()
    met = [any(occupied[c] for c in cells[begin:end]) for begin, end in itertools.pairwise(first)]
    return np.array(met).reshape(table.camera.height_px, table.camera.width_px)


@dataclass(frozen=True)
class Spent:
    """Medians over the rounds of a step.

    Attributes:
        ms: that passed; on a busy machine others' time is in it.
        cpu_ms: of this thread alone.
    """

    ms: float
    cpu_ms: float


def measured(step: Callable[[], object], rounds: int) -> Spent:
    """What a step takes once warmed up, with pauses as between two sets, in which caches grow cold."""
    spent = []
    for _ in range(rounds + _WARM_UP):
        time.sleep(_PAUSE_S)
        started_s, started_cpu_s = time.perf_counter(), time.thread_time()
        step()
        cpu_s = time.thread_time() - started_cpu_s
        spent.append((1e3 * (time.perf_counter() - started_s), 1e3 * cpu_s))
    return Spent(*np.median(spent[_WARM_UP:], axis=0).tolist())


class Listener:
    """Another process that subscribes to outputs and reads nothing of them, as raw bytes."""

    def __init__(self, names: list[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.outputs", _LISTENER, *names]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def stop(self) -> int:
        """How many messages came."""
        self._process.send_signal(signal.SIGINT)
        output, _ = self._process.communicate(timeout=20)
        return int(output.strip().splitlines()[-1])


def listen(names: list[str]) -> None:
    """Count messages of the outputs until SIGINT, then print how many came."""
    rclpy.init()
    node, heard = Node("occflownet_outputs_listener"), []
    for name in names:
        kind = _TOPICS.get(name, Image)
        node.create_subscription(kind, f"/{_NODE}/{name}", lambda data: heard.append(len(data)), 10, raw=True)
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        print(len(heard), flush=True)


def published(node: LifecycleNode, names: list[str], step: Callable[[], None], rounds: int) -> Spent:
    """What a step takes that publishes on the named outputs while another process listens."""
    listener = Listener(names)
    try:
        publishers = [p for p in node.publishers if p.topic_name.removeprefix(f"/{_NODE}/") in names]
        until_s = time.monotonic() + _SECONDS_TO_MATCH
        while not all(p.get_subscription_count() for p in publishers):
            if time.monotonic() > until_s:
                raise OccflownetError(f"the listener did not match {', '.join(names)} within {_SECONDS_TO_MATCH:g} s")
            time.sleep(0.02)
        step()
        time.sleep(0.5)  # where tables are made in the background, they are made now
        return measured(step, rounds)
    finally:
        heard = listener.stop()
        print(f"{', '.join(names)}: {heard} messages arrived", file=sys.stderr)


def figures(rounds: int) -> tuple[list[Figure], dict]:
    """Measure all; the numbers of rows and what they were measured on."""
    frame = street()
    rig, bundle = load_rig(share_path("demo", "bag", "calibration.yaml")), load_bundle(share_path("demo", "bundle"))
    node = LifecycleNode(_NODE)
    every_set = {f"{name}_max_rate_hz": 0.0 for name in ("occupancy", "voxels", "labels", "costmap", "depth")}
    outputs = Outputs(node, Settings(**every_set, depth_width_px=DEPTH_WIDTH_PX), bundle, print)
    outputs.set_cameras(rig, rig.names)
    node.trigger_configure()
    node.trigger_activate()
    obvious = {
        "voxels": (node.create_publisher(MarkerArray, "~/voxels_twin", QoSProfile(depth=2)), obvious_markers),
        "occupancy": (node.create_publisher(PointCloud2, "~/occupancy_twin", QoSProfile(depth=2)), obvious_cloud),
    }
    rows, notes = [], {"surface_voxels": int(surface_voxels(frame.labels).sum())}
    notes["occupied_voxels"] = int((frame.labels != FREE).sum())

    build = {
        "voxels": lambda: conversions.marker_bytes(frame, conversions.class_cubes(frame, 0.9), False),
        "occupancy": lambda: conversions.cloud_message(frame),
    }
    for name, words in (("voxels", "markers"), ("occupancy", "cloud")):
        spent = published(node, [name], lambda: outputs.publish(frame), rounds)
        publisher, slow = obvious[name]
        slow_ms = measured(lambda p=publisher, s=slow: p.publish(s(frame)), 1).ms
        rows.append(Figure(f"{words}: built and published", spent.ms, MOST_MS, "ms", "at most"))
        rows.append(Figure(f"{words}: CPU time of that", spent.cpu_ms, MOST_MS, "ms", "as above"))
        rows.append(Figure(f"{words}: built and published", spent.ms, slow_ms, "ms", "one voxel after another"))
        built = build[name]()
        size = len(built) if isinstance(built, bytes) else len(built.data)
        notes[words] = {"bytes": size, "build_ms": measured(build[name], rounds).ms, "copy_ms": copy_ms(size, rounds)}
    outputs.settings = Settings(**every_set, voxel_coloring="height", depth_width_px=DEPTH_WIDTH_PX)
    spent = published(node, ["voxels"], lambda: outputs.publish(frame), rounds)
    rows.append(Figure("markers by height: built and published", spent.ms, MOST_MS, "ms", "at most"))
    rows += depth_figures(node, outputs, frame, rig, rounds, notes)
    rows += mesh_figures(node, outputs, demo_frame(bundle), notes)
    outputs.close()
    node.destroy_node()
    return rows, notes


def depth_figures(node, outputs: Outputs, frame: OccupancyFrame, rig, rounds: int, notes: dict) -> list[Figure]:
    """Depth images of all cameras, and how long their tables take."""
    table = DepthTable.build(depth_camera(rig[0], DEPTH_WIDTH_PX), frame.grid)
    notes["depth"] = {
        "table_ms": measured(lambda: DepthTable.build(table.camera, frame.grid), 3).ms,
        "table_bytes": table.size_bytes,
        "crossings": len(table.cell),
    }
    started_s = time.perf_counter()
    met = obvious_depth(table, frame.labels)
    slow_ms = 1e3 * (time.perf_counter() - started_s)
    if not np.array_equal(met, np.isfinite(table.render(frame.labels))):
        raise OccflownetError("the depth image disagrees with its obvious twin; this is a fault of the program")
    fast_ms = measured(lambda: table.render(frame.labels), rounds).ms
    names = [f"depth/{camera.name}/image" for camera in rig]
    ms = published(node, names, lambda: outputs.publish(frame), rounds).ms
    size = f"{table.camera.width_px} x {table.camera.height_px}"
    return [
        Figure(f"one depth image, {size}: rendered", fast_ms, slow_ms, "ms", "one cell after another"),
        Figure(f"{len(rig)} depth images, {size}: rendered and published", ms, len(rig) * slow_ms, "ms", "as above"),
    ]


def demo_frame(bundle: Bundle) -> OccupancyFrame:
    """Keyframe 3 of the demo drive, with its field's features."""
    engine = create_engine(bundle, "onnxruntime", 1)
    engine.keep_field = True
    *_, (_, prediction) = predictions(engine, bag_inputs(share_path("demo", "bag"), bundle, most=4))
    return OccupancyFrame(0, "base_link", bundle.grid, prediction.labels, field_features=prediction.field_features)


def obvious_mesh(mesh: Mesh) -> Marker:
    """The mesh's marker, one corner after another."""
    marker = Marker(ns="mesh", type=Marker.TRIANGLE_LIST, scale=Vector3(x=1.0, y=1.0, z=1.0))
    for corner in mesh.triangles.ravel().tolist():
        x, y, z = mesh.vertices_m[corner].tolist()
        red, green, blue = (COLORS_RGB[mesh.labels[corner]] / 255.0).tolist()
        marker.points.append(Point(x=x, y=y, z=z))
        marker.colors.append(ColorRGBA(r=red, g=green, b=blue, a=1.0))
    return marker


def mesh_figures(node, outputs: Outputs, frame: OccupancyFrame, notes: dict) -> list[Figure]:
    """Meshes of the demo model's field, in its thread, by the size of their cells; and the layout of the message."""
    rows, notes["meshes"] = [], {}

    def build() -> None:
        built = outputs.mesh_report().counters["built"]
        outputs.publish(frame)
        while outputs.mesh_report().counters["built"] == built:
            time.sleep(0.002)

    for cell_m in MESH_CELLS_M:
        outputs.settings = Settings(mesh_max_rate_hz=0.0, mesh_budget_ms=60_000.0, mesh_cell_m=cell_m)
        ms = published(node, ["mesh"], build, MESH_ROUNDS).ms
        report = outputs.mesh_report()
        name = f"mesh of {report.triangles:,} triangles in cells of {report.cell_m:g} m: built and published"
        rows.append(Figure(name, ms, Settings().mesh_budget_ms, "ms", "mesh_budget_ms"))
        notes["meshes"][f"{cell_m:g} m"] = {"triangles": report.triangles, "ms": ms}
    bundle = load_bundle(share_path("demo", "bundle"))
    field = FieldQuery(bundle).field(frame.field_features)
    mesh = extract_mesh(field, bundle.lift.grid, bundle.occupancy_threshold, levels=0)
    fast_ms = measured(lambda: conversions.mesh_bytes(frame, mesh), MESH_ROUNDS).ms
    slow_ms = measured(lambda: serialize_message(obvious_mesh(mesh)), 1).ms
    name = f"message of {len(mesh.triangles):,} triangles: laid out"
    return [*rows, Figure(name, fast_ms, slow_ms, "ms", "one corner after another")]


def copy_ms(size: int, rounds: int) -> float:
    """One copy of so many bytes between buffers that are there already."""
    source, target = np.ones(size, np.uint8), np.empty(size, np.uint8)
    return measured(lambda: np.copyto(target, source), rounds).ms


def main(argv: list[str] | None = None) -> int:
    """Console entry point."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [_LISTENER]:
        listen(argv[1:])
        return 0
    parser = argparse.ArgumentParser(prog="benchmarks.outputs", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=60, metavar="N", help="messages to take the median of (default: 60)"
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for JSON (default: out/bench)")
    options = parser.parse_args(argv)
    if any(os.environ.get(name) != value for name, value in process_environment().items()):
        # The C library reads its settings when a process starts; the node's launch file sets them too.
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.outputs", *argv], process_environment())
    return exit_status("benchmarks.outputs", lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    use_private_graph()
    rclpy.init()
    try:
        rows, notes = figures(options.rounds)
    finally:
        rclpy.try_shutdown()
    publish(f"outputs of {notes['surface_voxels']:,} surface voxels", rows, options.out / "outputs.json", notes)


if __name__ == "__main__":
    sys.exit(main())
