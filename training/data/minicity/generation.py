# SPDX-License-Identifier: Apache-2.0
"""generate: write a MiniCity data set, keyframe by keyframe, in several processes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from occflownet_core.errors import DatasetError
from occflownet_core.nuscenes_tables import write_blank_map
from training.data.minicity import calibration
from training.data.minicity.keyframe import write_keyframe
from training.data.minicity.naming import VERSION, Naming
from training.data.minicity.tables import MAP_FILE, Scene, write_tables
from training.data.minicity.world import World

_SMALLEST_PX, _LARGEST_PX = 32, 4096
_MOST_KEYFRAMES = 400
_done_queue = None  # set in worker processes: one message per finished keyframe


def generate(
    out: str | Path,
    scenes: int,
    keyframes: int,
    seed: int,
    image_size: tuple[int, int],
    processes: int | None = None,
    *,
    write_semantics: bool = False,
    force: bool = False,
    progress: bool = False,
) -> Path:
    """Write a data set in the nuScenes format; the same arguments give the same bytes, whatever ``processes`` is.

    Args:
        out: folder to make; an existing one that is not empty is refused, or with ``force`` replaced if it is a MiniCity.
        scenes, keyframes: how many scenes of how many keyframes (0.5 s apart) each.
        seed: names the data set: scenes are called ``minicity-<seed>-0000`` and so on.
        image_size: width and height of the camera images, pixels.
        processes: worker processes (None: one per core, 1: none).
        write_semantics: also write ``semantics/<camera>/*_label.png`` (uint8 Occ3D class, 17 sky) and ``*_depth.png``
            (uint16 centimetres along the optical axis, 0 sky).
        progress: show a progress bar.

    Returns:
        The data root.

    Raises:
        DatasetError: an argument is out of range, or ``out`` is taken.
    """
    root = Path(out)
    _check(scenes, keyframes, seed, image_size)
    _make_folders(root, force, write_semantics)
    processes = min(processes or os.cpu_count() or 1, scenes * keyframes)
    jobs = _jobs(scenes, keyframes, processes)
    written: dict[int, Scene] = {}
    with _bar(progress) as bar:
        task = bar.add_task("keyframes", total=scenes * keyframes)
        arguments = [
            (str(root), seed, scene, numbers, keyframes, image_size, write_semantics) for scene, numbers in jobs
        ]
        for part in _run(arguments, processes, lambda: bar.advance(task)):
            written.setdefault(part.naming.scene, part).keyframes.update(part.keyframes)
    rows = [written[scene] for scene in range(scenes)]
    write_tables(root, seed, rows, *image_size)
    return root


def _check(scenes: int, keyframes: int, seed: int, image_size: tuple[int, int]) -> None:
    if scenes < 1:
        raise DatasetError(f"--scenes is {scenes}; ask for at least 1")
    if not 1 <= keyframes <= _MOST_KEYFRAMES:
        raise DatasetError(f"--keyframes is {keyframes}; ask for 1 to {_MOST_KEYFRAMES} per scene")
    if seed < 0:
        raise DatasetError(f"--seed is {seed}; give a whole number from 0 up")
    if not all(_SMALLEST_PX <= n <= _LARGEST_PX for n in image_size):
        raise DatasetError(
            f"--image-size is {image_size[0]}x{image_size[1]}; width and height must be {_SMALLEST_PX} to {_LARGEST_PX} pixels"
        )


def _make_folders(root: Path, force: bool, write_semantics: bool) -> None:
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        if not force:
            raise DatasetError(
                f"{root} exists and is not an empty folder; choose another --out or pass --force to replace it"
            )
        if not (root / MAP_FILE).is_file():
            raise DatasetError(
                f"{root} is not a MiniCity data set, so --force will not delete it; choose another --out"
            )
        shutil.rmtree(root)
    channels = [*calibration.CAMERAS, calibration.LIDAR_CHANNEL]
    folders = [f"samples/{c}" for c in channels] + [f"lidarseg/{VERSION}", f"panoptic/{VERSION}", "gts"]
    folders += [f"semantics/{c}" for c in calibration.CAMERAS] if write_semantics else []
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
    write_blank_map(root / MAP_FILE)


def _jobs(scenes: int, keyframes: int, processes: int) -> list[tuple[int, list[int]]]:
    """Work in pieces that keep a worker on one scene, and all workers busy."""
    pieces = 1 if scenes >= 2 * processes else min(processes, keyframes)
    return [(s, part.tolist()) for s in range(scenes) for part in np.array_split(np.arange(keyframes), pieces)]


@lru_cache(maxsize=1)
def scene_world(seed: int, scene: int, keyframes: int) -> World:
    """The world behind a scene of a data set of so many keyframes, for rendering or scanning more of it."""
    return World.build(seed, scene, keyframes * calibration.KEYFRAME_INTERVAL_US * 1e-6)


def _description(world: World) -> str:
    kinds = sorted({a.category.split(".")[-1] for a in world.actors})
    return f"{world.plan.kind.replace('_', ' ')}, {len(world.plan.crossings)} crossings, {', '.join(kinds)}"


def _work(
    root: str,
    seed: int,
    scene: int,
    numbers: list[int],
    keyframes: int,
    size_px: tuple[int, int],
    write_semantics: bool,
    done: Callable[[], None] | None = None,
) -> Scene:
    """Write some keyframes of a scene; what the tables need of them."""
    world, naming = scene_world(seed, scene, keyframes), Naming(seed, scene)
    actors = [(a.category, a.size_m.tolist(), a.attribute) for a in world.actors]
    result = Scene(naming, actors, {}, _description(world))
    for number in numbers:
        result.keyframes[number] = write_keyframe(Path(root), world, naming, number, size_px, write_semantics)
        (done or _tell)()
    return result


def _start_worker(queue: multiprocessing.SimpleQueue) -> None:
    global _done_queue
    _done_queue = queue
    cv2.setNumThreads(1)


def _tell() -> None:
    _done_queue.put(1)


def _run(arguments: list[tuple], processes: int, done: Callable[[], None]) -> Iterator[Scene]:
    if processes == 1:
        for job in arguments:
            yield _work(*job, done)
        return
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with ProcessPoolExecutor(processes, context, _start_worker, (queue,)) as pool:
        futures = [pool.submit(_work, *job) for job in arguments]
        waiting = set(futures)
        while waiting:
            finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            while not queue.empty():
                queue.get()
                done()
            for future in finished:
                yield future.result()


def _bar(shown: bool) -> Progress:
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, disable=not shown)
