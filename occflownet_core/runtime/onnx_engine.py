# SPDX-License-Identifier: Apache-2.0
"""OnnxEngine: a bundle's graph on ONNX Runtime, its memory kept in place (on the GPU, where that computes)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from occflownet_core.errors import BundleError, EngineError
from occflownet_core.lift_tables import LiftTables
from occflownet_core.runtime.bundle import Bundle
from occflownet_core.runtime.engine import SINGLE, Engine, Prediction
from occflownet_core.runtime.graph_file import graph_bytes
from occflownet_core.runtime.tensors import graph_tensors, require_described

PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
"""ONNX Runtime's names, the fastest first."""
_DISABLED = ["WeightBiasQuantization"]
"""Rewritings of ONNX Runtime that are left out: this one rounds the biases of quantised layers that the graph has in floating
point, and in half precision by so much that 0.5 % of all labels change (1.32)."""


class OnnxEngine(Engine):
    """Runs ``model.onnx``.

    The recurrent memory is a pair of buffers that take turns as the graph's input and output, so it is never copied.

    Args:
        bundle: from ``load_bundle``.
        threads: CPU threads.
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        precision: ``fp32``, or ``fp16``, which rewrites the graph as it is loaded (needs the package onnx).
        engine_cache: folder for the engines that the provider ``tensorrt`` builds.
        arena: keep the memory of one run for the next; without, the published network at full size takes 9 GB on a CPU
            in place of more than 15.

    Raises:
        EngineError: ONNX Runtime refuses the graph, or has no such provider.
        BundleError: the graph's inputs or outputs are not those that the bundle describes.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int = 1,
        provider: str = "cpu",
        precision: str = SINGLE,
        engine_cache: Path | None = None,
        arena: bool = True,
    ) -> None:
        super().__init__(bundle)
        self.name = "onnxruntime" if provider == "cpu" else f"onnxruntime-{provider}"
        self.precision = precision
        self._device = "cpu" if provider == "cpu" else "cuda"
        require_provider(provider)
        graph = str(bundle.graph_path) if precision == SINGLE else graph_bytes(bundle, precision)
        options = session_options(threads)
        options.enable_cpu_mem_arena = arena
        try:
            self._session = ort.InferenceSession(
                graph,
                options,
                providers=_providers(provider, engine_cache),
                disabled_optimizers=_DISABLED,
            )
        except Exception as error:  # ONNX Runtime's own exceptions share no narrower base
            raise EngineError(f"ONNX Runtime {ort.__version__} refuses {bundle.graph_path}: {error}") from None
        # Asked for a provider that cannot start, ONNX Runtime takes the next one and says so on its log alone.
        if self._session.get_providers()[0] != PROVIDERS[provider]:
            raise EngineError(
                f"ONNX Runtime {ort.__version__} has the provider '{provider}' but could not start it (driver, CUDA or "
                "cuDNN missing, or of another version); see its words above, or use the backend 'onnxruntime-cpu'"
            )
        self._require_contract()
        self._binding = self._session.io_binding()
        self._inputs: dict[str, ort.OrtValue] = {}
        self._memory = [self._zeros(), self._zeros()]

    def reset(self) -> None:
        self._memory[0] = self._zeros()

    def memory(self) -> dict[str, np.ndarray]:
        return {name: value.numpy().copy() for name, value in self._memory[0].items()}

    def _load_tables(self, tables: LiftTables) -> None:
        for name, array in tables.arrays().items():
            self._bind_input(name, np.ascontiguousarray(array), self._device)

    def _forward(self, images: np.ndarray, previous_from_current: np.ndarray) -> Prediction:
        read, write = self._memory
        self._bind_input("images", images)
        self._bind_input("previous_from_current", previous_from_current)
        self._bind_input("occupancy_threshold", np.array(self.occupancy_threshold, np.float32))
        self._binding.clear_binding_outputs()  # what is delivered may have changed
        for state in self.bundle.recurrent:
            self._binding.bind_ortvalue_input(state.input, read[state.output])
            self._binding.bind_ortvalue_output(state.output, write[state.output])
        for name in self.delivered:
            self._binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed while running '{self.bundle.name}': {error}") from None
        self._memory.reverse()
        names = [*(state.output for state in self.bundle.recurrent), *self.delivered]
        results = dict(zip(names, self._binding.get_outputs(), strict=True))
        # Copied, because .numpy() of a buffer on the CPU may be a view that dies with the OrtValue.
        return Prediction.from_outputs({name: results[name].numpy().copy() for name in self.delivered})

    def _bind_input(self, name: str, array: np.ndarray, device: str = "cpu") -> None:
        # Held here, because an OrtValue on the CPU borrows the array's memory and the binding holds neither.
        self._inputs[name] = ort.OrtValue.ortvalue_from_numpy(array, device, 0)
        self._binding.bind_ortvalue_input(name, self._inputs[name])

    def _zeros(self) -> dict[str, ort.OrtValue]:
        return {
            state.output: ort.OrtValue.ortvalue_from_numpy(np.zeros(state.shape, state.dtype), self._device, 0)
            for state in self.bundle.recurrent
        }

    def _require_contract(self) -> None:
        found = [*graph_tensors(self._session.get_inputs(), True), *graph_tensors(self._session.get_outputs(), False)]
        try:
            require_described(self.bundle, found)
        except EngineError as error:
            raise BundleError(f"{self.bundle.graph_path} {error}; export the model again") from None


def require_provider(provider: str) -> None:
    """Refuse a provider that this build of ONNX Runtime does not have.

    Raises:
        EngineError: it does not, with the package that does.
    """
    if PROVIDERS[provider] not in ort.get_available_providers():
        raise EngineError(
            f"ONNX Runtime {ort.__version__} here has no provider '{provider}'; install onnxruntime-gpu in place of "
            "onnxruntime, or use the backend 'onnxruntime-cpu'"
        )


def _providers(provider: str, engine_cache: Path | None) -> list:
    """From the wanted one down to the CPU, which takes what the others leave."""
    chain: list = list(PROVIDERS.values())[list(PROVIDERS).index(provider) :]
    if provider == "tensorrt" and engine_cache is not None:
        engine_cache.mkdir(parents=True, exist_ok=True)
        cache = {"trt_engine_cache_path": str(engine_cache), "trt_timing_cache_path": str(engine_cache)}
        chain[0] = (chain[0], {"trt_engine_cache_enable": True, "trt_timing_cache_enable": True, **cache})
    return chain


def session_options(threads: int) -> ort.SessionOptions:
    """Options for one graph that shares its cores with image decoding and with ROS."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Idle threads that spin would take the cores from image decoding between two runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options
