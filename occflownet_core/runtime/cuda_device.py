# SPDX-License-Identifier: Apache-2.0
"""CUDA without PyTorch: the GPU, its memory and one stream, through NVIDIA's own bindings (package cuda-bindings)."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from occflownet_core.errors import EngineError

_ANOTHER = "use the backend 'onnxruntime-cpu'"


@dataclass(frozen=True)
class Gpu:
    """A graphics processor.

    Attributes:
        name: NVIDIA's.
        compute_capability: e.g. ``8.7``.
    """

    name: str
    compute_capability: str


def cuda_runtime() -> ModuleType:
    """``cuda.bindings.runtime``.

    Raises:
        EngineError: it is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise EngineError(
            f"CUDA's Python bindings are not installed; pip install cuda-bindings, or {_ANOTHER}"
        ) from None
    return runtime


def find_gpu() -> Gpu:
    """The GPU that CUDA uses: the first that it is shown (``CUDA_VISIBLE_DEVICES`` chooses).

    Raises:
        EngineError: there is no driver, it is too old, or it shows no GPU.
    """
    cuda = cuda_runtime()
    error, count = cuda.cudaGetDeviceCount()
    if error == cuda.cudaError_t.cudaErrorNoDevice or (error == cuda.cudaError_t.cudaSuccess and count == 0):
        raise EngineError(f"there is no NVIDIA GPU here, or CUDA_VISIBLE_DEVICES hides it; {_ANOTHER}")
    if error == cuda.cudaError_t.cudaErrorInsufficientDriver:
        version = call(cuda.cudaRuntimeGetVersion)
        raise EngineError(
            f"there is no NVIDIA driver here, or one too old for CUDA {version // 1000}.{version % 1000 // 10}; install "
            f"one (nvidia-smi must list the GPU), or {_ANOTHER}"
        )
    _require_success(error, "cudaGetDeviceCount")
    properties = call(cuda.cudaGetDeviceProperties, 0)
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Gpu(name.strip("\0 "), f"{properties.major}.{properties.minor}")


def call(function: Callable, *arguments: object) -> object:
    """A CUDA function's result, or None if it has none.

    Raises:
        EngineError: it failed.
    """
    error, *results = function(*arguments)
    _require_success(error, function.__name__)
    return results[0] if len(results) == 1 else tuple(results) or None


def _require_success(error: object, what: str) -> None:
    cuda = cuda_runtime()
    if error != cuda.cudaError_t.cudaSuccess:
        reason = cuda.cudaGetErrorString(error)[1]
        raise EngineError(f"{what} failed: {reason.decode() if isinstance(reason, bytes) else reason}")


class CudaDevice:
    """The GPU as a ``Device``: a stream of its own and everything that was allocated, freed together.

    Attributes:
        gpu: which one.
        stream: handle for libraries that queue on it.

    Raises:
        EngineError: there is none that can be used.
    """

    def __init__(self) -> None:
        self._cuda = cuda_runtime()
        self.gpu = find_gpu()
        call(self._cuda.cudaSetDevice, 0)
        self._stream = call(self._cuda.cudaStreamCreateWithFlags, self._cuda.cudaStreamNonBlocking)
        self._held = _Held(self._cuda, self._stream)
        self.close = weakref.finalize(self, self._held.free)

    @property
    def stream(self) -> int:
        return int(self._stream)

    def allocate(self, nbytes: int) -> int:
        error, address = self._cuda.cudaMalloc(nbytes)
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise self.out_of_memory(nbytes)
        _require_success(error, "cudaMalloc")
        self._held.memory.append(address)
        self.clear(address, nbytes)
        return int(address)

    def pinned(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        address = call(self._cuda.cudaMallocHost, nbytes)
        self._held.pinned.append(address)
        return np.frombuffer((ctypes.c_byte * nbytes).from_address(int(address)), dtype).reshape(shape)

    def upload(self, address: int, array: np.ndarray) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        call(self._cuda.cudaMemcpyAsync, address, array.ctypes.data, array.nbytes, kind, self._stream)

    def download(self, array: np.ndarray, address: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        call(self._cuda.cudaMemcpyAsync, array.ctypes.data, address, array.nbytes, kind, self._stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        call(self._cuda.cudaMemcpyAsync, target, source, nbytes, kind, self._stream)

    def clear(self, address: int, nbytes: int) -> None:
        call(self._cuda.cudaMemsetAsync, address, 0, nbytes, self._stream)

    def synchronize(self) -> None:
        call(self._cuda.cudaStreamSynchronize, self._stream)

    def record(self, queue: Callable[[], None]) -> Callable[[], None]:
        # Thread-local: other threads of the process (a second model, a renderer) may go on allocating meanwhile.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call(self._cuda.cudaStreamBeginCapture, self._stream, mode)
        try:
            queue()
        except EngineError:
            self._cuda.cudaStreamEndCapture(self._stream)  # or the stream takes no more work
            raise
        graph = call(self._cuda.cudaStreamEndCapture, self._stream)
        try:
            executable = call(self._cuda.cudaGraphInstantiate, graph, 0)
        finally:
            call(self._cuda.cudaGraphDestroy, graph)
        self._held.graphs.append(executable)
        return lambda: call(self._cuda.cudaGraphLaunch, executable, self._stream)

    def out_of_memory(self, nbytes: int) -> EngineError:
        """The sentence about memory that is not there."""
        free, total = call(self._cuda.cudaMemGetInfo)
        return EngineError(
            f"{self.gpu.name} is out of memory: {nbytes / 2**20:.0f} MiB more are needed, {free / 2**20:.0f} of "
            f"{total / 2**20:.0f} MiB are free; end what else uses it, or use fp16 or a smaller model"
        )


class _Held:
    """What has to be given back, apart from its owner so that the owner can be collected."""

    def __init__(self, cuda: ModuleType, stream: object) -> None:
        self._cuda, self._stream = cuda, stream
        self.memory: list[object] = []
        self.pinned: list[object] = []
        self.graphs: list[object] = []

    def free(self) -> None:
        """Errors are of no use here: the process may be ending, and the driver gone before it."""
        self._cuda.cudaStreamSynchronize(self._stream)
        for graph in self.graphs:
            self._cuda.cudaGraphExecDestroy(graph)
        for address in self.memory:
            self._cuda.cudaFree(address)
        for address in self.pinned:
            self._cuda.cudaFreeHost(address)
        self._cuda.cudaStreamDestroy(self._stream)
        self.graphs, self.memory, self.pinned = [], [], []
