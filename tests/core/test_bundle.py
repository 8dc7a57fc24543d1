# SPDX-License-Identifier: Apache-2.0
"""Model bundles: what is written is read back, and every way to be wrong is told in one sentence."""

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from occflownet_core.errors import BundleError
from occflownet_core.grid import VoxelGrid
from occflownet_core.lift_tables import DepthBins, LiftSpec
from occflownet_core.runtime.bundle import Bundle, RecurrentState, load_bundle, write_bundle

GRID = VoxelGrid((-4, -2, -1), (4, 2, 1), 0.5)
GRAPH = b"not really a graph, but bytes with a hash"


def make(directory: Path) -> Bundle:
    return Bundle(
        directory=directory,
        name="little",
        cameras=("CAM_FRONT", "CAM_BACK"),
        image_width_px=64,
        image_height_px=32,
        grid=GRID,
        lift=LiftSpec(GRID.coarsened(2), DepthBins(1.0, 9.0, 0.5), 4, 8, slots=2, reference_focal_px=50.0),
        occupancy_threshold=0.35,
        recurrent=(RecurrentState("state", "next_state", (1, 8, 4, 8)),),
        outputs=("labels", "occupancy_probability"),
        model={"name": "little", "widths": [1, 2]},
        provenance={"training": "none", "epochs": 0},
        metrics={"miou": 0.125},
    )


@pytest.fixture
def bundle(tmp_path):
    written = make(tmp_path / "bundle")
    write_bundle(written, {"model.onnx": GRAPH})
    return written


def rewrite(bundle: Bundle, **changes: object) -> None:
    path = bundle.directory / "bundle.yaml"
    description = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump({key: value for key, value in description.items() if value is not None}))


def refusal(path: Path) -> str:
    with pytest.raises(BundleError) as error:
        load_bundle(path)
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


def test_what_is_written_is_read_back(bundle):
    assert load_bundle(bundle.directory) == bundle
    assert load_bundle(str(bundle.directory)).graph_path.read_bytes() == GRAPH
    assert bundle.weights_path is None


def test_the_description_is_plain_yaml_with_the_graphs_sha256(bundle):
    description = yaml.safe_load((bundle.directory / "bundle.yaml").read_text())
    assert description["format_version"] == 1
    assert description["sha256"] == {"model.onnx": hashlib.sha256(GRAPH).hexdigest()}
    assert description["classes"][0] == "others"
    assert description["classes"][17] == "free"


def test_weights_come_and_go_with_the_bundle_that_has_them(bundle):
    write_bundle(bundle, {"model.onnx": GRAPH, "weights.safetensors": b"numbers"})
    assert load_bundle(bundle.directory).weights_path.read_bytes() == b"numbers"
    write_bundle(bundle, {"model.onnx": GRAPH})
    assert load_bundle(bundle.directory).weights_path is None
    assert sorted(path.name for path in bundle.directory.iterdir()) == ["bundle.yaml", "model.onnx"]


def test_the_image_transform_leads_to_the_graphs_size(bundle):
    transform = bundle.image_transform(1600, 900)
    assert (transform.width_px, transform.height_px) == (64, 32)
    assert (transform.resized_width_px, transform.resized_height_px) == (64, 36)  # 900 * 64 / 1600
    assert transform.top_px == 4


def test_a_missing_folder(tmp_path):
    assert "there is no model bundle at" in refusal(tmp_path / "nowhere")


def test_a_folder_without_description(tmp_path):
    assert "holds no bundle.yaml" in refusal(tmp_path)


def test_a_missing_graph(bundle):
    bundle.graph_path.unlink()
    sentence = refusal(bundle.directory)
    assert "lacks model.onnx" in sentence
    assert "copy the whole folder again" in sentence


@pytest.mark.parametrize("content", [GRAPH[:-1], GRAPH + b".", b""], ids=["cut", "longer", "empty"])
def test_an_altered_graph(bundle, content):
    bundle.graph_path.write_bytes(content)
    sentence = refusal(bundle.directory)
    assert "model.onnx was altered" in sentence
    assert hashlib.sha256(content).hexdigest()[:12] in sentence
    assert hashlib.sha256(GRAPH).hexdigest()[:12] in sentence


def test_altered_weights(bundle):
    write_bundle(bundle, {"model.onnx": GRAPH, "weights.safetensors": b"numbers"})
    (bundle.directory / "weights.safetensors").write_bytes(b"other numbers")
    assert "weights.safetensors was altered" in refusal(bundle.directory)


def test_weights_that_do_not_belong(bundle):
    (bundle.directory / "weights.safetensors").write_bytes(b"numbers")
    assert "does not belong to the bundle" in refusal(bundle.directory)


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_an_unknown_format_version(bundle, version):
    rewrite(bundle, format_version=version)
    assert f"has format version {version}, this program reads 1" in refusal(bundle.directory)


@pytest.mark.parametrize(
    "text", ["{cameras: [", "- just\n- a list\n", "", "\x00", "!!python/object/apply:os.getcwd []"]
)
def test_a_malformed_description(bundle, text):
    (bundle.directory / "bundle.yaml").write_text(text)
    assert "export the model again" in refusal(bundle.directory)


@pytest.mark.parametrize(
    "key", ["name", "cameras", "image", "grid", "lift", "occupancy_threshold", "recurrent", "sha256"]
)
def test_a_missing_entry_is_named(bundle, key):
    rewrite(bundle, **{key: None})
    assert f"lacks the entry '{key}'" in refusal(bundle.directory)


@pytest.mark.parametrize(
    "changes",
    [
        {"occupancy_threshold": "high"},
        {"grid": {"lower_m": [0, 0, 0], "upper_m": [1, 1, 1], "voxel_size_m": 0.3}},
        {"grid": {"corner": 1}},
        {"image": 7},
        {"sha256": [1]},
        {"recurrent": [{"input": "a", "output": "b", "shape": ["x"], "dtype": "float32"}]},
    ],
)
def test_a_wrong_value(bundle, changes):
    rewrite(bundle, **changes)
    assert "holds a wrong value" in refusal(bundle.directory)


def test_other_classes(bundle):
    names = yaml.safe_load((bundle.directory / "bundle.yaml").read_text())["classes"]
    rewrite(bundle, classes=[*names[:4], "carriage", *names[5:]])
    assert "class 4 is 'carriage' where this program has 'car'" in refusal(bundle.directory)
    rewrite(bundle, classes=names[:16])
    assert "it has 16 classes where this program has 18" in refusal(bundle.directory)


def test_hashes_of_files_elsewhere_are_not_followed(bundle):
    rewrite(bundle, sha256={"model.onnx": hashlib.sha256(GRAPH).hexdigest(), "../secret": "0"})
    assert "../secret" in refusal(bundle.directory)


def test_the_graph_of_queries_comes_and_goes_with_the_field(tmp_path, bundle):
    assert bundle.field_graph_path is None
    asked = dataclasses.replace(make(bundle.directory), field_channels=6)
    write_bundle(asked, {"model.onnx": GRAPH, "field.onnx": b"second"})
    read = load_bundle(bundle.directory)
    assert read == asked and read.field_graph_path.read_bytes() == b"second"
    assert read.field_features_shape == (1, 2, 4, 8, 6)  # cells of 1 m: 8 x 4 x 2 in x, y, z
    rewrite(bundle, field_channels=0)
    assert "holds model.onnx, no field.onnx and maybe weights.safetensors" in refusal(bundle.directory)
    write_bundle(make(bundle.directory), {"model.onnx": GRAPH})
    assert not (bundle.directory / "field.onnx").exists()
    (bundle.directory / "field.onnx").write_bytes(b"left over")
    assert "field.onnx does not belong to the bundle" in refusal(bundle.directory)
    with pytest.raises(BundleError, match=r"a bundle holds model\.onnx, field\.onnx and maybe .*, got model\.onnx"):
        write_bundle(dataclasses.replace(asked, directory=tmp_path / "x"), {"model.onnx": GRAPH})


def test_bundles_from_before_there_were_queries_are_read(bundle):
    rewrite(bundle, field_channels=None)
    assert load_bundle(bundle.directory).field_channels == 0


def test_a_bundle_without_graph_is_not_written(tmp_path):
    with pytest.raises(BundleError, match=r"a bundle holds model\.onnx"):
        write_bundle(make(tmp_path / "x"), {"weights.safetensors": b""})
    assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BundleError, match="cannot be written"):
        write_bundle(make(tmp_path / "file" / "bundle"), {"model.onnx": GRAPH})


def test_the_runtime_does_not_import_torch():
    program = (
        "import sys, occflownet_core.runtime.bundle, occflownet_core.runtime.engine, occflownet_core.runtime.onnx_engine;"
        "import occflownet_core.runtime.field_query, occflownet_core.mesh;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_bundle_is_frozen(bundle):
    with pytest.raises(dataclasses.FrozenInstanceError):
        bundle.name = "other"
