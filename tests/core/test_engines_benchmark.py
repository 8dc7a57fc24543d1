# SPDX-License-Identifier: Apache-2.0
"""The engines' benchmark: what is counted, the roofline by hand, ratios within a frame, and turns that are taken."""

import numpy as np
import pytest
import torch

from benchmarks import engines, gpu_networks
from benchmarks.encoder import model_config
from benchmarks.engines import measure, rows_of
from benchmarks.roofline import Peak, Work, best_s
from occflownet_core.evaluation import OccupancyEvaluation
from occflownet_core.runtime.comparison import EngineRecord, FrameDifference
from occflownet_core.runtime.drive import EngineInput
from occflownet_core.runtime.onnx_engine import OnnxEngine
from tests.core import graph_by_hand

CPU = torch.device("cpu")


def test_the_demos_network_is_counted_as_in_the_encoders_table():
    """16.5 GFLOP by the document; 2.72 M weights of 4 bytes, six 352 x 128 images, 5.12 MB of memory in and out, outputs."""
    work = Work.of(model_config("minicity_tiny"))
    assert work.gflop == pytest.approx(16.5, abs=0.05)
    weights, images, memory, outputs, lift = 2.72 * 4, 6 * 352 * 128 * 3 / 1e6, 2 * 5.12, 640_000 * 5 / 1e6, 20
    assert work.least_mb == pytest.approx(weights + images + memory + outputs + lift, abs=0.6)


@pytest.mark.parametrize(
    ("gflop", "least_mb", "byte_share", "least_ms"),
    [(10, 100, 1.0, 100), (1, 400, 1.0, 20), (1, 400, 0.5, 10), (1, 400, 0.25, 10)],
)
def test_the_roofline_is_the_slower_of_computing_and_moving(gflop, least_mb, byte_share, least_ms):
    """100 GFLOP/s and 20 GB/s: 10 GFLOP take 100 ms, 400 MB 20 ms."""
    assert Peak(100, 20).least_ms(Work(gflop, least_mb), byte_share) == pytest.approx(least_ms)


def test_a_peak_is_measured():
    peak = Peak.measured(CPU, torch.float32, side=128)
    assert 0.1 < peak.gflop_per_s < 1e5 and 0.1 < peak.gb_per_s < 1e4
    calls = []
    assert best_s(lambda: calls.append(0), CPU) >= 0 and len(calls) == 21


def record(name: str, engine_ms: list[float], alike: list[float]) -> EngineRecord:
    frames = [FrameDifference(str(i), share, share / 2, {}, {}) for i, share in enumerate(alike)]
    return EngineRecord(name, "fp32", OccupancyEvaluation(graph_by_hand.GRID), frames, engine_ms)


def test_ratios_are_taken_within_frames():
    """The machine was ten times slower during one frame: the ratio of medians would be 3, frame by frame it is 2."""
    records = [record("ONNX Runtime fp32", [10, 10, 100, 100, 20], []), record("b", [20, 20, 200, 50, 60], [1, 0.5, 0])]
    fp32, other = rows_of("demo", records, least_ms=5)
    assert (fp32.ratio, fp32.median_ms, fp32.of_roofline, fp32.labels_alike) == (1, 20, 0.5, None)
    assert other.ratio == 2 and other.median_ms == 50 and other.of_roofline == 0.25
    assert (other.labels_alike, other.occupied_alike, other.miou_17) == (0.5, 0.25, None)
    assert rows_of("demo", [record("TensorRT fp16", [1], [])], 5)[0].of_roofline is None


def test_engines_take_turns_and_begin_with_no_memory(tmp_path, monkeypatch):
    bundle = graph_by_hand.write(tmp_path / "bundle", graph_by_hand.hand_made_graph().SerializeToString())
    order, states = [], []

    class Noting(OnnxEngine):
        def _forward(self, images, motion):
            order.append(self.title)
            result = super()._forward(images, motion)
            states.append(self.memory()["next_state"].item())
            return result

    groups = {"demo": {"a": Noting(bundle), "b": Noting(bundle)}, "random": {"a": Noting(bundle)}}
    for weights, each in groups.items():
        for name, engine in each.items():
            engine.title = f"{weights} {name}"
    frame = EngineInput("0", graph_by_hand.images(3), np.eye(4), graph_by_hand.rig("front", "back"))
    *_, records = measure(groups, [frame, frame])
    turn = ["demo a", "demo b", "random a"]
    assert order == turn * 3
    assert states == [3, 3, 3, 3, 3, 3, 6, 6, 6]  # the first run of each does not count and is forgotten
    assert [len(record.engine_ms) for each in records.values() for record in each] == [2, 2, 2]


def test_full_size_networks_run_in_every_way_that_a_cpu_has(monkeypatch):
    (row,) = gpu_networks.latencies("minicity_tiny", CPU, frames=1, compiled=False)
    assert row.way == "eager" and row.network == "minicity_tiny"
    assert row.median_ms > row.roofline_ms > 0 and row.gflop == pytest.approx(16.5, abs=0.05)


def test_ways_are_interleaved():
    order = []
    times_ms = gpu_networks.interleaved_ms({name: lambda n=name: order.append(n) for name in "xy"}, CPU, 2)
    assert order == ["x", "y"] * 3 and [len(times) for times in times_ms.values()] == [2, 2]


def test_mistakes_get_one_sentence(tmp_path, capsys):
    assert engines.main(["--bundle", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "there is no model bundle" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        engines.main(["--frames", "0"])
