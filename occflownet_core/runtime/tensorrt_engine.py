# SPDX-License-Identifier: Apache-2.0
"""TensorRTEngine: a bundle's graph compiled for this machine's GPU. No PyTorch: the bindings of TensorRT and CUDA."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from occflownet_core.errors import EngineError
from occflownet_core.runtime.bundle import Bundle
from occflownet_core.runtime.cuda_device import CudaDevice
from occflownet_core.runtime.device_engine import DeviceEngine
from occflownet_core.runtime.engine_file import StaleEngineError, load_or_build
from occflownet_core.runtime.tensorrt_build import build_plan, engine_key, make_logger, tensorrt
from occflownet_core.runtime.tensors import Tensor

_log = logging.getLogger(__name__)


class TensorRTEngine(DeviceEngine):
    """Runs a bundle with TensorRT, building its engine first if there is no valid one.

    Args:
        bundle: from ``load_bundle``.
        precision: ``fp32``, or ``fp16``: the graph is rewritten before it is built, since TensorRT 11 keeps to its types.
        folder: of engines; see ``engine_cache_folder``.

    Raises:
        EngineError: TensorRT, the driver or the GPU is missing, the graph is refused, or memory runs out.
        BundleError: the graph's inputs or outputs are not those that the bundle describes.
    """

    name = "tensorrt"

    def __init__(self, bundle: Bundle, precision: str, folder: Path) -> None:
        trt, device = tensorrt(), CudaDevice()
        self.precision = precision
        key = engine_key(bundle, precision, device.gpu, trt.__version__)
        path = folder / key.file_name

        def build() -> bytes:
            return build_plan(bundle, precision, folder, device.gpu)

        plan, was_built = load_or_build(path, key, build)
        try:
            program = TensorRTProgram(plan, device)
        except StaleEngineError as error:
            if was_built:
                raise
            _log.warning("engine: %s; %s is built anew", error, path)
            program = TensorRTProgram(load_or_build(path, key, build, rebuild=True)[0], device)
        super().__init__(bundle, device, program)


class TensorRTProgram:
    """A deserialised engine and its execution context, as a ``Program``.

    Args:
        plan: as TensorRT serialised it.
        device: whose stream it runs on.

    Raises:
        StaleEngineError: TensorRT does not take the plan.
        EngineError: the GPU has too little memory for its activations.
    """

    def __init__(self, plan: bytes, device: CudaDevice) -> None:
        trt = tensorrt()
        self._stream = device.stream
        self._logger = make_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise StaleEngineError(f"TensorRT {trt.__version__} does not take the engine ({self._logger.last_error})")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise device.out_of_memory(self._engine.device_memory_size_v2)
        self.tensors = [self._tensor(trt, i) for i in range(self._engine.num_io_tensors)]

    def bind(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise EngineError(f"TensorRT does not take an address for {name} ({self._logger.last_error})")

    def enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise EngineError(f"TensorRT failed while running: {self._logger.last_error or 'no reason given'}")

    def _tensor(self, trt: object, index: int) -> Tensor:
        name = self._engine.get_tensor_name(index)
        return Tensor(
            name,
            tuple(self._engine.get_tensor_shape(name)),
            np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))).name,
            self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
        )
