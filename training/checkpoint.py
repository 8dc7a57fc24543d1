# SPDX-License-Identifier: Apache-2.0
"""Reading training checkpoints: without pickle, the averaged weights, the configuration and where they come from."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch

from occflownet_core.errors import ConfigError, TrainingError
from occflownet_core.model import ModelConfig, OccFlowNet
from training.settings import TrainingConfig

CONFIG_KEY = "training_config"
PROVENANCE_KEY = "provenance"
MODEL_PREFIX = "model."


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds for those who use the network.

    Attributes:
        path: its file.
        weights: of ``OccFlowNet``; the averaged ones where training averaged.
        config: as plain values; see ``training_config`` for the typed one.
        provenance: plain values: data set, steps, seed, supervision, time, date, versions.
    """

    path: Path
    weights: dict[str, torch.Tensor]
    config: dict
    provenance: dict

    @property
    def training_config(self) -> TrainingConfig:
        """The run's configuration.

        Raises:
            TrainingError: this version does not know it.
        """
        try:
            return TrainingConfig.from_dict(self.config)
        except ConfigError as error:
            raise TrainingError(
                f"checkpoint {self.path} has a configuration that this version does not read ({error}); "
                "use the version that wrote it"
            ) from None

    @property
    def model_config(self) -> ModelConfig:
        """The network's configuration, its threshold being the last validation's best. Raises as ``training_config``."""
        config = self.training_config.model
        tuned = self.provenance.get("validation", {}).get("threshold", config.occupancy_threshold)
        return dataclasses.replace(config, occupancy_threshold=tuned)

    def model(self) -> OccFlowNet:
        """The network with these weights, in evaluation mode. Raises as ``training_config``."""
        config = self.model_config
        backbone = dataclasses.replace(config.backbone, pretrained=False)  # its weights are in the checkpoint
        model = OccFlowNet(dataclasses.replace(config, backbone=backbone))
        model.load_state_dict(self.weights)
        return model.eval()


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint that ``training.fit`` wrote.

    Raises:
        TrainingError: the file is missing, cut short, or no such checkpoint.
    """
    path = Path(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        weights = {
            name.removeprefix(MODEL_PREFIX): value
            for name, value in content["state_dict"].items()
            if name.startswith(MODEL_PREFIX)
        }
        return Checkpoint(path, weights, content[CONFIG_KEY], content[PROVENANCE_KEY])
    except FileNotFoundError:
        raise TrainingError(f"there is no checkpoint {path}; give last.ckpt or best.ckpt of a training run") from None
    except (KeyError, AttributeError, TypeError):
        raise TrainingError(f"{path} is no checkpoint of this program; give last.ckpt or best.ckpt of a run") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise TrainingError(
            f"checkpoint {path} cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
            "it was cut short or is something else"
        ) from None


def require_same_model(checkpoint: Checkpoint, config: TrainingConfig) -> None:
    """Refuse to go on with another network.

    Raises:
        TrainingError: the checkpoint's network has another shape; the first differing key is named.
    """
    ours, theirs = _flat(config.model.to_dict()), _flat(checkpoint.training_config.model.to_dict())
    free_to_change = {"name", "occupancy_threshold", "backbone.pretrained"}
    for key in sorted(set(ours) | set(theirs)):
        if key not in free_to_change and ours.get(key) != theirs.get(key):
            raise TrainingError(
                f"checkpoint {checkpoint.path} is from another configuration: its model.{key} is {theirs.get(key)}, "
                f"here it is {ours.get(key)}; use the configuration it was trained with"
            )


def _flat(values: dict, prefix: str = "") -> dict:
    result = {}
    for key, value in values.items():
        result.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return result
