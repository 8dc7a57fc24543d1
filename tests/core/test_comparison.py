# SPDX-License-Identifier: Apache-2.0
"""Comparing engines: differences worked out by hand, on engines that say what a script tells them."""

from __future__ import annotations

import numpy as np
import pytest

from occflownet_core.camera import Camera, CameraRig
from occflownet_core.grid import VoxelGrid
from occflownet_core.lift_tables import DepthBins, LiftSpec
from occflownet_core.runtime.bundle import Bundle
from occflownet_core.runtime.comparison import (
    EngineInput,
    EngineOutput,
    Parity,
    compare_engines,
    difference,
    worst,
)
from occflownet_core.runtime.engine import HALF, Engine, Prediction

GRID = VoxelGrid((0, 0, 0), (2, 2, 1), 1.0)  # 4 voxels
SPEC = LiftSpec(GRID, DepthBins(1.0, 3.0, 1.0), feature_height=2, feature_width=4)
FREE = 17


class Scripted(Engine):
    """Says one prediction after the other, whatever it sees."""

    name = "scripted"

    def __init__(self, script: list[Prediction], precision: str = "fp32", memories: list | None = None) -> None:
        super().__init__(Bundle("nowhere", "scripted", ("front",), 8, 4, GRID, SPEC, 0.5))
        self.precision = precision
        self.script, self.memories = iter(script), iter(memories or [{}] * len(script))
        self.motions: list[np.ndarray | None] = []

    def reset(self) -> None:
        self.motions.append(None)

    def memory(self) -> dict[str, np.ndarray]:
        return next(self.memories)

    def _load_tables(self, tables) -> None:
        self.tables = tables

    def _forward(self, images, previous_from_current) -> Prediction:
        self.motions.append(previous_from_current)
        return next(self.script)


def says(labels, probability=None, velocity=None) -> Prediction:
    def array(values, dtype, *tail):
        return None if values is None else np.array(values, dtype).reshape(2, 2, 1, *tail)

    return Prediction(array(labels, np.uint8), array(probability, np.float32), array(velocity, np.float32, 3))


def frames(count: int, **more) -> list[EngineInput]:
    intrinsic = np.array([[4.0, 0, 4], [0, 4, 2], [0, 0, 1]])
    forward = np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0.5], [0, 0, 0, 1.0]])
    rig = CameraRig((Camera("front", 8, 4, intrinsic, forward),))
    images = np.zeros((1, 4, 8, 3), np.uint8)
    return [EngineInput(f"frame {i}", images, np.eye(4) if i else None, rig, **more) for i in range(count)]


def test_differences_by_hand():
    one = EngineOutput(says([4, FREE, FREE, 11], [0.9, 0.1, 0.2, 0.8], np.zeros(12)), {"state": np.array([1.0, 2.0])})
    velocity = np.zeros(12)
    velocity[5] = -0.5
    two = EngineOutput(says([4, FREE, 4, 12], [0.8, 0.1, 0.5, 0.8], velocity), {"state": np.array([1.0, 5.0])})
    found = difference("a", one, two)
    assert found.label_agreement == 0.5  # the first two of four
    assert found.occupied_agreement == pytest.approx(1 / 3)  # of three that either calls occupied, one is the same
    assert found.largest == pytest.approx({"occupancy_probability": 0.3, "velocity": 0.5, "state": 3.0}, abs=1e-6)
    assert found.mean == pytest.approx({"occupancy_probability": 0.1, "velocity": 0.5 / 12, "state": 1.5}, abs=1e-6)
    assert found.parity == Parity(0.5, pytest.approx(0.5))  # the memory has a scale of its own and does not count


def test_what_is_not_a_number_never_agrees_and_one_infinity_is_another():
    good, bad = EngineOutput(says([FREE] * 4, [0, 0, 0, 1])), EngineOutput(says([FREE] * 4, [0, 0, 0, np.nan]))
    assert not Parity(0.0, 1e9).allows(difference("a", good, bad).parity)
    assert not Parity(0.0, 1e9).allows(worst([Parity(1.0, 0.0), difference("a", good, bad).parity, Parity(1.0, 0.0)]))
    same = [EngineOutput(says([FREE] * 4), {"state": np.array([np.inf, 1.0])}) for _ in range(2)]
    assert difference("a", *same).largest == {"state": 0.0}


def test_the_worst_over_frames():
    assert worst([]) == Parity(1.0, 0.0)
    assert worst([Parity(0.9, 0.2), Parity(0.95, 0.3)]) == Parity(0.9, 0.3)


def test_a_comparison_over_frames():
    right = says([4, FREE, FREE, FREE], [0.9, 0.1, 0.1, 0.1])
    wrong = says([4, 4, FREE, FREE], [0.9, 0.7, 0.1, 0.1])
    engines = {"a": Scripted([right] * 3), "b": Scripted([right, wrong, right])}
    truth = right.labels
    mask = np.ones(truth.shape, bool)
    for count, records in enumerate(compare_engines(engines, frames(3, truth=truth, camera_mask=mask)), 1):
        assert len(records["b"].frames) == count
    assert [motion is None for motion in engines["b"].motions] == [True, False, False, False]  # reset, then three runs
    assert records["a"].frames == []
    b = records["b"]
    assert b.parity == Parity(0.75, pytest.approx(0.6))
    assert b.first_diverging(Parity(0.999, 1e-3)) == "frame 1"
    assert b.first_diverging(Parity(0.7, 0.61)) is None
    assert records["a"].scores.to_dict()["camera_mask"]["miou_17"] == 1.0
    # Three voxels of class 4 are there over three frames, b finds them and one more.
    assert b.scores.to_dict()["camera_mask"]["miou_17"] == 0.75
    assert b.to_dict(Parity(0.999, 1e-3))["first_diverging"] == "frame 1"
    assert records["a"].to_dict(Parity(1.0, 0.0))["frames"] == []


def test_features_of_the_field_are_compared_where_they_are_kept():
    one = Prediction(says([FREE] * 4).labels, field_features=np.array([1.0, 2.0]))
    two = Prediction(says([FREE] * 4).labels, field_features=np.array([1.0, 2.5]))
    found = difference("a", EngineOutput(one), EngineOutput(two))
    assert found.largest == {"field_features": 0.5} and found.parity == Parity(1.0, 0.0)


def test_without_truth_there_are_no_scores():
    for records in compare_engines({"a": Scripted([says([1] * 4)]), "b": Scripted([says([1] * 4)])}, frames(1)):
        assert records["a"].to_dict(Parity(1.0, 0.0))["scores"] is None


def test_half_precision_that_overflows_is_warned_of():
    predictions = [says([FREE] * 4, [0.1] * 4), says([FREE] * 4, [0.1, np.nan, 0.1, 0.1])]
    memories = [{"state": np.array([40000.0])}, {"state": np.array([np.inf])}]
    large = [{"state": np.array([-40000.0])}] * 2
    engines = {
        "single": Scripted([says([FREE] * 4, [0.1] * 4)] * 2, memories=large),
        "over": Scripted(predictions, HALF, memories),
        "near": Scripted([says([FREE] * 4, [0.1] * 4)] * 2, HALF, large),
    }
    *_, records = compare_engines(engines, frames(2))
    assert records["single"].overflow_warnings() == []  # single precision holds 40000 easily
    over = records["over"].overflow_warnings()
    assert [w.partition(";")[0] for w in over] == [
        "over: occupancy_probability is not finite from frame frame 1 on",
        "over: state is not finite from frame frame 1 on",
    ]
    assert all("65504" in w and "use fp32" in w for w in over)
    (near,) = records["near"].overflow_warnings()
    assert near.startswith("near: state reaches 40000, within a factor of two of 65504")
