# SPDX-License-Identifier: Apache-2.0
"""Whole runs: resuming, interrupts, full disks, wrong configurations, and the command line on a MiniCity."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from windows import WallData, Walls, small_config

from occflownet_core.errors import ConfigError, TrainingError
from occflownet_core.model import OccFlowNet
from training import fit as fit_module
from training.callbacks import BEST, LAST
from training.checkpoint import load_checkpoint
from training.data.batch import EpochSampler
from training.fit import fit, initial_model, main
from training.loaders import EndlessBatches, OccupancyData
from training.settings import TrainingConfig, parse, with_bases

CONFIGS = Path(fit_module.__file__).parent / "configs"


def run(out: Path, steps: int, resume: Path | None = None, **trainer) -> dict[str, torch.Tensor]:
    """Train on walls; the raw (not averaged) weights and the averaged ones after the last step."""
    config = small_config(out, trainer={"max_steps": steps, "checkpoint_steps": 2, **trainer})
    fit(config, resume, WallData)
    content = torch.load(out / LAST, weights_only=True)
    averaged = {f"averaged {name}": value for name, value in content["state_dict"].items()}
    return {**content["current_model_state"], **averaged}


def test_a_resumed_run_ends_in_the_same_numbers(tmp_path):
    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "half", 2)
    resumed = run(tmp_path / "half", 4, resume=tmp_path / "half" / LAST)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other = run(tmp_path / "other", 4, seed=1)
    assert any(not torch.equal(whole[name], other[name]) for name in whole)


def test_a_run_resumed_from_a_crash_between_checkpoints_ends_in_the_same_numbers(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", 7)

    class Crashing(Walls):
        def __getitem__(self, item):
            if item[1] == 1 and item[0] == 3:  # somewhere in the second epoch of 4 steps
                raise OSError("the disk is gone")
            return super().__getitem__(item)

    config = small_config(tmp_path / "crashed", trainer={"max_steps": 7, "checkpoint_steps": 2})
    with pytest.raises(OSError, match="the disk is gone"):
        fit(config, None, lambda c, lift: WallData(c, lift, Crashing(lift)))
    resumed = run(tmp_path / "crashed", 7, resume=tmp_path / "crashed" / LAST)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_batches_go_on_where_they_stopped():
    batches = EndlessBatches(EpochSampler(5), 2)
    stream = iter(batches)
    first = [next(stream) for _ in range(6)]
    assert sorted(i for batch in first for i, e in batch if e == 0) == [0, 1, 2, 3, 4]
    assert [e for batch in first for _, e in batch] == [0] * 5 + [1] * 5 + [2] * 2
    batches.first_batch = 4
    later = iter(batches)
    assert [next(later) for _ in range(2)] == first[4:]


TWO_PROCESSES = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from windows import WallData, small_config
from training.fit import fit
settings = {"max_steps": 3, "batch_size": 1, "devices": 2, "strategy": "ddp", "val_steps": 3}
trainer = fit(small_config(Path(sys.argv[2]), trainer=settings), None, WallData)
weights = sum(p.detach().double().abs().sum().item() for p in trainer.lightning_module.parameters())
Path(sys.argv[2], f"rank{trainer.global_rank}").write_text(f"{trainer.world_size} processes, weights {weights!r}")
"""


def test_two_processes_learn_one_model(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    here, root = Path(__file__).parent, CONFIGS.parent.parent
    command = [sys.executable, str(script), str(here), str(tmp_path / "out")]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = ((tmp_path / "out" / f"rank{rank}").read_text() for rank in (0, 1))
    assert first.startswith("2 processes") and first == second  # gradients were averaged: one and the same model
    provenance = load_checkpoint(tmp_path / "out" / LAST).provenance
    assert provenance["steps"] == 3 and provenance["batch_size"] == 2
    assert done.stdout.count("validation at step 3") == 1
    # One process that sees both samples in each step would batch-normalise them together, so numbers differ from it.
    alone = run(tmp_path / "alone", 3, batch_size=1)
    both = torch.load(tmp_path / "out" / LAST, weights_only=True)["current_model_state"]
    assert any(not torch.equal(alone[name], both[name]) for name in both)


def test_what_a_checkpoint_carries(tmp_path):
    config = small_config(tmp_path / "run", trainer={"max_steps": 4, "val_steps": 2})
    fit(config, None, WallData)
    best, last = load_checkpoint(tmp_path / "run" / BEST), load_checkpoint(tmp_path / "run" / LAST)
    assert last.training_config == config
    assert last.provenance["steps"] == 4 and best.provenance["steps"] in (2, 4)
    assert last.provenance["supervision"].startswith("2D labels only") and last.provenance["dataset"] == "made-up"
    assert last.model_config.occupancy_threshold == last.provenance["validation"]["threshold"]
    yaml.safe_dump(last.provenance)  # plain values only
    averaged = torch.load(tmp_path / "run" / LAST, weights_only=True)["state_dict"]
    assert torch.equal(
        last.model().state_dict()["decoder.density_head.0.weight"], averaged["model.decoder.density_head.0.weight"]
    )
    saved = TrainingConfig.from_yaml(tmp_path / "run" / "config.yaml")
    assert saved == config


def test_without_averaging_too(tmp_path):
    config = small_config(tmp_path, optimizer={"ema_decay": 0.0}, trainer={"max_steps": 2})
    fit(config, None, WallData)
    assert not load_checkpoint(tmp_path / LAST).provenance["averaged_weights"]


def test_single_images_are_a_start_for_the_rest(tmp_path):
    """Depth and class of two walls are learned without a field; the next run goes on from there."""
    terms = {"image_semantic_weight": 1.0, "depth_weight": 1.0, "class_weighted": False}
    images = {"losses": terms, "supervision": {"kind": "images"}}
    start = small_config(tmp_path / "images", trainer={"max_steps": 100, "log_steps": 100}, **images)
    trainer = fit(start, None, WallData)
    at_the_end = trainer.callback_metrics
    # Knowing nothing costs log 17 and log 8.
    assert at_the_end["train/image_semantic"] < 0.8 * math.log(17)
    assert at_the_end["train/depth"] < 0.8 * math.log(8)
    begun = load_checkpoint(tmp_path / "images" / LAST)
    assert "single images" in begun.provenance["supervision"]
    weights = str(tmp_path / "images" / LAST)
    following = small_config(tmp_path / "next", trainer={"max_steps": 2, "initial_weights": weights})
    given = initial_model(following)[0].state_dict()
    assert all(torch.equal(given[name], value) for name, value in begun.weights.items())
    fit(following, None, WallData)
    start = load_checkpoint(tmp_path / "next" / LAST).provenance["initial_weights"]
    assert start["steps"] == 100 and start["initial_weights"] == "none" and "single images" in start["supervision"]
    wider = dataclasses.replace(following, model=dataclasses.replace(following.model, lift_slots=1))
    with pytest.raises(TrainingError, match=r"model\.lift_slots is 2, here it is 1"):
        initial_model(wider)


def test_an_earlier_run_is_not_written_over(tmp_path):
    run(tmp_path, 2)
    with pytest.raises(TrainingError, match="is there from an earlier run; go on with --resume last"):
        run(tmp_path, 2)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    run(tmp_path, 2)
    config = small_config(tmp_path)
    model = dataclasses.replace(config.model, lift_slots=1)
    with pytest.raises(TrainingError, match=r"its model\.lift_slots is 2, here it is 1"):
        fit(dataclasses.replace(config, model=model), tmp_path / LAST, WallData)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "there is no checkpoint"), (b"PK nonsense", "cannot be read"), ({"epoch": 1}, "is no checkpoint of this")],
)
def test_files_that_are_no_checkpoints(tmp_path, content, sentence):
    path = tmp_path / "x.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    with pytest.raises(TrainingError, match=sentence):
        load_checkpoint(path)


def test_a_checkpoint_cut_short(tmp_path):
    run(tmp_path, 2)
    path = tmp_path / LAST
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(TrainingError, match=r"cannot be read .* it was cut short"):
        load_checkpoint(path)


def test_time_ends_a_run(tmp_path):
    config = small_config(tmp_path, trainer={"max_steps": 100_000, "max_minutes": 0.02, "log_steps": 1000})
    trainer = fit(config, None, WallData)
    assert 0 < trainer.global_step < 100_000
    assert load_checkpoint(tmp_path / LAST).provenance["steps"] == trainer.global_step
    assert "threshold" in load_checkpoint(tmp_path / LAST).provenance["validation"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_understood(path):
    config = TrainingConfig.from_yaml(path)
    assert TrainingConfig.from_dict(config.to_dict()) == dataclasses.replace(config)


def test_each_variant_changes_what_its_name_says():
    variants = {name: TrainingConfig.from_yaml(CONFIGS / f"minicity_tiny{name}.yaml") for name in
                ("", "_3d", "_2d3d", "_filter", "_static", "_single")}  # fmt: skip
    kinds = {name: (c.supervision.kind, c.motion.kind, c.data.horizon) for name, c in variants.items()}
    assert kinds == {
        "": ("2d", "box_flow", 3),
        "_3d": ("3d", "box_flow", 3),
        "_2d3d": ("2d3d", "box_flow", 3),
        "_filter": ("2d", "filter", 3),
        "_static": ("2d", "static", 3),
        "_single": ("2d", "static", 0),
    }
    assert len({repr((c.model, c.optimizer, c.trainer)) for c in variants.values()}) == 1


def test_bases_come_first_and_later_keys_win(tmp_path):
    (tmp_path / "a.yaml").write_text("trainer: {batch_size: 3, seed: 4}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\ntrainer: {seed: 5}\n")
    names = [argument.rpartition("/")[2] for argument in with_bases(["--config", str(tmp_path / "b.yaml")])]
    assert names == ["a.yaml", "b.yaml"]
    config = TrainingConfig.from_yaml(tmp_path / "b.yaml")
    assert (config.trainer.batch_size, config.trainer.seed) == (3, 5)


@pytest.mark.parametrize(
    ("content", "arguments", "sentence"),
    [
        ("trainer: {max_step: 1}", [], "'max_step'"),
        ("trainers: {seed: 1}", [], "trainers"),
        ("motion: {kind: fast}", [], "motion.kind"),
        ("base: c.yaml", [], "is based on itself"),
        ("- a list", [], "holds no table of keys"),
        ("a: [", [], "cannot be read"),
        ("trainer: {batch_size: 0}", [], "trainer.batch_size is 0; give a value from 1"),
        ("{}", ["--optimizer.learning_rate", "fast"], "optimizer.learning_rate"),
        ("{}", ["--optimiser.learning_rate", "1"], "--optimiser.learning_rate"),
        ("{}", [], "data.dataroot is not given"),
        ("{}", ["--data.dataroot", "/nowhere"], "no folder with tables"),
        ("{}", ["--data.dataroot", "/nowhere", "--data.version", "v1.0-mini"], "there are no tables at"),
        ("{}", ["--resume", "nowhere.ckpt"], "there is no checkpoint nowhere.ckpt"),
        ("model: {backbone: {name: resnet9000, pretrained: false}}", [], "backbone 'resnet9000'"),
    ],
)
def test_user_errors_are_one_sentence(tmp_path, capsys, content, arguments, sentence):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    (tmp_path / "offline.yaml").write_text("model: {backbone: {pretrained: false}}")
    assert (
        main(
            [
                "--config",
                str(tmp_path / "offline.yaml"),
                "--config",
                str(path),
                "--trainer.out",
                str(tmp_path / "out"),
                *arguments,
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("fit: ") and len(error.splitlines()) == 1
    assert "Traceback" not in error


SMALL = """
model: {working_coarsening: 8, image_width_px: 64, image_height_px: 32, volume: {widths: [16], blocks: [1]},
        backbone: {name: test_efficientnet, pretrained: false, out_indices: [2, 3], channels: 16}}
data: {workers: 0, version: v1.0-tiny}
supervision: {rays_per_step: 200}
trainer: {max_steps: 2, batch_size: 1, val_steps: 1, val_samples: 1, picture_steps: 1, checkpoint_steps: 1, threads: 1,
          accelerator: cpu}
"""


@pytest.mark.parametrize("name", ["nuscenes_tiny", "nuscenes_tiny_2d3d"])
def test_command_line_on_a_data_root(tiny_root, tmp_path, capsys, name):
    (tmp_path / "small.yaml").write_text(SMALL)
    configs = ["--config", str(CONFIGS / f"{name}.yaml"), "--config", str(tmp_path / "small.yaml")]
    options = [*configs, "--data.dataroot", str(tiny_root.path), "--trainer.out", str(tmp_path / "out")]
    assert main(options) == 0
    assert "val/miou" in capsys.readouterr().out
    assert main(options) == 2 and "go on with --resume last" in capsys.readouterr().err
    assert main([*options, "--resume", "last", "--trainer.max_steps", "3"]) == 0
    assert load_checkpoint(tmp_path / "out" / LAST).provenance["steps"] == 3
    events = [path for path in (tmp_path / "out" / "logs").iterdir() if path.name.startswith("events")]
    tags = {tag for path in events for tag in picture_tags(path)}
    assert any(tag.startswith("cameras") for tag in tags) and any(tag.startswith("voxels") for tag in tags)


def picture_tags(path: Path) -> list[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path))
    events.Reload()
    return events.Tags()["images"]


def test_several_roots_are_one_stream(tiny_root, tmp_path):
    config = TrainingConfig.from_yaml(CONFIGS / "nuscenes_tiny.yaml")
    data = dataclasses.replace(config.data, dataroot=[str(tiny_root.path)] * 2, version="v1.0-tiny")
    config = dataclasses.replace(config, data=data)
    both = OccupancyData(config, OccFlowNet(config.model).lift_spec).train
    assert len(both) == 8  # 5 keyframes in the training scene: 4 windows of two, twice
    first, second = both[(3, 5)][-1], both[(7, 5)][-1]
    assert first.token == second.token == "tiny-0001-4"


def test_labels_may_come_from_images_that_any_network_wrote(own_tiny_root, tmp_path, capsys):
    """Every camera sees terrain 10 m away, everywhere: nothing else can be among the rays, of any keyframe."""
    images = sorted((own_tiny_root.path / "samples").glob("CAM_*/*.jpg"))
    for image in images:
        folder = own_tiny_root.path / "pseudo" / image.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{image.stem}_depth.png"), np.full((9, 16), 2560, np.uint16))
        cv2.imwrite(str(folder / f"{image.stem}_label.png"), np.full((9, 16), 14, np.uint8))
    (tmp_path / "small.yaml").write_text(SMALL)
    options = ["--config", str(CONFIGS / "nuscenes_tiny.yaml"), "--config", str(tmp_path / "small.yaml")]
    options += ["--data.dataroot", str(own_tiny_root.path), "--data.rays", "pseudo", "--data.pseudo.stride", "1"]
    config, _ = parse(options)
    sample = OccupancyData(config, OccFlowNet(config.model).lift_spec).train[0, 0][-1]
    hits = sample.rays[sample.rays.returned]  # what ends beyond the grid is a ray without return
    assert hits.label.unique().tolist() == [14] and len(hits.time_index.unique()) > 1
    assert (sample.depth_label < 18).any() and set(sample.depth_label[sample.depth_m > 0]) == {14}
    assert main([*options, "--trainer.out", str(tmp_path / "out")]) == 0
    assert "pseudo-label images" in load_checkpoint(tmp_path / "out" / LAST).provenance["supervision"]
    (own_tiny_root.path / "pseudo" / "CAM_FRONT").rename(tmp_path / "gone")
    capsys.readouterr()
    assert main([*options, "--trainer.out", str(tmp_path / "again")]) == 2
    assert "pseudo-depth image" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_missing_labels_name_file_and_split(own_tiny_root, tmp_path, capsys, workers):
    (tmp_path / "small.yaml").write_text(SMALL)
    configs = ["--config", str(CONFIGS / "nuscenes_tiny_3d.yaml"), "--config", str(tmp_path / "small.yaml")]
    for labels in own_tiny_root.path.glob("gts/*/*/labels.npz"):
        labels.unlink()
    options = ["--data.dataroot", str(own_tiny_root.path), "--trainer.out", str(tmp_path / "out")]
    assert main([*configs, *options, "--data.workers", workers]) == 2
    error = capsys.readouterr().err
    assert "labels.npz are missing (split 'train')" in error and len(error.splitlines()) == 1


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    text = capsys.readouterr().out
    assert exit_info.value.code == 0
    for phrase in (
        "--resume last",
        "--trainer.max_minutes",
        "tensorboard --logdir",
        "moves what is inside" if False else "box_flow",
    ):
        assert phrase in text


def test_wrong_machine_is_one_sentence(tmp_path):
    config = small_config(tmp_path, trainer={"accelerator": "abacus"})
    with pytest.raises(ConfigError, match=r"trainer: .*abacus"):
        fit(config, None, WallData)
