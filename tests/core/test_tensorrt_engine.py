# SPDX-License-Identifier: Apache-2.0
"""TensorRTEngine: on twins of NVIDIA's libraries everywhere (tests/core/nvidia_twins.py), and on a GPU where there is one."""

from __future__ import annotations

import dataclasses
import gc
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from occflownet_core.errors import BundleError, EngineError
from occflownet_core.runtime import cuda_device, tensorrt_build, tensorrt_engine
from occflownet_core.runtime.bundle import FIELD_GRAPH, GRAPH, load_bundle, write_bundle
from occflownet_core.runtime.cuda_device import CudaDevice, find_gpu
from occflownet_core.runtime.engine import warm_up
from occflownet_core.runtime.factory import create_engine
from occflownet_core.runtime.onnx_engine import OnnxEngine
from occflownet_core.runtime.tensorrt_build import BuildProgress, prepare_engine
from tests.core.graph_by_hand import SPEC, forward, hand_made_graph, images, occupied_label, rig, write
from tests.core.nvidia_twins import CudaTwin, TensorRTTwin

MIB = 1 << 20


@pytest.fixture
def bundle(tmp_path):
    return write(tmp_path / "bundle", hand_made_graph().SerializeToString())


@pytest.fixture
def cuda(monkeypatch):
    twin = CudaTwin(1 << 32)
    monkeypatch.setattr(cuda_device, "cuda_runtime", lambda: twin)
    return twin


@pytest.fixture
def trt(monkeypatch, cuda):
    twin = TensorRTTwin(cuda)
    for module in (tensorrt_build, tensorrt_engine):
        monkeypatch.setattr(module, "tensorrt", lambda: twin)
    return twin


@pytest.fixture
def make(trt, bundle, tmp_path):
    def build(precision="fp32", made_of=None):
        return create_engine(made_of or bundle, "tensorrt", 1, precision, tmp_path / "engines")

    return build


@pytest.fixture
def engine(make):
    made = make()
    made.calibrate(rig("front", "back"))
    return made


def test_it_does_what_onnx_runtime_does(engine, bundle):
    """Memory, motion, missing cameras, threshold, forgetting: call after call the same, recorded or not."""
    other = OnnxEngine(bundle)
    other.calibrate(rig("front", "back"))
    rng = np.random.default_rng(0)
    for step in range(12):
        motion = None if step in (0, 7) else forward(0.25 * step)
        missing = [1] if step % 5 == 2 else []
        for one in (engine, other):
            one.occupancy_threshold = 0.1 if step % 2 else 0.4
        if step == 9:
            for one in (engine, other):
                one.calibrate(rig("front", "back", width_px=64, height_px=32))
        image = rng.integers(0, 3, (2, 8, 16, 3), dtype=np.uint8)
        ours, theirs = (one.infer(image, motion, missing) for one in (engine, other))
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        np.testing.assert_allclose(ours.probability, theirs.probability, rtol=1e-6)
        np.testing.assert_allclose(engine.memory()["next_state"], other.memory()["next_state"], rtol=1e-6)


def test_the_first_run_is_queued_and_all_others_are_one_recorded_piece(engine, cuda):
    for _ in range(4):
        engine.infer(images(1), np.eye(4))
    assert cuda.counts["launches"] == 3 and len(cuda.graphs) == 1
    assert cuda.recording is None


def test_the_memory_stays_on_the_device(engine, cuda):
    engine.infer(images(1), None)
    before = dict(cuda.counts)
    for _ in range(10):
        engine.infer(images(1), np.eye(4))
    done = {name: cuda.counts[name] - before[name] for name in before}
    assert done["to_device"] == 30  # images, motion, threshold
    assert done["to_host"] == 20  # labels, probability
    assert done["within"] == 10
    assert occupied_label(engine.infer(images(1), np.eye(4))) == 12


def test_tables_travel_only_when_the_calibration_changes(engine, cuda):
    engine.infer(images(1), None)
    before = cuda.counts["to_device"]
    engine.infer(images(1), None)
    assert cuda.counts["to_device"] - before == 3
    engine.calibrate(rig("front", "back"))
    assert cuda.counts["to_device"] - before == 3 + len(SPEC.inputs)


def test_buffers_are_made_once_and_given_back(make, cuda):
    made = make()
    held, pinned = len(cuda.held), len(cuda.pinned)
    assert held == 7 + 3 and pinned == 3 + 2  # every tensor; inputs of each run and outputs
    made.calibrate(rig("front", "back"))
    for _ in range(3):
        made.infer(images(1), None)
    assert (len(cuda.held), len(cuda.pinned)) == (held, pinned)
    del made
    gc.collect()
    assert not cuda.held and not cuda.pinned and not cuda.graphs and cuda.counts["streams"] == 0


def test_closing_twice_is_harmless(make, cuda):
    made = make()
    made.close()
    made.close()
    assert not cuda.held


def test_a_run_that_cannot_be_recorded_is_queued_step_by_step(make, cuda, caplog):
    cuda.can_record = False
    made = make()
    made.calibrate(rig("front", "back"))
    with caplog.at_level(logging.WARNING):
        labels = [occupied_label(made.infer(images(2), np.eye(4))) for _ in range(3)]
    assert labels == [2, 4, 6]
    assert caplog.text.count("a run cannot be recorded") == 1


def test_the_fields_features_are_copied_when_asked_for(make, cuda, tmp_path):
    """features = next_state, for every cell of the working grid and two channels."""
    graph = hand_made_graph()
    shape = [1, 2, 4, 8, 2]
    graph.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), "ones"))
    graph.graph.node.append(helper.make_node("Mul", ["ones", "value"], ["field_features"]))
    graph.graph.output.append(helper.make_tensor_value_info("field_features", TensorProto.FLOAT, shape))
    plain = write(tmp_path / "plain", hand_made_graph().SerializeToString())
    described = dataclasses.replace(plain, directory=tmp_path / "with_field", field_channels=2)
    write_bundle(described, {GRAPH: graph.SerializeToString(), FIELD_GRAPH: b"no one reads it here"})
    made = make(made_of=load_bundle(described.directory))
    made.calibrate(rig("front", "back"))
    assert [made.infer(images(1), None).field_features for _ in range(2)] == [None, None]
    pinned = len(cuda.pinned)
    made.keep_field = True
    for step in range(3):
        features = made.infer(images(4), np.eye(4) if step else None).field_features
    np.testing.assert_array_equal(features, np.full(shape, 12))
    assert len(cuda.pinned) == pinned + 1 and len(cuda.graphs) == 2
    for keep in (False, True, False):  # as the node does, mesh by mesh: each of the two runs was recorded for good
        made.keep_field = keep
        assert (made.infer(images(4), None).field_features is not None) == keep
    assert len(cuda.graphs) == 2


def test_warming_up_leaves_no_memory(make):
    made = make()
    warm_up(made)
    made.calibrate(rig("front", "back"))
    assert occupied_label(made.infer(images(3), np.eye(4))) == 3


def test_a_valid_engine_is_not_built_again_and_a_damaged_one_is(make, trt, tmp_path, caplog):
    make()
    make()
    assert trt.builds == 1
    (path,) = (tmp_path / "engines").glob("*.engine")
    path.write_bytes(path.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING):
        make()
    assert trt.builds == 2 and "was altered or cut short" in caplog.text


def test_an_engine_that_tensorrt_does_not_take_is_built_anew_once(make, trt, cuda, tmp_path, caplog):
    from occflownet_core.runtime.engine_file import read_engine, write_engine

    made = make()
    (path,) = (tmp_path / "engines").glob("*.engine")
    key = tensorrt_build.engine_key(made.bundle, "fp32", find_gpu(), trt.__version__)
    write_engine(path, key, b"plan for Another GPU\n" + read_engine(path, key))
    with caplog.at_level(logging.WARNING):
        make()
    assert trt.builds == 2 and "does not take the engine (serialization failed)" in caplog.text


def test_another_gpu_another_version_and_another_precision_have_engines_of_their_own(make, trt, cuda, tmp_path):
    make()
    cuda.gpu = "Another GPU"
    make()
    trt.__version__ = "11.5.0"
    make()
    pytest.importorskip("onnx", reason="fp16 rewrites the graph")
    make("fp16")
    assert trt.builds == len(list((tmp_path / "engines").glob("*.engine"))) == 4


def test_half_precision_computes_the_graph_in_half(make, cuda):
    pytest.importorskip("onnx", reason="fp16 rewrites the graph")
    made = make("fp16")
    assert (made.name, made.precision) == ("tensorrt", "fp16")
    made.calibrate(rig("front", "back"))
    for _ in range(3):
        label = occupied_label(made.infer(images(3), np.eye(4)))
    assert label == 9


def test_timings_are_kept_and_those_of_another_machine_are_left(make, trt, cuda, tmp_path, caplog):
    make()
    (timings,) = (tmp_path / "engines").glob("timings-*.cache")
    assert timings.name == "timings-Twin_GPU-sm8.7-trt11.4.0.cache"
    assert trt.timings == [b""]
    for engine_file in (tmp_path / "engines").glob("*.engine"):
        engine_file.unlink()
    make()
    assert trt.timings[1:] == [b"timings of Twin GPU"]
    timings.write_bytes(b"timings of a toaster")
    for engine_file in (tmp_path / "engines").glob("*.engine"):
        engine_file.unlink()
    with caplog.at_level(logging.WARNING):
        make()
    assert trt.timings[2:] == [b""] and "are of another machine or damaged" in caplog.text


def test_what_a_build_needs_and_lacks(make, trt, cuda, bundle, tmp_path):
    trt.refuse = True
    with pytest.raises(EngineError, match=r"refuses node 'node_7' \(Fold\): no importer for it \(and 1 more\); export"):
        make()
    trt.refuse, trt.fail = False, True
    with pytest.raises(EngineError, match=r"could not build 'by hand': \[builder\] insufficient memory"):
        make()
    assert not list((tmp_path / "engines").glob("*.engine"))


def test_memory_that_is_not_there_is_counted(make, cuda):
    cuda.total = 4096
    with pytest.raises(
        EngineError, match=r"Twin GPU is out of memory: 64 MiB more are needed, 0 of 0 MiB are free; end what else"
    ):
        make()
    cuda.total = 64 * MIB + 600
    with pytest.raises(EngineError, match="Twin GPU is out of memory: 0 MiB more are needed"):
        make()
    gc.collect()
    assert not cuda.held


def test_a_graph_that_is_not_as_described(make, tmp_path):
    other = write(tmp_path / "other", hand_made_graph().SerializeToString(), outputs=("labels",))
    with pytest.raises(BundleError, match=r"the engine built from .* has the outputs .* where the bundle describes"):
        make(made_of=other)


def test_a_graph_with_an_operator_that_tensorrt_lacks_is_refused_before_minutes_are_spent(make, trt, tmp_path):
    pytest.importorskip("onnx", reason="the check reads the graph")
    graph = hand_made_graph()
    graph.graph.node[0].op_type, graph.graph.node[0].name = "Det", "bad"
    with pytest.raises(EngineError, match="node 'bad' uses Det"):
        make(made_of=write(tmp_path / "other", graph.SerializeToString()))
    assert trt.builds == 0


def test_preparing_says_where_and_how_long(trt, bundle, tmp_path):
    path, seconds = prepare_engine(bundle, "fp32", tmp_path / "e", console=Console(quiet=True))
    assert path.is_file() and seconds >= 0
    assert prepare_engine(bundle, "fp32", tmp_path / "e") == (path, None)
    assert prepare_engine(bundle, "fp32", tmp_path / "e", rebuild=True)[1] is not None
    assert trt.builds == 2


def test_progress_is_logged_every_ten_seconds(caplog):
    now = [0.0]
    progress = BuildProgress(clock_s=lambda: now[0])
    with caplog.at_level(logging.INFO), progress:
        progress.start("Building Engine", None, 2)
        progress.start("Tactic Selection", "Building Engine", 100)
        for step in range(30):
            now[0] += 1.0
            assert progress.step("Tactic Selection", step)
        progress.finish("Tactic Selection")
    assert [r.getMessage() for r in caplog.records] == [
        f"engine: Building Engine 0 of 2, Tactic Selection {done} of 100" for done in (10, 20, 30)
    ]
    assert progress.sentence() == "Building Engine 0 of 2"
    progress.cancel()
    assert not progress.step("Building Engine", 0)


def test_no_driver(bundle, tmp_path):
    """The real bindings, on a machine without a GPU."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("this machine has a GPU")
    with pytest.raises(EngineError, match=r"no NVIDIA (driver|GPU) here"):
        find_gpu()
    with pytest.raises(EngineError, match=r"no NVIDIA (driver|GPU) here"):
        CudaDevice()


def test_arguments_are_of_the_kinds_that_the_real_bindings_take():
    """Without a driver every call fails, but only after its arguments were understood."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("this machine has a GPU")
    device = object.__new__(CudaDevice)
    device._cuda, device._stream = runtime, runtime.cudaStream_t(0)
    device._held = cuda_device._Held(runtime, device._stream)
    device.gpu = SimpleNamespace(name="none")
    array = np.zeros(4, np.uint8)
    for work in (
        lambda: device.allocate(16),
        lambda: device.pinned((4, 4), "float32"),
        lambda: device.upload(4096, array),
        lambda: device.download(array, 4096),
        lambda: device.copy(4096, 8192, 4),
        lambda: device.clear(4096, 4),
        device.synchronize,
        lambda: device.record(lambda: None),
    ):
        with pytest.raises(EngineError, match="failed: CUDA driver version is insufficient"):
            work()
    assert device.stream == 0


def test_backends_without_their_library(bundle):
    try:
        import tensorrt  # noqa: F401

        pytest.skip("TensorRT is installed here")
    except ImportError:
        pass
    for use in (lambda: create_engine(bundle, "tensorrt"), tensorrt_build.tensorrt):
        with pytest.raises(EngineError, match="TensorRT is not installed; pip install tensorrt cuda-bindings onnx"):
            use()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_itself_does_what_onnx_runtime_does(bundle, tmp_path, precision):
    """The real libraries: built, recorded, replayed; the memory carried along."""
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    try:
        find_gpu()
    except EngineError as error:
        pytest.skip(str(error))
    engines = [create_engine(bundle, "tensorrt", 1, precision, tmp_path / "engines"), OnnxEngine(bundle)]
    for engine in engines:
        engine.calibrate(rig("front", "back"))
    for step in range(10):
        ours, theirs = (engine.infer(images(step % 4), np.eye(4) if step % 6 else None) for engine in engines)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        np.testing.assert_allclose(ours.probability, theirs.probability, atol=1e-3)
    again = create_engine(bundle, "tensorrt", 1, precision, tmp_path / "engines")
    again.calibrate(rig("front", "back"))
    assert occupied_label(again.infer(images(3), None)) == 3
