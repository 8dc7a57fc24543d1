# SPDX-License-Identifier: Apache-2.0
"""What happens around training steps: averaged weights, checkpoints that survive a crash, the progress bar, pictures."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from occflownet_core.errors import TrainingError

LAST, BEST = "last.ckpt", "best.ckpt"
_SMOOTHING = 0.9


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, then moves it there: a crash leaves the old one or the new one, whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write and move.

        Raises:
            TrainingError: the file cannot be written (full disk); the checkpoint that was there before is untouched.
        """
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
            raise TrainingError(
                f"checkpoint {path} cannot be written ({reason}); the one before it is untouched: make room, then "
                "continue with --resume last"
            ) from None
        finally:
            partial.unlink(missing_ok=True)


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``: written every so many steps, and after the validation that ends the run.

    Args:
        out: its folder.
        every_steps: optimiser steps between writings; a crash loses no more.
    """

    def __init__(self, out: Path, every_steps: int) -> None:
        self.path, self.every_steps = out / LAST, every_steps
        self._written: int | None = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step != self._written and (step % self.every_steps == 0 or trainer.should_stop):
            self._written = step
            trainer.save_checkpoint(self.path)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.should_stop:
            trainer.save_checkpoint(self.path)


def best_checkpoint(out: Path, monitor: str) -> ModelCheckpoint:
    """Keeps ``best.ckpt``, the weights of the best validation."""
    return ModelCheckpoint(
        dirpath=out,
        filename=Path(BEST).stem,
        monitor=monitor,
        mode="max",
        save_weights_only=True,
        enable_version_counter=False,
        auto_insert_metric_name=False,
    )


class AveragedWeights(WeightAveraging):
    """Exponential moving average of weights and batch statistics; young averages forget faster, so that the random
    start is soon gone. Validation runs on the average, and a checkpoint's ``state_dict`` is the average.

    Args:
        decay: of the grown-up average; after n updates it is no more than (1 + n) / (10 + n).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        super().__init__(use_buffers=True, multi_avg_fn=self._average)

    def _average(self, averaged: list[torch.Tensor], current: list[torch.Tensor], updates: torch.Tensor | int) -> None:
        updates = int(updates)
        get_ema_multi_avg_fn(min(self.decay, (1 + updates) / (10 + updates)))(averaged, current, updates)


class StepClock(Callback):
    """Measures what a step spends its time on and logs it: seconds per step, share of waiting for data, rays per second.

    Attributes:
        seconds_per_step, data_wait_share, motion_share, rays_per_s: smoothed over some steps; NaN before the first.
    """

    def __init__(self) -> None:
        self.seconds_per_step = self.data_wait_share = self.motion_share = self.rays_per_s = float("nan")
        self._left_s: float | None = None
        self._wait_s = self._began_s = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int):
        self._began_s = time.perf_counter()
        self._wait_s = self._began_s - self._left_s if self._left_s is not None else 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch: Any, batch_idx: int) -> None:
        now_s = time.perf_counter()
        if self._left_s is not None:  # the first step waits for the workers to start, and says nothing
            whole_s = now_s - self._left_s
            self.seconds_per_step = _smoothed(self.seconds_per_step, whole_s)
            self.data_wait_share = _smoothed(self.data_wait_share, self._wait_s / whole_s)
            self.rays_per_s = _smoothed(self.rays_per_s, outputs["rays"] / whole_s)
            self.motion_share = _smoothed(self.motion_share, outputs["motion_s"] / whole_s)
            values = {
                "speed/motion_share": self.motion_share,
                "speed/seconds_per_step": self.seconds_per_step,
                "speed/data_wait_share": self.data_wait_share,
                "speed/rays_per_s": self.rays_per_s,
            }
            pl_module.log_dict(values)
        self._left_s = now_s

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._left_s = None


class ProgressReport(Callback):
    """A progress bar with losses and speed on a terminal; elsewhere, a line now and then.

    Args:
        clock: where the speed comes from.
        total_steps: optimiser steps of the whole run.
        log_steps: steps between lines where there is no terminal.
        console: where to write.
    """

    def __init__(self, clock: StepClock, total_steps: int, log_steps: int, console: Console | None = None) -> None:
        self.clock, self.total_steps, self.log_steps = clock, total_steps, log_steps
        self.console = console or Console()
        self._losses: dict[str, float] = {}
        self._bar: Progress | None = None
        self._validation = ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not (self.console.is_terminal and trainer.is_global_zero):
            return
        columns = ("step", MofNCompleteColumn(), BarColumn(24), TimeElapsedColumn(), "left", TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[report]}"), console=self.console)
        self._bar.start()
        self._task = self._bar.add_task("", total=self.total_steps, completed=trainer.global_step, report="")

    def on_train_batch_end(self, trainer, pl_module, outputs: Mapping[str, Any], batch: Any, batch_idx: int) -> None:
        for name, value in outputs["terms"].items():
            self._losses[name] = _smoothed(self._losses.get(name, float("nan")), float(value))
        if self._bar:
            self._bar.update(self._task, completed=trainer.global_step, report=self.line(trainer))
        elif trainer.is_global_zero and trainer.global_step % self.log_steps == 0:
            self.console.print(f"step {trainer.global_step}/{self.total_steps}  {self.line(trainer)}", soft_wrap=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if trainer.is_global_zero and metrics:
            score = pl_module.config.score
            self._validation = f"  val {score} {100 * metrics.get(f'val/{score}', float('nan')):.2f} %"
            text = "  ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()))
            self.console.print(f"validation at step {trainer.global_step}: {text}", soft_wrap=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def line(self, trainer: pl.Trainer) -> str:
        """Losses and speed in one line."""
        losses = "  ".join(f"{name} {value:.3f}" for name, value in self._losses.items())
        speed = (
            f"{self.clock.rays_per_s / 1e3:.1f}k rays/s  {self.clock.seconds_per_step:.2f} s/step  "
            f"data wait {100 * self.clock.data_wait_share:.0f} %  motion {100 * self.clock.motion_share:.0f} %"
        )
        return f"{losses}  {speed}{self._validation}"

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


class RunLength(Callback):
    """Ends the run after its last step or when its time is up, whichever comes first; a validation follows.

    Args:
        minutes: of training, counted on in a resumed run; None for no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self._before_s = 0.0
        self._began_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, earlier processes of the run included."""
        return self._before_s + (time.monotonic() - self._began_s if self._began_s is not None else 0.0)

    def share(self, trainer: pl.Trainer, step: int) -> float:
        """How much of the run is over at a step, 0 to 1: by steps or by time, whichever is further."""
        by_time = self.elapsed_s / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(step / max(trainer.max_steps, 1), by_time))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began_s = time.monotonic()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch: Any, batch_idx: int) -> None:
        # All processes must stop at the same step, and their clocks differ.
        over = trainer.strategy.broadcast(self.share(trainer, trainer.global_step) >= 1.0)
        trainer.should_stop = trainer.should_stop or over

    def state_dict(self) -> dict[str, float]:
        return {"elapsed_s": self.elapsed_s}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._before_s = state_dict["elapsed_s"]


def _smoothed(before: float, value: float) -> float:
    return value if before != before else _SMOOTHING * before + (1 - _SMOOTHING) * value
