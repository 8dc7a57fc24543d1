# SPDX-License-Identifier: Apache-2.0
"""Evaluation: the keyframe loop against the engine run by hand, an engine that knows the truth, and the command line."""

import dataclasses
import json

import cv2
import numpy as np
import pytest
import torch

from occflownet_core import poses
from occflownet_core.camera import CameraRig
from occflownet_core.errors import ExportError
from occflownet_core.evaluation import OccupancyEvaluation, difference
from occflownet_core.grid import OCC3D_GRID
from occflownet_core.labels import FREE
from occflownet_core.metrics import VoxelScores, confusion_matrix
from occflownet_core.model import ModelConfig, OccFlowNet
from occflownet_core.ray_metrics import RayCaster, RayScores
from occflownet_core.runtime.bundle import load_bundle
from occflownet_core.runtime.engine import Engine, Prediction
from occflownet_core.runtime.factory import create_engine
from training.checkpoint import CONFIG_KEY, PROVENANCE_KEY
from training.data.nuscenes import KeyframeIndex, load_occupancy
from training.evaluate import evaluate, main, run_keyframes, scene_ray_origins_m
from training.export import measured

VERSION = "v1.0-tiny"


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return load_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def index(tiny_root, bundle) -> KeyframeIndex:
    return KeyframeIndex(tiny_root.path, VERSION, cameras=bundle.cameras).first(2)


class KnowingEngine(Engine):
    """Says the truth of one keyframe after the other, as an engine would."""

    name = "knowing"

    def __init__(self, bundle, truths: list[np.ndarray], probability: float | None) -> None:
        super().__init__(bundle)
        self.truths, self.probability = iter(truths), probability
        self.calibrations = self.resets = 0
        self.motions = []

    def reset(self) -> None:
        self.resets += 1

    def _load_tables(self, tables) -> None:
        self.calibrations += 1

    def _forward(self, images, previous_from_current):
        self.motions.append(previous_from_current)
        truth = next(self.truths)
        if self.probability is None:
            return Prediction(truth)
        occupied = truth != FREE
        # Free voxels are improbable cars: whoever applies no threshold sees them all.
        probability = np.where(occupied, self.probability, 0.1).astype(np.float32)
        return Prediction(np.where(occupied, truth, 4).astype(np.uint8), probability)


def truths(index) -> list[np.ndarray]:
    return [load_occupancy(keyframe, OCC3D_GRID)[0] for keyframe in index.keyframes]


@pytest.mark.parametrize("reference", ["lidar", "anchor"])
def test_the_loop_is_the_engine_run_by_hand(index, bundle, reference):
    threshold = 0.0625  # random weights are never sure of anything
    engine = create_engine(bundle, threads=1)
    results = list(run_keyframes(engine, index, reference))
    assert [result.keyframe for result in results] == [0, 1, 2, 3]

    by_hand = create_engine(bundle, threads=1)
    by_hand.occupancy_threshold = threshold
    for scene in ((0, 1), (2, 3)):
        for i in scene:
            keyframe = index[i]
            images = []
            for frame in keyframe.cameras:
                transform = bundle.image_transform(frame.width_px, frame.height_px)
                images.append(transform.image(cv2.cvtColor(cv2.imread(str(frame.path)), cv2.COLOR_BGR2RGB)))
            rig = keyframe.rig()
            if reference == "anchor":
                rig = CameraRig(
                    tuple(
                        dataclasses.replace(camera, ego_from_camera=frame.ego_from_sensor)
                        for camera, frame in zip(rig, keyframe.cameras, strict=True)
                    )
                )
            by_hand.calibrate(rig)

            def pose(k):
                return (k.lidar if reference == "lidar" else k.cameras[1]).global_from_ego

            motion = None if i == scene[0] else poses.inverse(pose(index[i - 1])) @ pose(keyframe)
            expected = by_hand.infer(np.stack(images), motion)
            assert (expected.labels != FREE).any() and (expected.labels == FREE).any()
            assert np.array_equal(results[i].labels_at(threshold), expected.labels)
            assert np.array_equal(results[i].probability, expected.probability)


def test_memory_starts_anew_with_each_scene(index, bundle, tiny_root):
    engine = KnowingEngine(bundle, truths(index), 0.9)
    list(run_keyframes(engine, index, "anchor"))
    assert engine.resets == 2 and engine.calibrations == 1  # the extrinsics never change
    assert np.array_equal(engine.motions[0], np.eye(4)) and np.array_equal(engine.motions[2], np.eye(4))
    expected = poses.inverse(index[0].anchor.global_from_ego) @ index[1].anchor.global_from_ego
    assert engine.motions[1] == pytest.approx(expected.astype(np.float32), abs=1e-4)
    engine = KnowingEngine(bundle, truths(index), 0.9)
    list(run_keyframes(engine, index, "lidar"))
    assert engine.calibrations == 4


@pytest.mark.parametrize("probability", [None, 0.7])
def test_an_engine_that_knows_the_truth(index, bundle, probability):
    if probability is None:
        bundle = dataclasses.replace(bundle, outputs=("labels",))
    engine = KnowingEngine(bundle, truths(index), probability)
    report = evaluate(engine, index, threshold=0.5)
    assert report["samples"] == 4
    for part in ("camera_mask", "no_mask"):
        assert report[part]["miou_17"] == report[part]["geometric_iou"] == report[part]["iou"]["car"] == 1
        assert report[part]["iou"]["bus"] is None and report[part]["static_miou"] is None
    assert report["rays"]["ray_iou"] == report["rays"]["ray_iou_1m"] == 1
    if probability is None:
        assert report["threshold_sweep"] == []
        return
    rows = {row["threshold"]: row for row in report["threshold_sweep"]}
    assert rows[0.65]["miou_17"] == 1
    assert rows[0.7]["recall"] == 0  # not above
    # Below 0.1 every free voxel of the mask (70 x 70 x 16 cells) is a car too; the car has 10 x 5 x 3 voxels, all in it.
    assert rows[0.05]["precision"] == pytest.approx(150 / (70 * 70 * 16))


def test_scores_of_the_parts_agree_with_the_metrics():
    rng = np.random.default_rng(0)
    grid = OCC3D_GRID
    evaluation = OccupancyEvaluation(grid)
    confusion, rays = np.zeros((2, 18, 18), int), RayScores()
    for _ in range(2):
        truth = np.where(rng.random(grid.shape) < 0.05, rng.integers(0, 17, grid.shape), FREE).astype(np.uint8)
        guess = np.where(rng.random(grid.shape) < 0.5, truth, np.roll(truth, 1, 0))
        mask = rng.random(grid.shape) < 0.3
        origins_m = rng.uniform((-5, -5, 1), (5, 5, 2), (1, 3))
        evaluation.add(guess, truth, mask, origins_m)
        confusion += confusion_matrix(guess, truth, mask), confusion_matrix(guess, truth)
        caster = RayCaster(grid, origins_m)
        rays.add(caster.cast(guess), caster.cast(truth))
    report = evaluation.to_dict()
    for part, matrix in zip(("camera_mask", "no_mask"), confusion, strict=True):
        scores = VoxelScores.of(matrix)
        assert report[part]["miou_17"] == scores.miou and report[part]["dynamic_miou"] == scores.dynamic_miou
        # 15 classes: all but others (0) and other_flat (12).
        assert report[part]["miou_15"] == pytest.approx(np.nanmean(np.delete(scores.iou, [0, 12])))
        assert list(report[part]["iou"].values()) == pytest.approx(scores.iou.tolist())
    assert report["rays"]["ray_iou"] == rays.ray_iou
    assert report["rays"]["ray_iou_2m"] == pytest.approx(np.nanmean(rays.iou[1]))


def test_ray_origins_of_a_scene(index):
    origins_m = scene_ray_origins_m(index, 1)
    # Two keyframes of about 8 m/s, 0.5 s apart: now (the LiDAR's place on the roof) and 4 m away.
    assert origins_m.shape == (2, 3)
    assert origins_m[1] == pytest.approx([0.94, 0, 1.84])
    assert np.linalg.norm(origins_m[1] - origins_m[0]) == pytest.approx(4, abs=0.1)


def test_difference_by_hand():
    guess = np.array([4, 4, FREE, 4, FREE, 4], np.uint8)
    truth = np.array([4, 10, 4, FREE, FREE, 4], np.uint8)
    mask = np.array([1, 1, 1, 1, 1, 0], bool)
    assert difference(guess, truth, mask).tolist() == [0, 1, 2, 3, FREE, FREE]


def command(tiny_root, bundle_path, out, *more: str) -> list[str]:
    return ["--bundle", str(bundle_path), "--dataroot", str(tiny_root.path), "--out", str(out), "--threads", "1", *more]


def test_command_line(tiny_root, tiny_bundle, tmp_path, capsys):
    out = tmp_path / "deep" / "eval.json"
    arguments = ("--split", "val", "--keyframes", "1", "--pictures", "1", "--threshold", "0.06")
    assert main(command(tiny_root, tiny_bundle, out, *arguments)) == 0
    report = json.loads(out.read_text())
    assert report["samples"] == 1 and report["data"]["split"] == "val" and report["data"]["version"] == VERSION
    settings = report["settings"]
    assert settings["occupancy_threshold"] == 0.06 and settings["reference"] == "lidar"
    assert "trained_with_camera_mask" in settings and set(report["camera_mask"]) >= {"miou_17", "miou_15", "iou"}
    assert len(report["threshold_sweep"]) == 19
    picture = cv2.imread(str(tmp_path / "deep" / "eval" / "tiny-0002_tiny-0002-0.png"))
    assert picture.shape[1] > 1500 and picture.std() > 10
    printed = capsys.readouterr().out
    assert "RayIoU" in printed and "occupancy threshold 0.06" in " ".join(printed.split())
    kept = measured(out)
    assert kept["evaluated_on"] == f"{tiny_root.path.name}, 1 keyframes of 1 scenes, camera mask, 17 classes"
    assert kept["occupancy_threshold"] == 0.06
    assert kept["geometric_iou"] == pytest.approx(report["camera_mask"]["geometric_iou"], abs=1e-4)
    out.write_text("{}")
    with pytest.raises(ExportError, match=r"give the JSON of training\.evaluate"):
        measured(out)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--split", "nonsense"], "there is no split 'nonsense'"),
        (["--scenes", "scene-0001"], "no scene scene-0001"),
        (["--version", "v1.0-x"], "there are no tables at"),
        (["--threshold", "1.5"], "--threshold is 1.5"),
        (["--keyframes", "0"], "the first 0 keyframes"),
        (["--bundle", "/nowhere"], "there is no model bundle at /nowhere"),
        (["--dataroot", "/nowhere"], "/nowhere has no folder with tables"),
        (["--out", "/proc/eval.json"], "--out /proc/eval.json cannot be written"),
    ],
)
def test_bad_command_lines_get_one_sentence(tiny_root, tiny_bundle, tmp_path, capsys, more, says):
    assert main(command(tiny_root, tiny_bundle, tmp_path / "eval.json", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate: ") and says in error and error.count("\n") == 1


def test_missing_labels_are_named(own_tiny_root, tiny_bundle, tmp_path, capsys):
    path = own_tiny_root.path / "gts" / "tiny-0002" / "tiny-0002-0" / "labels.npz"
    path.unlink()
    assert main(command(own_tiny_root, tiny_bundle, tmp_path / "eval.json", "--split", "val")) == 2
    error = capsys.readouterr().err
    assert f"occupancy labels {path} are missing (split 'val')" in error


def test_real_keyframes_without_labels_say_so(nuscenes_real_root, tiny_bundle, tmp_path, capsys):
    arguments = [
        "--bundle",
        str(tiny_bundle),
        "--dataroot",
        str(nuscenes_real_root),
        "--split",
        "val",
        "--threads",
        "1",
    ]
    assert main([*arguments, "--out", str(tmp_path / "eval.json")]) == 2
    assert "are missing (split 'val'); unpack Occ3D's gts folder" in capsys.readouterr().err


def test_a_checkpoint_is_exported_and_measured(tiny_root, tmp_path):
    """A network of two cameras as training would save it, with the averaged weights under their own names."""
    model = {
        "cameras": ["CAM_FRONT", "CAM_BACK"],
        "image_width_px": 64,
        "image_height_px": 32,
        "working_coarsening": 4,
        "backbone": {"name": "test_efficientnet", "pretrained": False, "out_indices": [2, 3], "channels": 16},
        "depth": {"bins": {"min_m": 1.0, "max_m": 9.0, "step_m": 1.0}, "context_channels": 8},
        "volume": {"memory_channels": 4, "widths": [32, 32], "blocks": [1, 1]},
        "field": {"channels": 8, "hidden": 16, "layers": 1},
    }
    network = OccFlowNet(ModelConfig.from_dict(model))
    content = {
        "state_dict": {f"model.{name}": value for name, value in network.state_dict().items()},
        CONFIG_KEY: {"model": model},
        PROVENANCE_KEY: {"trained_with_camera_mask": False},
    }
    torch.save(content, tmp_path / "last.ckpt")
    out = tmp_path / "eval.json"
    arguments = ["--checkpoint", str(tmp_path / "last.ckpt"), "--dataroot", str(tiny_root.path), "--split", "val"]
    assert main([*arguments, "--out", str(out), "--threads", "1", "--pictures", "0"]) == 0
    report = json.loads(out.read_text())
    assert report["samples"] == 2 and report["settings"]["trained_with_camera_mask"] is False
    assert report["model"]["source"].endswith("last.ckpt")


def test_a_broken_checkpoint_gets_one_sentence(tiny_root, tmp_path, capsys):
    (tmp_path / "last.ckpt").write_bytes(b"PK\x03\x04 cut short")
    arguments = ["--checkpoint", str(tmp_path / "last.ckpt"), "--dataroot", str(tiny_root.path)]
    assert main([*arguments, "--out", str(tmp_path / "eval.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate: ") and "last.ckpt" in error and error.count("\n") == 1
