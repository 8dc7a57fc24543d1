# SPDX-License-Identifier: Apache-2.0
"""The report of a replay evaluation as typed values, with where each number comes from."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import cv2
import numpy as np

import occflownet_core
from occflownet_core.runtime.bundle import DESCRIPTION, Bundle

FORMAT_VERSION = 1
PERCENTILES = (50, 95, 99)
_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class ModelSource:
    """The bundle that ran. Its ``bundle.yaml`` lists the hash of each of its files, so one hash names them all."""

    name: str
    bundle: str
    bundle_yaml_sha256: str
    engine: str
    occupancy_threshold: float
    provenance: dict


@dataclass(frozen=True)
class BagSource:
    """The bag that was replayed: name, hash over its data files, first and last stamp."""

    name: str
    sha256: str
    start_ns: int
    end_ns: int
    ground_truth: str


@dataclass(frozen=True)
class ReplayMode:
    """How it was replayed: ``lockstep`` or ``realtime``, at which rate, with which parameters of the node."""

    name: str
    rate: float | None
    anchor_camera: str
    parameters: dict


@dataclass(frozen=True)
class Machine:
    """What it ran on."""

    processor: str
    cores: int
    memory_gb: float
    system: str
    versions: dict[str, str]


@dataclass(frozen=True)
class FrameRecord:
    """One keyframe, or one published set of a bag without keyframes.

    Attributes:
        token: the data set's name for it, empty where there is none.
        stamp_ns: LiDAR's stamp of a keyframe, else the set's.
        set_stamp_ns: the anchor image's stamp, which the node's answer carries; None where the bag lacks the images.
        published: whether the node answered.
        reason: why it did not, in words; empty if it did.
        latency_ms: by stage; empty if unknown.
        occupied_voxels: in the prediction.
        scores: of this keyframe alone (``miou_17`` and ``geometric_iou`` with camera mask, ``ray_iou``), or None.
    """

    token: str
    stamp_ns: int
    set_stamp_ns: int | None
    published: bool
    reason: str
    latency_ms: dict[str, float]
    occupied_voxels: int
    scores: dict[str, float | None] | None


@dataclass(frozen=True)
class KeyframeCounts:
    """Keyframes in the bag, those of them with an image of every camera, those that the node answered, and the rest."""

    in_bag: int
    with_all_images: int
    published: int
    missed: int


@dataclass(frozen=True)
class ReplayReport:
    """All of ``report.json``.

    Attributes:
        settings: one sentence: how the model was trained and how the numbers were made.
        keyframes: counts, or None for a bag without keyframe markers.
        scores: as ``OccupancyEvaluation.to_dict`` gives them (``rays`` absent without a LiDAR), or None without truth.
        frames: in order of time.
        latency_ms: per stage, percentiles and maximum.
        sets: the node's counters of image sets.
        images: per camera, what became of its images.
        memory: what the node says of ego motion: poses received, resets by cause.
    """

    model: ModelSource
    bag: BagSource
    mode: ReplayMode
    machine: Machine
    settings: str
    keyframes: KeyframeCounts | None
    scores: dict | None
    frames: list[FrameRecord]
    latency_ms: dict[str, dict[str, float]]
    sets: dict[str, int]
    images: dict[str, dict[str, int]]
    memory: dict[str, int]
    seconds: float

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return {"format_version": FORMAT_VERSION, "occflownet": occflownet_core.__version__, **asdict(self)}


def model_source(bundle: Bundle, engine: str, threshold: float) -> ModelSource:
    digest = hashlib.sha256((bundle.directory / DESCRIPTION).read_bytes()).hexdigest()
    return ModelSource(bundle.name, bundle.directory.resolve().name, digest, engine, threshold, bundle.provenance)


def bag_sha256(path: Path) -> str:
    """Hash over a bag's data files (not its metadata), in the order of their names."""
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in (".mcap", ".db3", ".zstd"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def this_machine() -> Machine:
    return Machine(
        _processor(),
        len(os.sched_getaffinity(0)),
        round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        f"{platform.system()} {platform.release()} {platform.machine()}",
        {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "opencv": cv2.__version__,
            "onnxruntime": _version("onnxruntime"),
        },
    )


def settings_sentence(bundle: Bundle, threshold: float, is_bundles: bool, with_truth: bool) -> str:
    """How the model was trained and evaluated: without it, numbers of this benchmark cannot be compared."""
    trained = {True: "with the camera mask", False: "without the camera mask"}
    mask = trained.get(bundle.provenance.get("trained_with_camera_mask"), "(with or without camera mask: not stated)")
    source = "the bundle's" if is_bundles else "set by parameter"
    sentence = (
        f"Trained {mask}; occupancy threshold {threshold:g} ({source}); cameras at their bare extrinsics and ego motion "
        "between the anchor camera's stamps, as on a vehicle"
    )
    if not with_truth:
        return sentence + "; no ground truth."
    return (
        f"{sentence}; IoU with the camera mask over 17 classes unless another is named (15 leaves out others and other "
        "flat); RayIoU at 1, 2 and 4 m without mask; a keyframe that the node did not answer counts as predicted free "
        "everywhere, in IoU and RayIoU alike."
    )


def latency_summary(latency_ms: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Percentiles and maximum of every stage that was measured, milliseconds."""
    return {
        stage: {
            **{f"p{p}": round(float(v), 2) for p, v in zip(PERCENTILES, np.percentile(ms, PERCENTILES), strict=True)},
            "max": round(float(max(ms)), 2),
        }
        for stage, ms in latency_ms.items()
        if ms
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
