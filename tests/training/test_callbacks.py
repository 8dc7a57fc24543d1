# SPDX-License-Identifier: Apache-2.0
"""Averaged weights, checkpoints under a full disk and an interrupt, the clock of a run."""

import errno
import math
from types import SimpleNamespace

import pytest
import torch

from occflownet_core.errors import TrainingError
from training.callbacks import AtomicCheckpointIO, AveragedWeights, RunLength, StepClock


def test_average_forgets_its_start_quickly_and_then_slowly():
    average = AveragedWeights(decay=0.5)
    value = [torch.tensor([8.0])]
    # Update n keeps min(0.5, (1 + n) / (10 + n)): 0.1 at first; from n = 8 on it is 0.5.
    average._average(value, [torch.tensor([0.0])], torch.tensor(0))
    assert value[0].item() == pytest.approx(0.8)
    average._average(value, [torch.tensor([0.0])], torch.tensor(8))
    assert value[0].item() == pytest.approx(0.4)
    average._average(value, [torch.tensor([1.0])], torch.tensor(1000))
    assert value[0].item() == pytest.approx(0.7)


def test_checkpoint_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 2}
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


class FullDisk:
    """A file that has room for a few bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def write(self, data) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)


def test_full_disk_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(1000)}, path)
    monkeypatch.setattr("training.callbacks.open", lambda p, mode: FullDisk(p.open(mode), 500), raising=False)
    with pytest.raises(TrainingError, match=r"last\.ckpt cannot be written .*; the one before it is untouched"):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(1000)}, path)
    assert torch.load(path, weights_only=True)["weights"].sum() == 1000
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_interrupt_while_writing_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def interrupted(checkpoint, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_run_is_over_by_steps_or_by_time(monkeypatch):
    now_s = 100.0
    monkeypatch.setattr("training.callbacks.time.monotonic", lambda: now_s)
    trainer = SimpleNamespace(max_steps=10)
    run = RunLength(minutes=2.0)
    run.load_state_dict({"elapsed_s": 30.0})
    run.on_train_start(trainer, None)
    assert run.share(trainer, 1) == pytest.approx(0.25)  # 30 of 120 s; 1 of 10 steps
    assert run.share(trainer, 5) == pytest.approx(0.5)
    now_s = 160.0
    assert run.share(trainer, 5) == pytest.approx(0.75)
    assert run.state_dict() == {"elapsed_s": pytest.approx(90.0)}
    now_s = 900.0
    assert run.share(trainer, 5) == 1.0
    assert RunLength(None).share(trainer, 5) == 0.5


def test_clock_tells_waiting_from_working(monkeypatch):
    clock, times = StepClock(), iter([0.0, 1.0, 1.5, 3.5])
    monkeypatch.setattr("training.callbacks.time.perf_counter", lambda: next(times))
    module = SimpleNamespace(log_dict=lambda values: None)
    for _ in range(2):
        clock.on_train_batch_start(None, module, None, 0)
        clock.on_train_batch_end(None, module, {"rays": 500, "motion_s": 0.25}, None, 0)
    # From the end of step 1 (1.0) to the end of step 2 (3.5), 0.5 s of which went by before it began.
    assert clock.seconds_per_step == pytest.approx(2.5)
    assert clock.data_wait_share == pytest.approx(0.2)
    assert clock.motion_share == pytest.approx(0.1)
    assert clock.rays_per_s == pytest.approx(200.0)
    assert not math.isnan(clock.seconds_per_step)
