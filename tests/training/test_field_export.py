# SPDX-License-Identifier: Apache-2.0
"""The graph of queries: what a bundle says about points is what the network says, and labels cost what they did."""

import dataclasses

import numpy as np
import onnx
import pytest
import torch

from occflownet_core.errors import BundleError, EngineError, GeometryError
from occflownet_core.field import OccupancyField, TorchField
from occflownet_core.mesh import extract_mesh
from occflownet_core.model import ModelConfig, OccFlowNet
from occflownet_core.runtime.bundle import load_bundle, write_bundle
from occflownet_core.runtime.factory import create_engine
from occflownet_core.runtime.field_query import FieldQuery
from training.export import export, load_model
from training.parity import drive, ring_rig

CONFIG = {
    "name": "small",
    "cameras": ["a", "b", "c"],
    "image_width_px": 64,
    "image_height_px": 32,
    "grid": {"lower_m": [-6.4, -4.8, -0.8], "upper_m": [6.4, 4.8, 0.8], "voxel_size_m": 0.4},
    "backbone": {"name": "mobilenetv4_conv_small_050", "pretrained": False, "out_indices": [2, 3], "channels": 16},
    "depth": {"bins": {"min_m": 0.5, "max_m": 8.5, "step_m": 1.0}, "context_channels": 6},
    "volume": {"memory_channels": 5, "widths": [12, 16], "blocks": [1, 1]},
    "field": {"channels": 7, "hidden": 8, "layers": 2, "initial_density_per_m": 1.0},
}


@pytest.fixture(scope="module")
def model() -> OccFlowNet:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = load_model(ModelConfig.from_dict(CONFIG), None, seed=4)
    with torch.no_grad():
        model.decoder.density_head[-1].weight *= 4  # loud enough for probabilities of all sizes
    yield model
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    return export(model, tmp_path_factory.mktemp("bundle"), {}, with_weights=True)[0]


def prediction_with_field(bundle, backend: str = "onnxruntime"):
    engine = create_engine(bundle, backend, threads=1)
    engine.calibrate(ring_rig(ModelConfig.from_dict(CONFIG)))
    engine.keep_field = True
    images, _ = next(drive(ModelConfig.from_dict(CONFIG), 1))
    return engine.infer(images, None)


@pytest.fixture(scope="module")
def prediction(bundle):
    return prediction_with_field(bundle)


@pytest.fixture(scope="module")
def field(bundle, prediction):
    return FieldQuery(bundle).field(prediction.field_features)


def points_around(count: int) -> np.ndarray:
    """Some of them outside the box."""
    return np.random.default_rng(5).uniform((-7, -5.5, -1), (7, 5.5, 1), (count, 3)).astype(np.float32)


def test_what_the_bundle_says_about_points_is_what_the_network_says(model, bundle, prediction, field):
    points = points_around(2000)
    features = torch.from_numpy(prediction.field_features).movedim(-1, 1)
    expected = OccupancyField(features, model.grid, model.decoder).query(
        torch.from_numpy(points), model.config.grid.voxel_size_m, gradient=True
    )
    answer = field.samples(points, gradient=True)
    np.testing.assert_allclose(answer.probability, expected.probability, atol=1e-5)
    np.testing.assert_allclose(answer.logits, expected.logits, atol=1e-4)
    np.testing.assert_allclose(answer.gradient_per_m, expected.gradient_per_m, atol=1e-3)
    np.testing.assert_array_equal(answer.inside, expected.inside)
    np.testing.assert_allclose(field.probability(points), expected.probability, atol=1e-5)
    assert 0.3 < answer.inside.mean() < 0.9 and (answer.probability[~answer.inside] == 0).all()
    assert np.ptp(answer.probability[answer.inside]) > 0.3  # otherwise agreement would say little
    assert field.samples(points).gradient_per_m is None


def test_at_working_cells_centres_queries_are_the_labels_probability(prediction, field):
    """Each label cell is an eighth of a working cell here: at the outermost corners both read the same features."""
    grid = ModelConfig.from_dict(CONFIG).grid
    corners = [(i, j, k) for i in (0, -1) for j in (0, -1) for k in (0, -1)]
    centres_m = np.array([grid.centres()[corner] for corner in corners])
    expected = [prediction.probability[corner] for corner in corners]
    np.testing.assert_allclose(field.probability(centres_m), expected, atol=1e-5)


def test_engines_agree_on_the_features_and_hand_them_out_only_when_asked(bundle, prediction):
    network = prediction_with_field(bundle, "torch")
    assert prediction.field_features.shape == bundle.field_features_shape == (1, 2, 12, 16, 7)
    np.testing.assert_allclose(prediction.field_features, network.field_features, atol=1e-4)
    engine = create_engine(bundle, "onnxruntime", threads=1)
    engine.calibrate(ring_rig(ModelConfig.from_dict(CONFIG)))
    images, _ = next(drive(ModelConfig.from_dict(CONFIG), 1))
    for keep in (False, True, False):
        engine.keep_field = keep
        again = engine.infer(images, None)
        assert (again.field_features is not None) == keep
        np.testing.assert_array_equal(again.labels, prediction.labels)
        np.testing.assert_array_equal(again.probability, prediction.probability)


def test_features_cost_the_graph_nothing(bundle):
    """They are what the decoders read anyway: an output of a node whose result others take too."""
    graph = onnx.load(bundle.graph_path).graph
    readers = [node.op_type for node in graph.node if "field_features" in node.input]
    assert readers == ["MatMul", "MatMul"]


def test_no_points_many_points_and_points_that_are_none(field):
    assert field.probability(np.zeros((0, 3))).shape == (0,)
    assert field.samples(np.zeros((0, 3)), gradient=True).gradient_per_m.shape == (0, 3)
    outside = field.samples(np.array([[100.0, 0, 0], [np.inf, 0, 0]]))
    assert not outside.inside.any() and (outside.logits == 0).all()
    many = points_around(70_000)  # more than one batch
    np.testing.assert_array_equal(field.probability(many)[-500:], field.probability(many[-500:]))
    with pytest.raises(GeometryError, match="query point 1 is"):
        field.probability(np.array([[0, 0, 0], [0, np.nan, 0]]))


def test_a_bundles_field_is_meshed_without_torch_as_with_it(model, bundle, prediction, field):
    threshold = float(np.median(prediction.probability))
    features = torch.from_numpy(prediction.field_features).movedim(-1, 1)
    network = TorchField(OccupancyField(features, model.grid, model.decoder), model.config.grid.voxel_size_m)
    ours, theirs = (extract_mesh(f, bundle.lift.grid, threshold, levels=1, refinements=0) for f in (field, network))
    assert len(ours.triangles) > 100
    np.testing.assert_array_equal(ours.triangles, theirs.triangles)
    np.testing.assert_allclose(ours.vertices_m, theirs.vertices_m, atol=1e-3)
    assert (ours.labels == theirs.labels).mean() > 0.99


def test_bundles_without_a_field(bundle, tmp_path):
    write_bundle(
        dataclasses.replace(bundle, directory=tmp_path, field_channels=0),
        {"model.onnx": bundle.graph_path.read_bytes(), "weights.safetensors": bundle.weights_path.read_bytes()},
    )
    old = load_bundle(tmp_path)
    with pytest.raises(BundleError, match="has no graph for queries; export the model again"):
        FieldQuery(old)
    with pytest.raises(EngineError, match="was exported without its field, so it cannot be queried"):
        create_engine(old, "torch", threads=1).keep_field = True


def test_features_of_another_bundle_and_files_that_are_no_graph(bundle, tmp_path):
    with pytest.raises(
        GeometryError, match=r"features have shape \(1, 2, 3, 4, 7\), model 'small' has \(1, 2, 12, 16, 7\)"
    ):
        FieldQuery(bundle).field(np.zeros((1, 2, 3, 4, 7), np.float32))
    files = {"model.onnx": bundle.graph_path.read_bytes(), "field.onnx": b"no graph"}
    write_bundle(dataclasses.replace(bundle, directory=tmp_path), files)
    with pytest.raises(EngineError, match=r"refuses .*field\.onnx"):
        FieldQuery(load_bundle(tmp_path))
