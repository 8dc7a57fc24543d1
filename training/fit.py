# SPDX-License-Identifier: Apache-2.0
"""Command line of training: `python -m training.fit --config training/configs/NAME.yaml [--section.key VALUE ...]`."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from occflownet_core.errors import ConfigError, OccflownetError, TrainingError
from occflownet_core.model import OccFlowNet
from training.callbacks import (
    LAST,
    AtomicCheckpointIO,
    AveragedWeights,
    LastCheckpoint,
    ProgressReport,
    RunLength,
    StepClock,
    best_checkpoint,
)
from training.checkpoint import load_checkpoint, require_same_model
from training.loaders import OccupancyData
from training.module import OccupancyLearner
from training.pictures import Pictures
from training.settings import TrainingConfig, make_parser, parse

DESCRIPTION = """Learn an occupancy network from a data set in the nuScenes format (MiniCity, nuScenes).

  python -m training.fit --config training/configs/minicity_tiny.yaml --data.dataroot data/minicity --trainer.out out/tiny
  python -m training.fit --config training/configs/minicity_tiny.yaml --data.dataroot data/minicity --trainer.out out/tiny --resume last

Every key of the configuration is an option. In trainer.out: last.ckpt and best.ckpt (averaged weights; best by
validation mIoU), config.yaml as it was run, and logs for `tensorboard --logdir`."""


# Backbones come with stages behind the last level that is asked for; plain DDP waits for their gradients forever.
_STRATEGIES = {"ddp": "ddp_find_unused_parameters_true"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = make_parser(DESCRIPTION)
    parser.add_argument("--resume", type=str, help="go on from this checkpoint; 'last' is last.ckpt in trainer.out")
    try:
        config, options = parse(sys.argv[1:] if arguments is None else arguments, parser)
        trainer = fit(config, _resume_path(options.resume, config))
    except OccflownetError as error:
        print(f"fit: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        trainer = None
    if trainer is None or trainer.interrupted:
        print(f"fit: interrupted; go on with --resume last (trainer.out is {config.trainer.out})", file=sys.stderr)
        return 130
    return 0


def fit(
    config: TrainingConfig, resume: Path | None = None, make_data: Callable[..., OccupancyData] = OccupancyData
) -> pl.Trainer:
    """Train as the configuration says.

    Args:
        config: the run.
        resume: checkpoint to go on from.
        make_data: makes the data of ``(config, lift_spec)``.

    Returns:
        The trainer, after its last step.

    Raises:
        ConfigError: the configuration describes no network that can be built, or no machine that is there.
        DatasetError: data is missing or damaged.
        TrainingError: a checkpoint does not fit or cannot be written, or a loss is not finite.
    """
    _hush()
    settings = config.trainer
    # One thread for OpenCV: more would take the cores from the training step, and a loader process that is forked
    # after OpenCV has started threads waits for them forever.
    cv2.setNumThreads(1)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    if resume:
        require_same_model(load_checkpoint(resume), config)
    learner = OccupancyLearner(config, *initial_model(config))
    data = make_data(config, learner.model.lift_spec)
    trainer = make_trainer(config, data)
    if trainer.is_global_zero:
        _prepare_folder(config, resume)
    trainer.fit(learner, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer


def initial_model(config: TrainingConfig) -> tuple[OccFlowNet, dict | None]:
    """The network that training starts from, and the provenance of its weights if they are another run's.

    Raises:
        TrainingError: the initial weights cannot be read, or are another network's.
    """
    if not config.trainer.initial_weights:
        return OccFlowNet(config.model), None
    start = load_checkpoint(config.trainer.initial_weights)
    require_same_model(start, config)
    model = OccFlowNet(config.model.without_download())
    model.load_state_dict(start.weights)
    return model, start.provenance


def make_trainer(config: TrainingConfig, data: OccupancyData) -> pl.Trainer:
    """Lightning's trainer for a run.

    Raises:
        ConfigError: the accelerator, strategy or precision is not there.
    """
    settings, out = config.trainer, Path(config.trainer.out)
    clock = StepClock()
    callbacks: list[Callback] = [
        clock,
        ProgressReport(clock, data.total_steps, settings.log_steps),
        Pictures(data.validation_rig, settings.picture_steps),
        RunLength(settings.max_minutes),
        LastCheckpoint(out, settings.checkpoint_steps),
        best_checkpoint(out, f"val/{config.score}"),
    ]
    if config.optimizer.ema_decay:
        callbacks.append(AveragedWeights(config.optimizer.ema_decay))
    try:
        return pl.Trainer(
            default_root_dir=out,
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.nodes,
            strategy=_STRATEGIES.get(settings.strategy, settings.strategy),
            precision=settings.precision,
            max_epochs=-1,
            max_steps=data.total_steps,
            val_check_interval=settings.val_steps * settings.accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            limit_val_batches=0 if config.supervision.kind == "images" else 1.0,  # its field has learned nothing
            accumulate_grad_batches=settings.accumulate,
            gradient_clip_val=config.optimizer.gradient_clip,
            log_every_n_steps=settings.log_steps,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            logger=TensorBoardLogger(out, name="", version="logs"),
        )
    except (MisconfigurationException, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"trainer: {reason}") from None


def _sentence(error: OccflownetError) -> str:
    """The error's own sentence; one from a loader process comes with that process's traceback before it."""
    return str(error).strip().rpartition(f"{type(error).__module__}.{type(error).__name__}: ")[2]


def _resume_path(resume: str | None, config: TrainingConfig) -> Path | None:
    return Path(config.trainer.out) / LAST if resume == "last" else Path(resume) if resume else None


def _prepare_folder(config: TrainingConfig, resume: Path | None) -> None:
    """Make the folder and note the configuration there; refuse to write over an earlier run."""
    out = Path(config.trainer.out)
    if resume is None and (out / LAST).exists():
        raise TrainingError(
            f"{out / LAST} is there from an earlier run; go on with --resume last, or choose another --trainer.out"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False, width=120))
    except OSError as error:
        raise TrainingError(
            f"folder {out} cannot be written ({error.strerror}); choose another --trainer.out"
        ) from None


def _hush() -> None:
    """Keep Lightning's own chatter out of the progress bar."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",
        r"Checkpoint directory .* exists and is not empty",
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*val_dataloader.* has `shuffle=True`.*",
    ):
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    sys.exit(main())
