# SPDX-License-Identifier: Apache-2.0
"""OccupancyLearner: one training step from images to losses, validation, optimiser, and what a checkpoint carries."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from occflownet_core.encoder.stereo import StereoView
from occflownet_core.errors import TrainingError
from occflownet_core.field import occupancy_probability
from occflownet_core.losses import NonFiniteLossError, require_finite
from occflownet_core.metrics import ThresholdSweep, VoxelScores
from occflownet_core.model import ModelOutput, ObservedImages, OccFlowNet
from training.callbacks import RunLength
from training.checkpoint import CONFIG_KEY, PROVENANCE_KEY
from training.data.batch import OccupancyBatch
from training.objective import Objective
from training.provenance import describe
from training.settings import OptimizerSettings, TrainingConfig

THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
BAD_BATCH = "bad_batch.json"


class OccupancyLearner(pl.LightningModule):
    """A network that learns from windows of two keyframes: the earlier one, without gradient, fills the memory.

    The network's memory is one keyframe's volume before it is fused with its own past, so it depends on that keyframe
    alone: a window of two shows all that longer ones could, and truncating the gradient there costs nothing else. With
    stereo it also depends on the keyframe before, and windows are of three.

    Args:
        config: the run.
        model: the network; None builds the configured one.
        start: provenance of the weights it starts from, if they are another run's.
    """

    def __init__(self, config: TrainingConfig, model: OccFlowNet | None = None, start: dict | None = None) -> None:
        super().__init__()
        self.config, self.start = config, start
        self.model = channels_last(model or OccFlowNet(config.model))
        self.model.set_checkpointing(config.trainer.checkpoint_activations)
        self.objective = Objective(config)
        self.validation_sweep = ThresholdSweep(THRESHOLDS)
        self.scores: dict[str, float] = {}

    def forward(self, window: Sequence[OccupancyBatch], keep_memory: Tensor | None = None) -> ModelOutput:
        """The field at the window's last keyframe.

        Args:
            window: keyframes in order of time; the second last fills the memory of the last, and is itself matched with
                the third last, where there is stereo.
            keep_memory: [B] bool, samples whose memory is used; None: all that have one.
        """
        now = window[-1]
        state, view = self.model.empty_state(len(now)), None
        if len(window) > 1:
            known = now.has_previous if keep_memory is None else now.has_previous & keep_memory
            with torch.no_grad():
                seen = self.observe(window[:-1])
                state = seen.volume * known[:, None, None, None]
                view = None if seen.view is None else forgetting(seen.view, known)
        return self.model(now.images, now.tables, now.previous_from_current, state, view)

    def observe(self, window: Sequence[OccupancyBatch]) -> ObservedImages:
        """The window's last keyframe by itself, but for stereo, which matches it with the one before."""
        now, view = window[-1], None
        if len(window) > 1:
            with torch.no_grad():
                view = self.model.view(window[-2].images, window[-2].tables)
        if view is None:
            return self.model.observe(now.images, now.tables)
        return self.model.observe(now.images, now.tables, now.previous_from_current, forgetting(view, now.has_previous))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Tell the objective how far the run is."""
        self.objective.done = self._run_length.share(self.trainer, self.global_step)

    def training_step(self, window: Sequence[OccupancyBatch], batch_idx: int) -> dict[str, Any]:
        """The loss of one batch.

        Raises:
            TrainingError: it is not finite; the batch's tokens are in ``bad_batch.json`` then.
        """
        generator = self.step_generator(batch_idx)
        keep = torch.rand(len(window[-1]), generator=generator) < self.config.data.memory_probability
        if self.config.supervision.kind == "images":
            terms = self.objective.image_terms(self.observe(window), window[-1], generator)
        else:
            terms = self.objective(self(window, keep.to(self.device)), window[-1], generator)
        try:
            require_finite(terms)
        except NonFiniteLossError as error:
            raise self._bad_batch(window[-1], error) from None
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict({"train/loss": loss.detach(), **{f"train/{n}": t.detach() for n, t in terms.items()}})
        self.log("train/learning_rate", self.optimizers().param_groups[0]["lr"])
        return {
            "loss": loss,
            "terms": {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}},
            "rays": self.objective.rays,
            "motion_s": self.objective.motion_s,
        }

    @property
    def threshold(self) -> float:
        """The occupancy threshold of the best score in the latest validation; the configured one before."""
        return self.scores.get("threshold", self.config.model.occupancy_threshold)

    def step_generator(self, batch_idx: int) -> torch.Generator:
        """Random numbers of one batch, which depend on seed, batch and process alone."""
        seed = np.random.SeedSequence([self.config.trainer.seed, batch_idx, self.global_rank])
        return torch.Generator().manual_seed(int(seed.generate_state(1)[0]))

    def _bad_batch(self, batch: OccupancyBatch, error: NonFiniteLossError) -> TrainingError:
        path = Path(self.config.trainer.out) / BAD_BATCH
        path.parent.mkdir(parents=True, exist_ok=True)
        notes = {"step": self.global_step, "terms": error.terms, "tokens": batch.tokens, "scenes": batch.scenes}
        path.write_text(json.dumps(notes, indent=1))
        return TrainingError(f"step {self.global_step}: {error}; its tokens are in {path}")

    def on_validation_epoch_start(self) -> None:
        """Count from zero."""
        self.validation_sweep = ThresholdSweep(THRESHOLDS)

    def validation_step(self, window: Sequence[OccupancyBatch], batch_idx: int) -> None:
        """Count voxels that a camera sees."""
        batch, grid = window[-1], self.config.model.grid
        density, logits = self(window).field.lattice(grid)
        probability = occupancy_probability(density, grid.voxel_size_m).float()
        self.validation_sweep.add(
            probability.permute(0, 3, 2, 1).cpu().numpy(),
            logits.argmax(dim=1).permute(0, 3, 2, 1).to(torch.uint8).cpu().numpy(),
            batch.labels.cpu().numpy(),
            batch.camera_mask.cpu().numpy(),
        )

    def on_validation_epoch_end(self) -> None:
        """Scores of all processes together, at the threshold with the best mIoU (``TrainingConfig.score``)."""
        counts = torch.from_numpy(self.validation_sweep.confusion_matrices()).to(self.device)
        if self.trainer.world_size > 1:
            counts = self.all_gather(counts).sum(dim=0)
        each = [VoxelScores.of(matrix) for matrix in counts.cpu().numpy()]
        score = self.config.score
        best = max(range(len(each)), key=lambda i: np.nan_to_num(getattr(each[i], score), nan=-1.0))
        scores = each[best]
        self.scores = {
            "miou": scores.miou,
            "geometric_iou": scores.geometric_iou,
            "dynamic_miou": scores.dynamic_miou,
            "static_miou": scores.static_miou,
            "threshold": THRESHOLDS[best],
        }
        # NaN (no such class in the samples) would make a monitored metric incomparable.
        known = {f"val/{name}": np.nan_to_num(value) for name, value in self.scores.items()}
        self.log_dict(known, rank_zero_only=False)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW and its schedule."""
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=self.config.optimizer.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Matrices and convolutions with weight decay; biases and norms without."""
        learned = [p for p in self.model.parameters() if p.requires_grad]
        decay = self.config.optimizer.weight_decay
        return [
            {"params": [p for p in learned if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def _learning_rate_factor(self, step: int) -> float:
        return learning_rate_factor(self.config.optimizer, step, self._run_length.share(self.trainer, step))

    @property
    def _run_length(self) -> RunLength:
        return next(callback for callback in self.trainer.callbacks if isinstance(callback, RunLength))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the configuration, and where the weights come from: plain values, so that no pickle is needed to read."""
        checkpoint[CONFIG_KEY] = self.config.to_dict()
        checkpoint[PROVENANCE_KEY] = describe(
            self.config, self.global_step, self._run_length.elapsed_s, self.scores, self.start
        )


def channels_last(model: OccFlowNet) -> OccFlowNet:
    """The network with its 2D convolutions laid out channels last.

    With few channels they run a tenth faster so on a CPU, and with tensor cores on a GPU. 3D ones have another such
    layout, which is why ``Module.to`` refuses networks that have both.
    """
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    return model


def forgetting(view: StereoView, known: Tensor) -> StereoView:
    """The view without what it holds of samples that are not ``known`` [B]."""
    return view._replace(image_from_ego=view.image_from_ego * known[:, None, None, None])


def learning_rate_factor(settings: OptimizerSettings, step: int, done: float) -> float:
    """Share of the learning rate at a step, ``done`` (0 to 1) of the run being over."""
    warm = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    if settings.schedule == "constant":
        return warm
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return warm * (settings.final_fraction + (1 - settings.final_fraction) * cosine)
