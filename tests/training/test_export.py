# SPDX-License-Identifier: Apache-2.0
"""Export: the shipped configuration's graph does what the network does, on operators that every runtime has."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper

from occflownet_core.errors import EngineError, ExportError
from occflownet_core.model import ModelConfig, OccFlowNet
from occflownet_core.runtime.bundle import load_bundle, write_bundle
from occflownet_core.runtime.factory import create_engine
from training.export import export, load_model, main
from training.graph import export_graph, require_native_operators
from training.parity import check_parity, drive, ring_rig

CONFIG = Path(__file__).resolve().parents[2] / "training" / "configs" / "minicity_tiny.yaml"
SMALL = """
model:
  name: small
  cameras: [a, b, c]
  image_width_px: 64
  image_height_px: 32
  grid: {lower_m: [-6.4, -4.8, -0.8], upper_m: [6.4, 4.8, 0.8], voxel_size_m: 0.4}
  backbone: {name: mobilenetv4_conv_small_050, pretrained: false, out_indices: [2, 3], channels: 16}
  depth: {bins: {min_m: 0.5, max_m: 8.5, step_m: 1.0}, context_channels: 6}
  volume: {memory_channels: 5, widths: [12, 16], blocks: [1, 1]}
  field: {channels: 7, hidden: 8, layers: 1}
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Waiting for a second thread costs more than it gains on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny() -> OccFlowNet:
    """minicity_tiny with random weights, its decoders loud enough to give probabilities from 0 to 1."""
    model = load_model(ModelConfig.from_yaml(CONFIG), None, seed=1)
    with torch.no_grad():
        model.decoder.density_head[-1].weight *= 4
        model.decoder.semantic_head[-1].weight *= 4
    return model


@pytest.fixture(scope="module")
def bundle(tiny, tmp_path_factory):
    return export(tiny, tmp_path_factory.mktemp("tiny"), {"training": "none"}, with_weights=True)[0]


@pytest.fixture
def small_config(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_network_and_graph_agree_over_a_drive(tiny, bundle):
    """The graph by ONNX Runtime against the network by PyTorch, six frames, ego motion changing from frame to frame."""
    rig = ring_rig(tiny.config)
    engines = [create_engine(bundle, backend, threads=1) for backend in ("onnxruntime", "torch")]
    for engine in engines:
        engine.calibrate(rig)
        engine.occupancy_threshold = 0.3
    motions, occupied = [], []
    for images, previous_from_current in drive(tiny.config, 6):
        graph, network = (engine.infer(images, previous_from_current) for engine in engines)
        assert (graph.labels == network.labels).mean() >= 0.999
        np.testing.assert_allclose(graph.probability, network.probability, atol=1e-3)
        assert graph.labels.shape == (200, 200, 16)
        motions.append(previous_from_current)
        occupied.append((graph.labels != 17).mean())
        # Otherwise agreement would say little.
        assert np.ptp(graph.probability) > 0.8
        assert len(np.unique(graph.labels)) > 8
    assert all(not np.allclose(a, b) for a, b in itertools.pairwise(motions))
    assert all(0.1 < share < 0.9 for share in occupied)


def test_memory_motion_and_missing_cameras_change_what_the_graph_sees(tiny, bundle):
    engine = create_engine(bundle, "onnxruntime", threads=1)
    engine.calibrate(ring_rig(tiny.config))
    (first, _), (second, motion) = drive(tiny.config, 2)
    engine.infer(first, None)
    remembering = engine.infer(second, motion).probability
    engine.infer(first, None)
    elsewhere = engine.infer(second, np.eye(4)).probability
    forgetful = engine.infer(second, None).probability
    np.testing.assert_array_equal(forgetful, engine.infer(second, None).probability)
    blind = engine.infer(second, None, missing_cameras=range(6)).probability
    for other in (elsewhere, forgetful, blind):
        assert np.abs(remembering - other).max() > 0.05


def test_velocity_is_an_output_where_the_field_has_it(small_config, tmp_path):
    config = ModelConfig.from_yaml(small_config)
    torch.manual_seed(0)
    model = OccFlowNet(dataclasses.replace(config, field=dataclasses.replace(config.field, velocity=True))).eval()
    torch.nn.init.normal_(model.decoder.velocity_head[-1].weight)
    bundle = export(model, tmp_path / "bundle", {"training": "none"}, with_weights=True)[0]
    assert bundle.outputs == ("labels", "occupancy_probability", "velocity")
    images, _ = next(drive(config, 1))
    seen = []
    for backend in ("onnxruntime", "torch"):
        engine = create_engine(bundle, backend, threads=1)
        engine.calibrate(ring_rig(config))
        seen.append(engine.infer(images, None).velocity_mps)
    assert seen[0].shape == (*config.grid.shape, 3) and np.abs(seen[0]).max() > 0.1
    np.testing.assert_allclose(*seen, atol=1e-3)
    engine = create_engine(export(OccFlowNet(config).eval(), tmp_path / "still", {})[0], "onnxruntime", threads=1)
    engine.calibrate(ring_rig(config))
    assert engine.infer(images, None).velocity_mps is None


def test_half_the_size_sees_almost_the_same(tiny, bundle, tmp_path):
    half, parity = export(tiny, tmp_path / "half", {"training": "none"}, half_size=True)
    assert 0 < parity.probability_error <= 0.1 and 0.98 <= parity.label_agreement < 1
    assert half.graph_path.stat().st_size < 0.55 * bundle.graph_path.stat().st_size
    types = {
        constant.data_type for constant in onnx.load(half.graph_path).graph.initializer if np.prod(constant.dims) > 5000
    }
    assert types == {onnx.TensorProto.FLOAT16}


def test_missing_cameras_are_not_looked_at(tiny, bundle):
    engine = create_engine(bundle, "onnxruntime", threads=1)
    engine.calibrate(ring_rig(tiny.config))
    images, _ = next(drive(tiny.config, 1))
    other = images.copy()
    other[2] = 255 - other[2]
    one = engine.infer(images, None, missing_cameras=[2]).probability
    np.testing.assert_array_equal(one, engine.infer(other, None, missing_cameras=[2]).probability)


def test_the_graph_keeps_to_native_operators(bundle):
    graph = onnx.shape_inference.infer_shapes(onnx.load(bundle.graph_path))
    operators = {node.op_type for node in graph.graph.node}
    assert not {op for op in operators if op.startswith(("Scatter", "Loop", "If", "Scan", "NonZero"))}
    assert {node.domain for node in graph.graph.node} == {""}
    assert {entry.version for entry in graph.opset_import if entry.domain == ""} == {18}
    assert len(graph.functions) == 0
    assert TensorProto.DOUBLE not in {tensor.data_type for tensor in graph.graph.initializer}
    rank = {v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.graph.input, *graph.graph.value_info)}
    for node in graph.graph.node:
        if node.op_type in ("GridSample", "Resize"):
            assert rank[node.input[0]] == 4
    # Every shape is known when the graph is built: TensorRT plans best then.
    assert all(d.HasField("dim_value") for v in graph.graph.value_info for d in v.type.tensor_type.shape.dim)


def test_the_graphs_boundary(bundle):
    graph = onnx.load(bundle.graph_path).graph
    kinds = {TensorProto.UINT8: "u8", TensorProto.INT32: "i32", TensorProto.FLOAT: "f32"}

    def signature(values):
        return {
            v.name: (kinds[v.type.tensor_type.elem_type], *(d.dim_value for d in v.type.tensor_type.shape.dim))
            for v in values
        }

    assert signature(graph.input) == {
        "images": ("u8", 6, 128, 352, 3),
        "pixel_index": ("i32", 80000, 2),
        "depth_index": ("i32", 80000, 2, 2),
        "depth_weight": ("f32", 80000, 2, 2),
        "previous_from_current": ("f32", 4, 4),
        "occupancy_threshold": ("f32",),
        "state": ("f32", 1, 128, 100, 100),
    }
    assert signature(graph.output) == {
        "labels": ("u8", 200, 200, 16),
        "occupancy_probability": ("f32", 200, 200, 16),
        "field_features": ("f32", 1, 8, 100, 100, 32),
        "next_state": ("f32", 1, 128, 100, 100),
    }
    # TensorRT has uint8 at the boundary only: it comes in by a cast and goes out by one.
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    assert made_by["labels"] == "Cast"
    assert [node.op_type for node in graph.node if "images" in node.input] == ["Cast"]


def test_the_bundle_is_small_and_tells_no_machines_paths(bundle):
    content = bundle.graph_path.read_bytes()
    assert len(content) < 25e6
    for trace in (b"site-packages", b".py", str(Path.cwd()).encode(), b"pkg.torch"):
        assert trace not in content


def test_another_networks_graph_is_refused(bundle):
    other = load_model(ModelConfig.from_yaml(CONFIG), None, seed=2)
    with pytest.raises(ExportError, match="the exported graph is not the network"):
        check_parity(other, bundle, frames=1)


def test_weights_of_another_network_are_refused(bundle, tmp_path):
    other = dataclasses.replace(bundle, directory=tmp_path)
    weights = safetensors.torch.save({"weight": torch.zeros(1)})
    graphs = {path.name: path.read_bytes() for path in (bundle.graph_path, bundle.field_graph_path)}
    write_bundle(other, {**graphs, "weights.safetensors": weights})
    with pytest.raises(EngineError, match=r"weights\.safetensors is not of the bundle's network"):
        create_engine(load_bundle(tmp_path), "torch")


def one_node(op: str, rank: int, domain: str = "") -> onnx.ModelProto:
    shape = [1] * rank
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("a", "b", "out")]
    graph = helper.make_graph([helper.make_node(op, ["a", "b"], ["out"], domain=domain)], "g", tensors[:2], tensors[2:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("custom", 1)])


@pytest.mark.parametrize(
    ("graph", "refused"),
    [
        (one_node("ScatterND", 4), "uses ScatterND"),
        (one_node("Loop", 4), "uses Loop"),
        (one_node("Pool", 4, "custom"), r"uses custom\.Pool"),
        (one_node("GridSample", 5), "uses GridSample, and it works on other than 2D maps"),
    ],
)
def test_foreign_operators_are_refused(graph, refused):
    with pytest.raises(ExportError, match=refused):
        require_native_operators(graph)


def test_a_2d_grid_sample_is_native():
    require_native_operators(one_node("GridSample", 4))


def test_a_model_that_scatters_is_not_exported(small_config):
    class Scattering(OccFlowNet):
        def observe(self, images, tables):
            seen = super().observe(images, tables)
            rows = tables.pixel_index[0, :, 0].long() % 12
            where = torch.tensor(0), torch.tensor(0), rows
            return seen._replace(volume=seen.volume.index_put(where, seen.volume.new_zeros(16)))

    torch.manual_seed(0)
    with pytest.raises(ExportError, match="uses Scatter"):
        export_graph(Scattering(ModelConfig.from_yaml(small_config)).eval())


def test_the_command_line(small_config, tmp_path, capsys):
    out = tmp_path / "bundle"
    note = "Knows nothing yet."
    assert main(["--config", str(small_config), "--out", str(out), "--seed", "3", "--note", note]) == 0
    assert "labels that agree" in capsys.readouterr().out
    bundle = load_bundle(out)
    assert bundle.name == "small"
    assert bundle.cameras == ("a", "b", "c")
    assert "untrained: random weights of seed 3" in bundle.provenance["training"]
    assert bundle.provenance["note"] == note
    assert bundle.weights_path is None
    assert ModelConfig.from_dict(bundle.model) == ModelConfig.from_yaml(small_config)


def test_a_checkpoint_goes_into_the_bundle(small_config, tmp_path):
    model = load_model(ModelConfig.from_yaml(small_config), None, seed=5)
    checkpoint = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), checkpoint, metadata={"epochs": "12"})
    options = ["--config", str(small_config), "--checkpoint", str(checkpoint), "--occupancy-threshold", "0.2"]
    assert main([*options, "--out", str(tmp_path / "b"), "--with-weights"]) == 0
    bundle = load_bundle(tmp_path / "b")
    assert bundle.provenance["checkpoint"] == "weights.safetensors"
    assert bundle.provenance["epochs"] == "12"
    assert bundle.occupancy_threshold == 0.2
    stored = safetensors.torch.load_file(bundle.weights_path)
    assert all(torch.equal(stored[name], value) for name, value in model.state_dict().items())
    assert check_parity(model, bundle, frames=2).label_agreement == 1.0


def test_the_same_seed_gives_the_same_network(small_config):
    config = ModelConfig.from_yaml(small_config)
    first, again, other = (load_model(config, None, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint", "missing.safetensors"], "missing.safetensors cannot be read"),
        (["--checkpoint", "weights.pt"], "is not a .safetensors file"),
        (["--checkpoint", "broken.safetensors"], "broken.safetensors cannot be read"),
        (["--checkpoint", "other.safetensors"], "is not of this configuration"),
        (["--occupancy-threshold", "3"], "occupancy_threshold is 3.0; give a probability from 0 to 1"),
        (["--config", "missing.yaml"], "missing.yaml cannot be read"),
        (["--config", "typo.yaml"], "'nmae'"),
    ],
)
def test_a_users_mistake_gets_one_sentence_and_writes_nothing(
    small_config, tmp_path, monkeypatch, capsys, arguments, words
):
    monkeypatch.chdir(tmp_path)
    Path("broken.safetensors").write_bytes(b"\x00" * 20)
    Path("typo.yaml").write_text("model: {nmae: x}")
    safetensors.torch.save_file({"weight": torch.zeros(1)}, "other.safetensors")
    assert main(["--config", str(small_config), "--out", "bundle", *arguments]) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert errors.count("\n") == 1
    assert not Path("bundle").exists()


def test_help_teaches():
    text = subprocess.run(
        [sys.executable, "-m", "training.export", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=CONFIG.parents[2],
    ).stdout
    for word in ("--config", "--checkpoint", "--with-weights", "Example:", "probability 0..1"):
        assert word in text
