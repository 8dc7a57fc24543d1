# SPDX-License-Identifier: Apache-2.0
"""Making supervision and judging it, on one core: the rays of one sample (7 keyframes, 6 cameras, 34,688 points each,
nothing cached) and RayIoU of one sample (8 origins, 14,040 rays each).

Points lie on level ground and on walls around a LiDAR with nuScenes' rings, and the cameras are nuScenes' own; the
occupancy is a street with boxes on it, the prediction the same shifted by one cell, so that nothing agrees by accident.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.report import Figure, publish
from occflownet_core import poses
from occflownet_core.errors import OccflownetError
from occflownet_core.grid import OCC3D_GRID
from occflownet_core.labels import FREE, label_of
from occflownet_core.ray_metrics import RayCaster, RayScores
from training.data.minicity.calibration import CAMERAS, FULL_SIZE_PX
from training.data.nuscenes import AnnotatedBoxes, Keyframe, SensorFrame
from training.data.rays import LidarRays, RayLimits, temporal_rays

HORIZON = 3
RINGS, FIRINGS = 32, 1084
LIDAR_HEIGHT_M = 1.84
MOST_RAYS_MS, MOST_RAY_IOU_MS = 150.0, 500.0


def sweep_points() -> np.ndarray:
    """float32 [34688, 5] of a LiDAR over level ground between walls 12 m to each side."""
    elevation = np.radians(np.linspace(-30.7, 10.7, RINGS))
    azimuth = np.linspace(-np.pi, np.pi, FIRINGS, endpoint=False)
    azimuth, elevation = (a.ravel() for a in np.meshgrid(azimuth, elevation, indexing="ij"))
    direction = np.stack(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], axis=1
    )
    with np.errstate(divide="ignore"):
        to_ground_m = np.where(direction[:, 2] < 0, -LIDAR_HEIGHT_M / direction[:, 2], np.inf)
        to_wall_m = 12 / np.abs(direction[:, 1])
    points_m = direction * np.minimum(np.minimum(to_ground_m, to_wall_m), 80)[:, None]
    ring = np.tile(np.arange(RINGS), FIRINGS)
    return np.column_stack([points_m, np.zeros(len(ring)), ring]).astype(np.float32)


def keyframes(folder: Path) -> list[Keyframe]:
    """Seven keyframes of a drive at 8 m/s, each with its own files."""
    points = sweep_points()
    raw = np.where(points[:, 2] < -1.8, 24, 28).astype(np.uint8)  # driveable surface, manmade
    result = []
    for k in range(2 * HORIZON + 1):
        points.tofile(folder / f"{k}.pcd.bin")
        raw.tofile(folder / f"{k}_lidarseg.bin")

        def ego_pose(offset_us: int, start_m: float = 4.0 * k) -> np.ndarray:
            return poses.pose(np.array([400 + start_m + 8e-6 * offset_us, 1100, 0]), np.array([1.0, 0, 0, 0]))

        cameras = tuple(
            SensorFrame(
                name,
                folder / "unused.jpg",
                camera.offset_us,
                poses.pose(camera.translation_m, camera.rotation_wxyz),
                ego_pose(camera.offset_us),
                np.array(
                    [[camera.focal_px, 0, camera.centre_px[0]], [0, camera.focal_px, camera.centre_px[1]], [0, 0, 1]]
                ),
                *FULL_SIZE_PX,
            )
            for name, camera in CAMERAS.items()
        )
        mount = poses.pose(np.array([0.94, 0, LIDAR_HEIGHT_M]), np.array([1.0, 0, 0, -1]))
        lidar = SensorFrame("LIDAR_TOP", folder / f"{k}.pcd.bin", 0, mount, ego_pose(0))
        none = AnnotatedBoxes(np.zeros((0, 4, 4)), np.zeros((0, 3)), np.zeros(0, np.uint8), np.zeros(0, np.int64))
        labels = folder / f"{k}_lidarseg.bin"
        result.append(Keyframe(str(k), "bench", "bench", cameras, lidar, labels, None, folder / "no.npz", none))
    return result


def street(seed: int = 0) -> np.ndarray:
    """uint8 [200, 200, 16]: a road with 150 boxes of any class on it."""
    rng = np.random.default_rng(seed)
    labels = np.full(OCC3D_GRID.shape, FREE, dtype=np.uint8)
    labels[:, :, 2] = label_of("driveable_surface")
    for _ in range(150):
        (x, y), (length, width, height) = rng.integers(0, 195, 2), rng.integers((1, 1, 2), (9, 9, 13))
        labels[x : x + length, y : y + width, 3 : 3 + height] = rng.integers(0, 17)
    return labels


def fastest_ms(work: Callable[[], object], repeats: int) -> float:
    """The least processor time of several runs: what else the machine does meanwhile does not count."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return 1e3 * min(times)


def run(out: Path, repeats: int) -> int:
    """Measure and publish; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        frames = keyframes(Path(folder))
        limits, rays = RayLimits(OCC3D_GRID), []

        def make_rays(source: LidarRays) -> None:
            own = {t: (k, source.frame_rays(k)) for t, k in enumerate(frames, start=-HORIZON)}
            rays.append(len(temporal_rays(own, limits)))

        plain_ms = fastest_ms(lambda: make_rays(LidarRays()), repeats)
        no_return_ms = fastest_ms(lambda: make_rays(LidarRays(no_return=True)), repeats)

    truth = street()
    prediction = np.roll(truth, 1, axis=0)
    rng = np.random.default_rng(0)
    origins_m = np.column_stack([np.linspace(-35, 35, 8), rng.uniform(-3, 3, 8), np.full(8, LIDAR_HEIGHT_M)])

    def judge() -> None:
        caster, scores = RayCaster(OCC3D_GRID, origins_m), RayScores()
        scores.add(caster.cast(prediction), caster.cast(truth))

    ray_iou_ms = fastest_ms(judge, repeats)
    figures = [
        Figure("rays of one sample", plain_ms, MOST_RAYS_MS, "ms", "the limit"),
        Figure("the same with no-return rays", no_return_ms, MOST_RAYS_MS, "ms", "the limit"),
        Figure("RayIoU of one sample", ray_iou_ms, MOST_RAY_IOU_MS, "ms", "the limit"),
    ]
    publish("supervision and judgement, one core", figures, out / "data.json", {"rays": rays[0]})
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the fastest counts (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for data.json")
    arguments = parser.parse_args(argv)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    try:
        return run(arguments.out, max(arguments.repeats, 1))
    except OccflownetError as error:
        print(f"benchmarks.data: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
