# SPDX-License-Identifier: Apache-2.0
"""Engines side by side on the same frames: how far their outputs differ, from which frame on, and who is right."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from occflownet_core.errors import BundleError
from occflownet_core.evaluation import OccupancyEvaluation
from occflownet_core.labels import FREE
from occflownet_core.runtime.bundle import FIELD_FEATURES, Bundle
from occflownet_core.runtime.drive import EngineInput
from occflownet_core.runtime.engine import HALF, Engine, Prediction

LARGEST_HALF = 65504.0
"""Largest finite float16."""


@dataclass(frozen=True)
class Parity:
    """How well two engines agree over frames, or must.

    Attributes:
        label_agreement: share of voxels with the same label, the worst frame's.
        probability_error: largest difference of occupancy probability, and of velocity (m/s) where there is one.
    """

    label_agreement: float
    probability_error: float

    def allows(self, other: Parity) -> bool:
        """Whether what was measured keeps to this. What is not a number never does."""
        enough, close = other.label_agreement >= self.label_agreement, other.probability_error <= self.probability_error
        return bool(enough and close)


SINGLE_PRECISION = Parity(label_agreement=0.999, probability_error=1e-3)
HALF_PRECISION = Parity(label_agreement=0.98, probability_error=0.1)
EIGHT_BITS = Parity(label_agreement=0.98, probability_error=0.4)
"""What two engines must keep to, by the coarser precision of the two."""


def worst(parities: Sequence[Parity]) -> Parity:
    """The worst of each; full agreement where there are none."""
    return Parity(
        min((parity.label_agreement for parity in parities), default=1.0),
        float(np.max([parity.probability_error for parity in parities], initial=0.0)),
    )


@dataclass(frozen=True, eq=False)
class EngineOutput:
    """What an engine made of a frame: ``prediction``, the ``memory`` that it keeps for the next, and how long it took."""

    prediction: Prediction
    memory: dict[str, np.ndarray] = field(default_factory=dict)
    engine_ms: float = 0.0


@dataclass(frozen=True)
class FrameDifference:
    """One engine against the reference on one frame.

    Attributes:
        frame: its name.
        label_agreement: share of all voxels with the same label.
        occupied_agreement: the same among voxels that either of them calls occupied; 1 where there are none.
        largest, mean: absolute difference by output (``occupancy_probability``, ``velocity``, ``field_features`` where they
            are kept, and memory by its own name).
    """

    frame: str
    label_agreement: float
    occupied_agreement: float
    largest: dict[str, float]
    mean: dict[str, float]

    @property
    def parity(self) -> Parity:
        """What tolerances are about: labels, probability and velocity, not features and memory, whose scale is their own."""
        errors = [self.largest[name] for name in ("occupancy_probability", "velocity") if name in self.largest]
        return Parity(self.label_agreement, float(np.max(errors, initial=0.0)))


@dataclass
class EngineRecord:
    """What is known about one engine after some frames.

    Attributes:
        name: for people.
        precision: of the engine.
        frames: differences from the reference, frame by frame; empty for the reference itself.
        scores: against ground truth; its ``samples`` are 0 where there was none.
        engine_ms: of each frame.
        not_finite: first frame (name) in which an output or the memory held NaN or infinity, by its name.
        largest_magnitude: of each floating-point output and of the memory, over all frames.
    """

    name: str
    precision: str
    scores: OccupancyEvaluation
    frames: list[FrameDifference] = field(default_factory=list)
    engine_ms: list[float] = field(default_factory=list)
    not_finite: dict[str, str] = field(default_factory=dict)
    largest_magnitude: dict[str, float] = field(default_factory=dict)

    @property
    def parity(self) -> Parity:
        """Over all frames: the worst of each."""
        return worst([frame.parity for frame in self.frames])

    @property
    def median_ms(self) -> float:
        """Of an inference, copies to and from the device included."""
        return float(np.median(self.engine_ms))

    def first_diverging(self, tolerance: Parity) -> str | None:
        """Name of the first frame that leaves the tolerance, None where all keep to it."""
        return next((frame.frame for frame in self.frames if not tolerance.allows(frame.parity)), None)

    def overflow_warnings(self) -> list[str]:
        """Sentences about values that are not finite, and about those that half precision hardly holds."""
        cause = f"an activation passed {LARGEST_HALF:g}, the largest number of half precision: use fp32"
        advice = cause if self.precision == HALF else "the model itself computes it so: check its weights"
        said = [
            f"{self.name}: {output} is not finite from frame {frame} on; {advice}"
            for output, frame in self.not_finite.items()
        ]
        return said + [
            f"{self.name}: {output} reaches {size:g}, within a factor of two of {LARGEST_HALF:g}, the largest number of "
            "half precision"
            for output, size in self.largest_magnitude.items()
            if self.precision == HALF and output not in self.not_finite and size > LARGEST_HALF / 2
        ]

    def to_dict(self, tolerance: Parity) -> dict:
        """Everything as plain values for JSON; the reference has no differences, and no scores where there is no truth."""
        return {
            "precision": self.precision,
            "median_ms": self.median_ms,
            "first_diverging": self.first_diverging(tolerance),
            "warnings": self.overflow_warnings(),
            "scores": self.scores.to_dict() if self.scores.samples else None,
            "frames": [vars(frame) for frame in self.frames],
        }


def require_same_sizes(a: Bundle, b: Bundle) -> None:
    """Refuse bundles whose engines cannot be given the same frames, or whose outputs cannot be compared.

    Raises:
        BundleError: cameras, image size, grid, memory or outputs differ.
    """
    for what, ours, theirs in (
        ("cameras", a.cameras, b.cameras),
        ("image size in px", (a.image_width_px, a.image_height_px), (b.image_width_px, b.image_height_px)),
        ("grid", a.grid.to_dict(), b.grid.to_dict()),
        ("memory", {s.output: s.shape for s in a.recurrent}, {s.output: s.shape for s in b.recurrent}),
        ("outputs", a.outputs, b.outputs),
    ):
        if ours != theirs:
            raise BundleError(
                f"bundles {a.directory} and {b.directory} differ in {what} ({ours} and {theirs}); "
                "compare bundles of one network"
            )


def compare_engines(engines: dict[str, Engine], inputs: Iterable[EngineInput]) -> Iterator[dict[str, EngineRecord]]:
    """Run engines over the same frames, each with a memory of its own; the first one is the reference.

    Args:
        engines: by the name that the records carry.
        inputs: frames in order of time.

    Yields:
        The records so far (the same objects each time), after every frame.

    Raises:
        EngineError, CalibrationError: an engine refuses a frame or its rig.
    """
    records = {
        name: EngineRecord(name, engine.precision, OccupancyEvaluation(engine.bundle.grid))
        for name, engine in engines.items()
    }
    calibrated = None
    for frame in inputs:
        if frame.rig is not calibrated:
            for engine in engines.values():
                engine.calibrate(frame.rig)
            calibrated = frame.rig
        outputs = [_run(engine, frame) for engine in engines.values()]
        for record, output in zip(records.values(), outputs, strict=True):
            _note(record, frame, output)
            if output is not outputs[0]:
                record.frames.append(difference(frame.name, outputs[0], output))
        yield records


def difference(frame: str, reference: EngineOutput, other: EngineOutput) -> FrameDifference:
    """How far one output of a frame is from another."""
    ours, theirs = reference.prediction.labels, other.prediction.labels
    occupied = (ours != FREE) | (theirs != FREE)
    same = ours == theirs
    pairs = _arrays(reference), _arrays(other)
    errors = {name: _absolute_difference(array, pairs[1][name]) for name, array in pairs[0].items() if name in pairs[1]}
    return FrameDifference(
        frame,
        float(same.mean()),
        float(same[occupied].mean()) if occupied.any() else 1.0,
        {name: float(error.max(initial=0.0)) for name, error in errors.items()},
        {name: float(error.mean()) for name, error in errors.items()},
    )


def _run(engine: Engine, frame: EngineInput) -> EngineOutput:
    started_s = time.perf_counter()
    prediction = engine.infer(frame.images, frame.previous_from_current)
    engine_ms = 1e3 * (time.perf_counter() - started_s)
    return EngineOutput(prediction, engine.memory(), engine_ms)


def _note(record: EngineRecord, frame: EngineInput, output: EngineOutput) -> None:
    record.engine_ms.append(output.engine_ms)
    for name, array in _arrays(output).items():
        size = float(np.abs(array).max(initial=0.0))  # NaN where there is one
        if not np.isfinite(size):
            record.not_finite.setdefault(name, frame.name)
        record.largest_magnitude[name] = float(np.fmax(record.largest_magnitude.get(name, 0.0), size))
    if frame.truth is not None:
        mask = np.ones(frame.truth.shape, bool) if frame.camera_mask is None else frame.camera_mask
        record.scores.add(output.prediction.labels, frame.truth, mask)


def _arrays(output: EngineOutput) -> dict[str, np.ndarray]:
    """Everything but the labels, by name."""
    prediction = output.prediction
    arrays = {
        "occupancy_probability": prediction.probability,
        "velocity": prediction.velocity_mps,
        FIELD_FEATURES: prediction.field_features,
        **output.memory,
    }
    return {name: array for name, array in arrays.items() if array is not None}


def _absolute_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64 |a - b|; 0 where both are the same infinity."""
    with np.errstate(invalid="ignore"):
        return np.where(a == b, 0.0, np.abs(a.astype(np.float64) - b.astype(np.float64)))
