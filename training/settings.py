# SPDX-License-Identifier: Apache-2.0
"""The typed configuration of a training run, read from YAML files and command-line overrides; unknown keys are refused."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jsonargparse
import yaml

from occflownet_core.errors import ConfigError, OccflownetError
from occflownet_core.losses import LossConfig
from occflownet_core.model import ModelConfig
from occflownet_core.photometric import PhotometricConfig
from occflownet_core.renderer import RenderConfig
from training.data.augment import Augmentation

CONFIG_FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class PseudoLabelSettings:
    """Where depth and class images of any network lie; see ``PseudoLabelRays`` for what they hold.

    Attributes:
        depth, label: path templates inside the data root, with ``{scene}``, ``{token}``, ``{channel}``, ``{stem}``.
        depth_unit_m: depth of one step of a PNG.
        stride: take every n-th row and column.
    """

    depth: str = "pseudo/{channel}/{stem}_depth.png"
    label: str = "pseudo/{channel}/{stem}_label.png"
    depth_unit_m: float = 1 / 256
    stride: int = 4


@dataclass(frozen=True)
class DataSettings:
    """Which samples are learned from, and what is read of each.

    Attributes:
        dataroot: folder of a data set in the nuScenes format, or a list of such folders.
        version: its folder of tables; empty takes the only one there is.
        train_split, val_split: splits to learn from and to validate on.
        val_dataroot: another data set to validate on; empty is the (first) one above.
        labels_folder: folder in each root to learn from that has its voxel labels, in Occ3D's layout (``gts``: Occ3D's
            own; another one that ``training.fit_scene`` wrote). Validation always takes ``gts``.
        rays: source of the labelled rays: LiDAR with ``lidarseg`` or ``panoptic`` labels, or ``pseudo`` label images.
        pseudo: where those images are.
        horizon: rays come from this many keyframes before and after the current one (temporal rendering).
        no_return_rays: whether directions without an echo are rays too: free to the grid's edge. (Sky in pseudo-label
            images always is.)
        beyond_is_free: whether returns outside the grid are such rays too, rather than being dropped.
        memory_probability: how often a training sample comes with its previous keyframe as memory.
        augment: whether to augment training samples at all.
        augmentation: how strongly.
        workers: processes that load data.
    """

    dataroot: str | list[str] = ""
    version: str = ""
    train_split: str = "train"
    val_split: str = "val"
    val_dataroot: str = ""
    labels_folder: str = "gts"
    rays: Literal["lidarseg", "panoptic", "pseudo"] = "lidarseg"
    pseudo: PseudoLabelSettings = field(default_factory=PseudoLabelSettings)
    horizon: int = 3
    no_return_rays: bool = False
    beyond_is_free: bool = False
    memory_probability: float = 0.9
    augment: bool = True
    augmentation: Augmentation = field(default_factory=Augmentation)
    workers: int = 1


@dataclass(frozen=True)
class MotionSettings:
    """How rays of neighbour keyframes meet what moved since (METHOD: the dynamic filter and occupancy flow).

    Attributes:
        kind: ``static`` takes the world as standing still; ``filter`` leaves out what is of a dynamic class;
            ``box_flow`` moves what is inside an annotated box with it; ``learned`` moves everything with the velocity
            that the field predicts (``model.field.velocity``), which learns from nothing but neighbour keyframes.
        box_scale: boxes are this much larger than annotated.
        require_class: move only content predicted as the box's own class.
    """

    kind: Literal["static", "filter", "box_flow", "learned"] = "box_flow"
    box_scale: float = 1.15
    require_class: bool = False


@dataclass(frozen=True)
class SupervisionSettings:
    """What the labels are.

    Attributes:
        kind: ``2d`` renders rays; ``3d`` compares with ground-truth voxels; ``2d3d`` does both; ``images`` teaches the
            image encoder alone, depth and class per pixel: a cheap start for the others (``trainer.initial_weights``);
            ``photometric`` has no labels and no LiDAR at all, only what ``photometric`` asks of images (which the
            first three may have beside theirs).
        rays_per_step: at most so many rays are drawn per process and batch, of all samples together.
        current_share: share of them that come from the current keyframe, as far as it has so many; null draws from all
            keyframes alike.
        render_coarsening: how many label cells make the edge of a cell that rays cross.
    """

    kind: Literal["2d", "3d", "2d3d", "images", "photometric"] = "2d"
    rays_per_step: int = 32768
    current_share: float | None = None
    render_coarsening: int = 1

    @property
    def renders(self) -> bool:
        """Whether rays of several keyframes are labels."""
        return self.kind in ("2d", "2d3d")

    @property
    def reads_voxels(self) -> bool:
        """Whether ground-truth voxels are labels."""
        return self.kind in ("3d", "2d3d")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its schedule.

    Attributes:
        learning_rate: after warm-up.
        weight_decay: on matrices and convolutions; biases and norms have none.
        warmup_steps: steps in which the learning rate rises from 0.
        schedule: what follows: ``constant``, or ``cosine`` down to ``final_fraction`` of the learning rate.
        final_fraction: where the cosine ends.
        gradient_clip: largest norm of the gradient.
        ema_decay: decay of the averaged weights, which are validated and exported; 0 for none.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 1e-2
    warmup_steps: int = 200
    schedule: Literal["constant", "cosine"] = "constant"
    final_fraction: float = 0.01
    gradient_clip: float = 5.0
    ema_decay: float = 0.999


@dataclass(frozen=True)
class TrainerSettings:
    """The run.

    Attributes:
        out: folder of checkpoints and logs.
        initial_weights: checkpoint of another run of the same network whose weights this one starts from; empty for none.
        max_epochs: passes over the training samples.
        max_steps: optimiser steps; set, it takes the place of ``max_epochs``.
        max_minutes: stop after so much time, whatever comes first. The cosine runs over this time where it is set.
        batch_size: samples per process and step.
        accumulate: batches per optimiser step.
        accelerator, devices, nodes, strategy, precision: Lightning's own; e.g. ``gpu``, 8, 2, ``ddp``, ``16-mixed``.
        seed: of weights, order, augmentation and drawn rays.
        threads: CPU threads per process; 0 leaves torch's own choice.
        checkpoint_activations: compute activations again for backward instead of keeping them: a third more time, a
            fraction of the memory.
        checkpoint_steps: steps between checkpoints; a crash loses no more.
        val_steps: steps between validations.
        val_samples: samples of the validation split that are used; 0 for all.
        log_steps: steps between entries in TensorBoard.
        picture_steps: steps between pictures in TensorBoard; 0 for none.
    """

    out: str = "out/training"
    initial_weights: str = ""
    max_epochs: int = 12
    max_steps: int | None = None
    max_minutes: float | None = None
    batch_size: int = 1
    accumulate: int = 1
    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    seed: int = 0
    threads: int = 0
    checkpoint_activations: bool = False
    checkpoint_steps: int = 500
    val_steps: int = 500
    val_samples: int = 32
    log_steps: int = 10
    picture_steps: int = 500


@dataclass(frozen=True)
class TrainingConfig:
    """A training run.

    Attributes:
        base: a configuration file, relative to this one, that this one changes.
        model: the network.
        data: samples and rays.
        motion: moving things in neighbour keyframes.
        rendering: how rays are rendered.
        supervision: which labels, how many.
        losses: terms and weights.
        photometric: what the field must explain of images themselves.
        optimizer: AdamW and its schedule.
        trainer: length, machine, checkpoints, seeds.
    """

    base: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataSettings = field(default_factory=DataSettings)
    motion: MotionSettings = field(default_factory=MotionSettings)
    rendering: RenderConfig = field(default_factory=RenderConfig)
    supervision: SupervisionSettings = field(default_factory=SupervisionSettings)
    losses: LossConfig = field(default_factory=LossConfig)
    photometric: PhotometricConfig = field(default_factory=PhotometricConfig)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("data.memory_probability", self.data.memory_probability, 0, 1),
            ("data.horizon", self.data.horizon, 0, 10),
            ("supervision.render_coarsening", self.supervision.render_coarsening, 1, 16),
            ("supervision.rays_per_step", self.supervision.rays_per_step, 1, 10**7),
            ("supervision.current_share", self.supervision.current_share or 0, 0, 1),
            ("optimizer.learning_rate", self.optimizer.learning_rate, 0, 1),
            ("optimizer.ema_decay", self.optimizer.ema_decay, 0, 0.999999),
            ("trainer.batch_size", self.trainer.batch_size, 1, 4096),
            ("trainer.accumulate", self.trainer.accumulate, 1, 4096),
            ("trainer.max_epochs", self.trainer.max_epochs, 1, 10**6),
            ("trainer.checkpoint_steps", self.trainer.checkpoint_steps, 1, 10**9),
            ("trainer.val_steps", self.trainer.val_steps, 1, 10**9),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value}; give a value from {low} to {high}")
        if self.supervision.renders:
            self.losses.check_method(self.rendering.method)
        self._check_photometric()
        if self.learns_velocity and not self.model.field.velocity:
            raise ConfigError("learned flow needs a field that predicts it; set model.field.velocity: true")

    def _check_photometric(self) -> None:
        alone = self.supervision.kind == "photometric"
        if alone and not self.photometric.asks_field:
            raise ConfigError(
                "supervision.kind is 'photometric' and nothing is asked of images; set photometric.matching_weight: 1"
            )
        if alone and self.reads_pixel_labels:
            raise ConfigError(
                f"supervision.kind is 'photometric', which has no LiDAR, and losses.depth_weight is {self.losses.depth_weight:g}, "
                f"losses.image_semantic_weight {self.losses.image_semantic_weight:g}; set both to 0"
            )
        if self.supervision.kind == "images" and not (self.reads_pixel_labels or self.photometric.is_used):
            raise ConfigError(
                "supervision.kind is 'images' and nothing is asked of them; set losses.depth_weight or photometric.depth_weight"
            )
        if self.photometric.asks_field and self.supervision.kind == "images":
            raise ConfigError(
                "supervision.kind is 'images', which makes no field; of photometric's weights leave depth_weight alone above 0"
            )
        if self.photometric.asks_field and not self.model.field.color:
            raise ConfigError("photometric terms need a field that predicts colour; set model.field.color: true")

    @property
    def score(self) -> Literal["miou", "geometric_iou"]:
        """What the best weights and threshold are chosen by: where no label says of which class things are, by shape."""
        kind = self.supervision.kind
        knows_no_class = kind == "photometric" or (kind == "3d" and not self.losses.voxel_semantic_weight)
        return "geometric_iou" if knows_no_class else "miou"

    @property
    def reads_pixel_labels(self) -> bool:
        """Whether LiDAR returns in the images are compared with what the image encoder says."""
        return self.losses.depth_weight > 0 or self.losses.image_semantic_weight > 0

    @property
    def needs_boxes(self) -> bool:
        """Whether annotated boxes say what moves."""
        moves = self.motion.kind == "box_flow" and (self.supervision.renders or self.photometric.is_used)
        return moves or (self.supervision.renders and self.losses.box_velocity_weight > 0)

    @property
    def window(self) -> int:
        """Keyframes that a step sees: the present one, one whose volume is the memory, one that stereo matches that with.

        Of single images only stereo's partner is wanted.
        """
        alone = self.supervision.kind == "images"
        return (1 if alone else 2) + (self.model.depth.stereo is not None)

    @property
    def learns_velocity(self) -> bool:
        """Whether the field's velocity has anything to learn from."""
        return self.supervision.renders and (self.motion.kind == "learned" or self.losses.box_velocity_weight > 0)

    def to_dict(self) -> dict:
        """Plain values for YAML; ``from_dict`` reads them back."""
        return {**_plain(dataclasses.asdict(self)), "model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, values: dict) -> TrainingConfig:
        """A configuration of plain values.

        Raises:
            ConfigError: a key is unknown, or a value has a wrong type or is out of range.
        """
        parser = make_parser()
        return _checked(lambda: parser.parse_object(values), parser)[0]

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainingConfig:
        """A configuration file upon its bases. Raises as ``from_dict``, and if a file cannot be read."""
        return parse(["--config", str(path)])[0]


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leaves the description's line breaks alone."""


def make_parser(description: str = "") -> jsonargparse.ArgumentParser:
    """Options for every key of the configuration, and ``--config``, which may be repeated: later files win."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m training.fit",
        usage="%(prog)s --config FILE [--config FILE ...] [--SECTION.KEY VALUE ...] [--resume FILE]",
        description=description,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file, e.g. training/configs/minicity_tiny.yaml")
    parser.add_class_arguments(TrainingConfig)
    return parser


def parse(
    arguments: Sequence[str], parser: jsonargparse.ArgumentParser | None = None
) -> tuple[TrainingConfig, jsonargparse.Namespace]:
    """The configuration that command-line arguments ask for, and all parsed options.

    Raises:
        ConfigError: a file cannot be read, a key is unknown, or a value has a wrong type or is out of range.
    """
    parser = parser or make_parser()
    expanded = with_bases(arguments)
    return _checked(lambda: parser.parse_args(expanded), parser)


def with_bases(arguments: Sequence[str]) -> list[str]:
    """The arguments with every ``--config FILE`` preceded by the files that it is based on, the deepest first."""
    result, pending = [], list(arguments)
    while pending:
        argument = pending.pop(0)
        if argument == "--config" and pending:
            argument = f"--config={pending.pop(0)}"
        if argument.startswith("--config="):
            result += [f"--config={path}" for path in _chain(Path(argument.partition("=")[2]), ())]
        else:
            result.append(argument)
    return result


def _chain(path: Path, above: tuple[Path, ...]) -> list[Path]:
    if path.resolve() in above:
        raise ConfigError(f"configuration {path} is based on itself; take the 'base:' out of one of its bases")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"configuration {path} cannot be read ({str(error).splitlines()[0]}); see training/configs for examples"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"configuration {path} holds no table of keys; see training/configs for examples")
    base = content.get("base")
    return [*(_chain(path.parent / str(base), (*above, path.resolve())) if base else []), path]


def _checked(read, parser: jsonargparse.ArgumentParser) -> tuple[TrainingConfig, jsonargparse.Namespace]:
    names = {f.name for f in dataclasses.fields(TrainingConfig)}
    try:
        options = parser.instantiate(read())
        return TrainingConfig(**{name: value for name, value in vars(options).items() if name in names}), options
    except (jsonargparse.ArgumentError, OccflownetError, TypeError, ValueError) as error:
        raise ConfigError(f"configuration: {' '.join(str(error).split())}") from None


def _plain(value: object) -> object:
    """The same with lists for tuples, as YAML has them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
