# SPDX-License-Identifier: Apache-2.0
"""Weights of another project as a start for training: a state dict of another layout, through a table of names.

python -m training.import_checkpoint --checkpoint bevdet-r50.pth --table bevdet_resnet \\
    --config training/configs/nuscenes_r50_256x704.yaml --out out/start.ckpt
python -m training.fit --config training/configs/nuscenes_r50_256x704.yaml --trainer.initial_weights out/start.ckpt ...
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor

from occflownet_core.errors import ConfigError, OccflownetError, TrainingError
from occflownet_core.model import OccFlowNet
from training.checkpoint import CONFIG_KEY, MODEL_PREFIX, PROVENANCE_KEY
from training.settings import TrainingConfig

TABLE_FOLDER = Path(__file__).parent / "import_tables"
_SHOWN = 8


def slices_from_unfold(tensor: Tensor) -> Tensor:
    """Patch merging of mmdetection, which unfolds, as that of Swin's authors, which slices: input channels reordered.

    ``torch.nn.Unfold`` gives channel after channel, each with its four pixels row by row; the slices are four pixels
    column by column, each with all its channels (arXiv 2103.14030, ``PatchMerging``).

    Args:
        tensor: [..., 4 C], a norm's or the columns of the reduction.
    """
    by_channel = tensor.unflatten(-1, (-1, 4)).transpose(-1, -2)  # [..., 4, C], pixels row by row
    return by_channel[..., [0, 2, 1, 3], :].flatten(-2)


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {"slices_from_unfold": slices_from_unfold}
"""What a rule may do to a tensor besides naming it."""


@dataclass(frozen=True)
class Rule:
    """Keys that match ``pattern`` become ``target`` (groups as ``\\\\1``), their tensors pass through ``transform``."""

    pattern: re.Pattern[str]
    target: str
    transform: str = ""


@dataclass(frozen=True)
class RenameTable:
    """How another layout's keys become ours.

    Attributes:
        description: for people.
        rules: the first that matches a key counts.
        ignored: keys that have no place here, on purpose.
    """

    description: str
    rules: tuple[Rule, ...]
    ignored: tuple[re.Pattern[str], ...] = ()

    @classmethod
    def load(cls, name: str | Path) -> RenameTable:
        """A table that is shipped, by its name, or any YAML file.

        Raises:
            ConfigError: there is none, or it is malformed.
        """
        shipped = TABLE_FOLDER / f"{name}.yaml"
        path = shipped if shipped.is_file() else Path(name)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"there is no table {name} ({getattr(error, 'strerror', error)}); those shipped are {', '.join(shipped_tables())}"
            ) from None
        except yaml.YAMLError as error:
            raise ConfigError(f"table {path} is no YAML ({str(error).splitlines()[0]})") from None
        try:
            included = [cls.load(other) for other in content.get("include", [])]
            rules = [_rule(entry) for entry in content["rename"]]
            ignored = [re.compile(pattern) for pattern in content.get("ignore", [])]
        except (AttributeError, KeyError, TypeError, re.error) as error:
            raise ConfigError(
                f"table {path} is malformed ({error}); it needs 'rename', a list of {{from, to}}, and maybe 'ignore'"
            ) from None
        return cls(
            str(content.get("description", path.stem)),
            tuple(rule for table in included for rule in table.rules) + tuple(rules),
            tuple(pattern for table in included for pattern in table.ignored) + tuple(ignored),
        )

    def target(self, key: str) -> tuple[str, str] | None:
        """The key's name here and its transform, or None where no rule matches."""
        for rule in self.rules:
            if found := rule.pattern.search(key):
                return key[: found.start()] + found.expand(rule.target) + key[found.end() :], rule.transform
        return None

    def ignores(self, key: str) -> bool:
        """Whether the key is known to have no place here."""
        return any(pattern.search(key) for pattern in self.ignored)


@dataclass
class ImportReport:
    """What became of every key.

    Attributes:
        matched: ours, by theirs.
        missing: ours that nothing was found for; they stay as they were made.
        unexpected: theirs that no rule names, or that are named after nothing here.
        mismatched: ours, with their shape and ours.
        ignored: theirs that the table ignores.
    """

    matched: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Keys of each kind."""
        return {name: len(value) for name, value in vars(self).items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or a PyTorch checkpoint, which may keep them under ``state_dict`` or ``model``.

    Nothing of a pickle is run: PyTorch reads it with ``weights_only``, and what is neither tensor nor plain value is refused.

    Raises:
        TrainingError: the file is missing, damaged, holds other objects, or holds no tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TrainingError(f"there is no checkpoint {path}") from None
    except pickle.UnpicklingError as error:
        what = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        raise TrainingError(
            f"checkpoint {path} pickles more than tensors ({what.group(1) if what else 'unknown objects'}), which could run "
            "any program; where you trust it, load it there and save its state dict alone as .safetensors"
        ) from None
    except Exception as error:  # a damaged file makes its readers raise nearly anything
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(
            f"checkpoint {path} cannot be read ({first}); it was cut short or is something else"
        ) from None
    for name in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    tensors = content if isinstance(content, Mapping) else {}
    tensors = {str(key).removeprefix("module."): value for key, value in tensors.items() if isinstance(value, Tensor)}
    if not tensors:
        raise TrainingError(
            f"checkpoint {path} holds no tensors; give a state dict, or a file with one in 'state_dict'"
        )
    return tensors


def import_weights(model: OccFlowNet, tensors: Mapping[str, Tensor], table: RenameTable) -> ImportReport:
    """Put tensors of another layout into a network.

    Args:
        model: changed in place; what nothing is found for stays.
        tensors: by their own names.
        table: how they are named here.

    Raises:
        TrainingError: two of them are named alike and fit alike, or a transform cannot be applied.
    """
    ours, report = model.state_dict(), ImportReport()
    found: dict[str, tuple[str, Tensor]] = {}
    for key, tensor in tensors.items():
        named = table.target(key)
        if named is None or named[0] not in ours:
            (report.ignored if table.ignores(key) else report.unexpected).append(key)
            continue
        target, transform = named
        if transform:
            tensor = _transformed(key, tensor, transform)
        if tensor.shape != ours[target].shape:
            report.mismatched[target] = (tuple(tensor.shape), tuple(ours[target].shape))
        elif target in found:
            raise TrainingError(
                f"{found[target][0]} and {key} both become {target}; let the table rename or ignore one of them otherwise"
            )
        else:
            found[target] = (key, tensor)
    # What was wrong in one place may have been right in another.
    report.mismatched = {target: shapes for target, shapes in report.mismatched.items() if target not in found}
    report.matched = {key: target for target, (key, _) in found.items()}
    report.missing = [key for key in ours if key not in found and key not in report.mismatched]
    model.load_state_dict(
        {target: tensor.to(ours[target].dtype) for target, (_, tensor) in found.items()}, strict=False
    )
    return report


def shipped_tables() -> list[str]:
    """Names of the tables that come with this program."""
    return sorted(path.stem for path in TABLE_FOLDER.glob("*.yaml"))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        report = _run(options)
    except OccflownetError as error:
        print(f"import_checkpoint: {error}", file=sys.stderr)
        return 2
    _print(report, console, None if options.all else _SHOWN)
    console.print(f"{options.out}: start training with --trainer.initial_weights {options.out}", soft_wrap=True)
    return 0


def _run(options: argparse.Namespace) -> ImportReport:
    table = RenameTable.load(options.table)
    config = TrainingConfig.from_yaml(options.config)
    tensors = read_tensors(options.checkpoint)
    torch.manual_seed(options.seed)
    model = OccFlowNet(config.model.without_download())
    report = import_weights(model, tensors, table)
    if not report.matched:
        raise TrainingError(
            f"none of the {len(tensors)} keys of {options.checkpoint} (the first is {next(iter(tensors))}) fits with table "
            f"{options.table}; choose another of {', '.join(shipped_tables())}, or write one"
        )
    if options.strict and (report.missing or report.mismatched or report.unexpected):
        counts = report.counts()
        raise TrainingError(
            f"with --strict every key must fit: {counts['missing']} are missing, {counts['unexpected']} unexpected, "
            f"{counts['mismatched']} of another shape; leave --strict out to see which"
        )
    _save(options, config, model, report, table)
    return report


def _save(
    options: argparse.Namespace, config: TrainingConfig, model: OccFlowNet, report: ImportReport, table: RenameTable
) -> None:
    provenance = {
        "imported_from": options.checkpoint.name,
        "sha256": hashlib.sha256(options.checkpoint.read_bytes()).hexdigest(),
        "table": f"{Path(options.table).stem}: {table.description}",
        "keys": report.counts(),
        "supervision": f"imported weights ({len(report.matched)} of {len(model.state_dict())} tensors); not trained here",
    }
    content = {
        "state_dict": {MODEL_PREFIX + name: value for name, value in model.state_dict().items()},
        CONFIG_KEY: config.to_dict(),
        PROVENANCE_KEY: provenance,
    }
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, options.out)
    except (OSError, RuntimeError) as error:
        raise TrainingError(f"--out {options.out} cannot be written ({error}); choose another file") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.import_checkpoint",
        description="Turn weights of another project into a checkpoint that training starts from. What the table does not "
        "name, or does not fit, is reported and stays as it was made.",
        epilog=f"Tables: {', '.join(shipped_tables())}, or a YAML file of your own: 'rename', a list of {{from: REGEX, to: NAME}} "
        "of which the first that matches counts, and 'ignore', a list of REGEX. Example: python -m training.import_checkpoint "
        "--checkpoint resnet50.safetensors --table timm_resnet --config training/configs/nuscenes_r50_256x704.yaml "
        "--out out/start.ckpt",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE", help=".safetensors, .pth, .pt or .ckpt"
    )
    parser.add_argument("--table", required=True, metavar="NAME", help="a shipped table's name, or a YAML file")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="training configuration")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="checkpoint to write")
    parser.add_argument("--strict", action="store_true", help="write nothing unless every key fits")
    parser.add_argument("--all", action="store_true", help="print every key, not the first few of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the weights that nothing is found for (default 0)")
    return parser


def _print(report: ImportReport, console: Console, most: int | None) -> None:
    table = Table(title="keys", title_justify="left")
    for heading in ("", "count", "which"):
        table.add_column(heading, justify="right" if heading == "count" else "left", overflow="fold")
    shapes = [f"{name} {theirs} for {ours}" for name, (theirs, ours) in report.mismatched.items()]
    for title, keys in (
        ("matched", [f"{theirs} -> {ours}" for theirs, ours in report.matched.items()]),
        ("missing here: as made", report.missing),
        ("of another shape", shapes),
        ("unexpected", report.unexpected),
        ("ignored by the table", report.ignored),
    ):
        shown = keys if most is None else keys[:most]
        more = [f"... and {len(keys) - len(shown)} more (--all)"] if len(keys) > len(shown) else []
        table.add_row(title, str(len(keys)), "\n".join([*shown, *more]))
    console.print(table)


def _rule(entry: Mapping[str, str]) -> Rule:
    transform = entry.get("transform", "")
    if transform and transform not in TRANSFORMS:
        raise KeyError(f"transform '{transform}' is none of {', '.join(TRANSFORMS)}")
    return Rule(re.compile(entry["from"]), str(entry["to"]), transform)


def _transformed(key: str, tensor: Tensor, name: str) -> Tensor:
    try:
        return TRANSFORMS[name](tensor)
    except RuntimeError:
        raise TrainingError(
            f"{key} of shape {tuple(tensor.shape)} cannot go through {name}; it is not of the layout that the table is for"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
