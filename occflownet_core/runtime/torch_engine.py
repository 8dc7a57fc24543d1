# SPDX-License-Identifier: Apache-2.0
"""TorchEngine: a bundle's weights in the network itself, for machines with PyTorch and for comparison."""

from __future__ import annotations

import numpy as np
import safetensors.torch
import torch

from occflownet_core.errors import EngineError
from occflownet_core.lift_tables import LiftTables
from occflownet_core.model import DeployedModel, ModelConfig, OccFlowNet
from occflownet_core.runtime.bundle import Bundle
from occflownet_core.runtime.engine import HALF, SINGLE, Engine, Prediction


class TorchEngine(Engine):
    """Runs the network of ``weights.safetensors``, on the GPU where there is one.

    Args:
        bundle: from ``load_bundle``, exported with its weights.
        threads: CPU threads; PyTorch has one such setting for the whole process.
        precision: ``fp32``, or ``fp16`` for PyTorch's own mixed precision (autocast).
        compiled: run it through ``torch.compile``; the first frame takes a minute.

    Raises:
        EngineError: the bundle carries no weights, or other ones than its configuration describes.
        ConfigError: the bundle's configuration describes no network of this version.
    """

    name = "torch"

    def __init__(self, bundle: Bundle, threads: int = 1, precision: str = SINGLE, compiled: bool = False) -> None:
        super().__init__(bundle)
        self.precision = precision
        if bundle.weights_path is None:
            kind = "the quantised bundle" if bundle.quantisation else "bundle"
            raise EngineError(
                f"{kind} {bundle.directory} carries no weights for the backend 'torch'; "
                "export it with --with-weights, or use the backend 'onnxruntime'"
            )
        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = ModelConfig.from_dict(bundle.model)
        model = OccFlowNet(config.without_download())
        try:
            model.load_state_dict(safetensors.torch.load_file(bundle.weights_path))
        except (RuntimeError, safetensors.SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise EngineError(f"{bundle.weights_path} is not of the bundle's network ({reason} ...)") from None
        self._deployed = DeployedModel(model).to(self._device).eval()
        self._run = torch.compile(self._deployed) if compiled else self._deployed
        self.reset()

    def reset(self) -> None:
        self._memory = self._deployed.empty_memory()

    def memory(self) -> dict[str, np.ndarray]:
        names = self._deployed.recurrent.values()
        return {name: value.cpu().numpy() for name, value in zip(names, self._memory, strict=True)}

    def _load_tables(self, tables: LiftTables) -> None:
        self._table_tensors = [torch.from_numpy(array).to(self._device) for array in tables.arrays().values()]

    @torch.no_grad()  # torch.compile takes no inference mode where a network computes constants with NumPy
    def _forward(self, images: np.ndarray, previous_from_current: np.ndarray) -> Prediction:
        with torch.autocast(self._device.type, torch.float16, enabled=self.precision == HALF):
            results = self._run(
                torch.from_numpy(images).to(self._device),
                *self._table_tensors,
                torch.from_numpy(previous_from_current).to(self._device),
                torch.tensor(self.occupancy_threshold, device=self._device),
                *self._memory,
            )
        self._memory = results[-len(self._memory) :]
        named = dict(zip(self._deployed.outputs, results, strict=True))
        return Prediction.from_outputs({name: named[name].cpu().numpy() for name in self.delivered})
