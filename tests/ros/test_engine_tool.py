# SPDX-License-Identifier: Apache-2.0
"""occflownet-engine on the demo's bag and bundle: what it says, how it ends, and that it sees what the node sees."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from occflownet_core.errors import EngineError
from occflownet_core.runtime import cuda_device, tensorrt_build
from occflownet_core.runtime.bundle import load_bundle
from occflownet_ros.engine_inputs import bag_inputs, dataset_inputs
from occflownet_ros.engine_tool import engine_names, main
from occflownet_ros.nuscenes_scene import open_nuscenes
from occflownet_ros.nuscenes_to_bag import main as nuscenes_to_bag
from tests.core.graph_by_hand import hand_made_graph, write
from tests.core.nvidia_twins import CudaTwin, TensorRTTwin

DEMO = Path(__file__).resolve().parents[2] / "demo"
BUNDLE, BAG = str(DEMO / "bundle"), str(DEMO / "bag")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OCCFLOWNET_ENGINE_CACHE", str(tmp_path / "engines"))


def compare(*more: str, engines: str = "onnxruntime,onnxruntime:fp16", bag: str = BAG) -> int:
    pytest.importorskip("onnx", reason="fp16 needs the export or tensorrt extra")
    return main(["compare", "--bundle", BUNDLE, "--engines", engines, "--bag", bag, "--threads", "1", *more])


def test_engines_that_agree_and_what_is_said(tmp_path, capsys):
    out = tmp_path / "deep" / "report.json"
    assert compare("--frames", "3", "--out", str(out)) == 0
    said = capsys.readouterr().out
    for words in (
        "minicity_tiny, 3 frames",
        "onnxruntime:fp16 against onnxruntime",
        "labels alike",
        "agrees with",
        "mIoU",
    ):
        assert words in said
    report = json.loads(out.read_text())
    half = report["engines"]["onnxruntime:fp16"]
    assert [frame["frame"] for frame in half["frames"]] == [
        f.name for f in bag_inputs(DEMO / "bag", load_bundle(BUNDLE), most=3)
    ]
    assert all(0.98 <= frame["label_agreement"] < 1 for frame in half["frames"])
    assert all(0 < frame["largest"]["occupancy_probability"] < 0.1 for frame in half["frames"])
    assert half["first_diverging"] is None and half["warnings"] == []
    assert report["engines"]["onnxruntime"]["frames"] == []
    miou = [engine["scores"]["camera_mask"]["miou_17"] for engine in report["engines"].values()]
    assert miou[0] == pytest.approx(miou[1], abs=0.01) and 0.1 < miou[0] < 0.3


def test_engines_that_differ_end_with_1_and_name_the_frame(capsys):
    assert compare("--frames", "2", "--error", "1e-6") == 1
    first = next(iter(bag_inputs(DEMO / "bag", load_bundle(BUNDLE), most=1))).name
    assert f"differs from onnxruntime from frame {first} on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engines", "onnxruntime"], "name two or more different ones"),
        (["--engines", "torch,torch"], "name two or more different ones"),
        (["--engines", "onnxruntime,fast"], "there is no engine 'fast'; a backend is one of auto, tensorrt"),
        (["--engines", "onnxruntime,torch:int4"], "there is no engine 'torch:int4'"),
        (["--engines", "onnxruntime,torch"], "carries no weights for the backend 'torch'"),
        (["--engines", "onnxruntime,onnxruntime-cuda"], "has no provider 'cuda'; install onnxruntime-gpu"),
        (["--labels", "1.5"], "--labels is 1.5"),
        (["--bundle", "nowhere"], "there is no model bundle at nowhere"),
        (["--bag", "nowhere"], "nowhere"),
        (["--anchor-camera", "CAM_TOP"], "CAM_TOP"),
        (["--out", "/dev/null/x.json"], "cannot be written"),
    ],
)
def test_a_users_mistake_gets_one_sentence(arguments, words, capsys):
    if "onnxruntime-cuda" in arguments[1]:
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this ONNX Runtime has the provider")
    assert compare("--frames", "1", *arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("occflownet-engine: ") and words in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--frames", "0"], ["--scenes", "scene-1"], ["--dataroot", "x"]])
def test_arguments_that_do_not_go_together(arguments):
    with pytest.raises(SystemExit) as ended:
        compare(*arguments)
    assert ended.value.code == 2


@pytest.fixture(scope="module")
def eight_bits(tmp_path_factory) -> Path:
    """The demo's bundle quantised for the CPU, by two frames of its bag."""
    pytest.importorskip("onnx", reason="quantising needs the export or tensorrt extra")
    out = tmp_path_factory.mktemp("quantised") / "int8"
    assert main(["quantise", "--bundle", BUNDLE, "--out", str(out), "--bag", BAG, "--frames", "2"]) == 0
    return out


def test_a_quantised_bundle_against_the_one_that_it_was_made_of(eight_bits, tmp_path, capsys):
    bundle = load_bundle(eight_bits)
    assert bundle.quantisation == {
        "target": "cpu", "data": "bag bag", "frames": 2, "date": date.today().isoformat()
    }  # fmt: skip
    assert bundle.graph_path.stat().st_size < 0.7 * load_bundle(BUNDLE).graph_path.stat().st_size
    assert (eight_bits / "field.onnx").read_bytes() == (DEMO / "bundle" / "field.onnx").read_bytes()
    out, two = tmp_path / "report.json", "onnxruntime,onnxruntime"
    more = ["--bundle", str(eight_bits), "--reference-bundle", BUNDLE, "--frames", "3", "--out", str(out)]
    assert compare(*more, engines=two) == 0
    assert "onnxruntime agrees with onnxruntime of bundle" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["allowed"] == {"label_agreement": 0.98, "probability_error": 0.4}
    frames = report["engines"]["onnxruntime"]["frames"]
    assert all(0.99 < frame["label_agreement"] < 0.9999 for frame in frames)
    assert compare(*more, "--labels", "0.999", engines=two) == 1


def test_mistakes_around_quantising_get_one_sentence(eight_bits, tmp_path, capsys):
    again = ["quantise", "--bundle", str(eight_bits), "--out", str(tmp_path / "again"), "--bag", BAG]
    there = ["quantise", "--bundle", BUNDLE, "--out", str(eight_bits), "--bag", BAG]
    small = write(tmp_path / "small", hand_made_graph().SerializeToString()).directory
    sizes = ["compare", "--bundle", BUNDLE, "--reference-bundle", str(small), "--engines", "onnxruntime,onnxruntime"]
    for arguments, words in (
        (again, "is quantised already"),
        (there, "exists already"),
        ([*sizes, "--bag", BAG], "differ in cameras"),
    ):
        assert main(arguments) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("occflownet-engine: ") and words in errors and errors.count("\n") == 1
    with pytest.raises(SystemExit):
        main([*there, "--frames", "0"])
    assert not (tmp_path / "again").exists()


def test_names_of_engines():
    assert engine_names("onnxruntime, tensorrt:fp16 ,torch:fp32") == ["onnxruntime", "tensorrt:fp16", "torch:fp32"]
    with pytest.raises(EngineError):
        engine_names("")


def test_build_without_tensorrt_says_what_to_install(capsys):
    try:
        import tensorrt  # noqa: F401

        pytest.skip("TensorRT is installed here")
    except ImportError:
        pass
    assert main(["build", "--bundle", BUNDLE, "--precision", "fp16"]) == 2
    errors = capsys.readouterr().err
    assert "TensorRT is not installed" in errors and "pip install" in errors and errors.count("\n") == 1


def test_building_ahead_of_time_says_where_the_engine_is(tmp_path, monkeypatch, capsys):
    """With twins of NVIDIA's libraries."""
    cuda = CudaTwin()
    trt = TensorRTTwin(cuda)
    monkeypatch.setattr(cuda_device, "cuda_runtime", lambda: cuda)
    monkeypatch.setattr(tensorrt_build, "tensorrt", lambda: trt)
    bundle = write(tmp_path / "bundle", hand_made_graph().SerializeToString())
    arguments = ["build", "--bundle", str(bundle.directory), "--engine-cache", str(tmp_path / "here")]
    for words, more, builds in (("built in", [], 1), ("was there already", [], 1), ("built in", ["--rebuild"], 2)):
        assert main([*arguments, *more]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert words in said and trt.builds == builds
    assert len(list((tmp_path / "here").glob("*-fp32-Twin_GPU-sm8.7-trt11.4.0.engine"))) == 1


def test_a_bag_and_the_data_set_that_it_was_made_of_give_the_same(minicity_root, tmp_path):
    pytest.importorskip("nuscenes", reason="reading nuScenes' tables needs nuscenes-devkit")
    version = next(path.parent.name for path in minicity_root.glob("*/sample_data.json"))
    scene = open_nuscenes(minicity_root, version).scene[0]["name"]
    bag = tmp_path / "bag"
    root = ["--dataroot", str(minicity_root), "--version", version, "--scene", scene]
    assert nuscenes_to_bag([*root, "--out", str(bag)]) == 0
    bundle = load_bundle(BUNDLE)
    ours, theirs = list(bag_inputs(bag, bundle)), list(dataset_inputs(minicity_root, version, (), bundle))
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert a.name == b.name and a.rig.names == b.rig.names
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.truth, b.truth)
        np.testing.assert_array_equal(a.camera_mask, b.camera_mask)
        assert (a.previous_from_current is None) == (b.previous_from_current is None)
        if a.previous_from_current is not None:
            np.testing.assert_allclose(a.previous_from_current, b.previous_from_current, atol=1e-9)
        for one, other in zip(a.rig, b.rig, strict=True):
            np.testing.assert_allclose(one.intrinsic, other.intrinsic)
            np.testing.assert_allclose(one.ego_from_camera, other.ego_from_camera, atol=1e-12)
    assert [frame.previous_from_current is None for frame in ours] == [True, False, False]
    assert len(list(dataset_inputs(minicity_root, version, [scene], bundle, most=2))) == 2
