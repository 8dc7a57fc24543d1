# SPDX-License-Identifier: Apache-2.0
"""Twins of the two NVIDIA libraries for machines without a GPU: the names and the order of calls are theirs, the memory is
the host's, and ONNX Runtime computes. They show that our calls fit together, not that TensorRT takes them.

``CudaTwin`` stands for ``cuda.bindings.runtime``: work on a stream runs at once, or is written down while it is recorded.
``TensorRTTwin`` stands for ``tensorrt``: a plan is an ONNX file behind a line that names the GPU.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort


class CudaTwin:
    """A GPU of ``total`` bytes whose memory is the host's."""

    cudaError_t = enum.Enum(  # noqa: N815
        "cudaError_t",
        "cudaSuccess cudaErrorMemoryAllocation cudaErrorNoDevice cudaErrorInsufficientDriver cudaErrorUnknown",
    )
    cudaMemcpyKind = enum.Enum(  # noqa: N815
        "cudaMemcpyKind", "cudaMemcpyHostToDevice cudaMemcpyDeviceToHost cudaMemcpyDeviceToDevice"
    )
    cudaStreamCaptureMode = enum.Enum("cudaStreamCaptureMode", "cudaStreamCaptureModeThreadLocal")  # noqa: N815
    cudaStreamNonBlocking = 1  # noqa: N815

    def __init__(self, total: int = 1 << 30, gpu: str = "Twin GPU", can_record: bool = True) -> None:
        self.total, self.gpu, self.can_record = total, gpu, can_record
        self.held: dict[int, ctypes.Array] = {}
        self.pinned: dict[int, ctypes.Array] = {}
        self.recording: list[Callable] | None = None
        self.graphs: dict[int, list[Callable]] = {}
        self.counts = dict.fromkeys(("to_device", "to_host", "within", "launches", "streams"), 0)

    def do(self, work: Callable) -> None:
        """Run at once, or write down."""
        work() if self.recording is None else self.recording.append(work)

    @property
    def _ok(self):
        return self.cudaError_t.cudaSuccess

    def cudaGetDeviceCount(self):  # noqa: N802
        return self._ok, 1

    def cudaRuntimeGetVersion(self):  # noqa: N802
        return self._ok, 13050

    def cudaGetDeviceProperties(self, device):  # noqa: N802
        return self._ok, SimpleNamespace(name=self.gpu.encode(), major=8, minor=7)

    def cudaGetErrorString(self, error):  # noqa: N802
        return self._ok, error.name.encode()

    def cudaSetDevice(self, device):  # noqa: N802
        return (self._ok,)

    def cudaStreamCreateWithFlags(self, flags):  # noqa: N802
        assert flags == self.cudaStreamNonBlocking
        self.counts["streams"] += 1
        return self._ok, 7

    def cudaStreamDestroy(self, stream):  # noqa: N802
        self.counts["streams"] -= 1
        return (self._ok,)

    def cudaStreamSynchronize(self, stream):  # noqa: N802
        assert stream == 7 and self.recording is None
        return (self._ok,)

    def cudaMemGetInfo(self):  # noqa: N802
        return self._ok, self.total - sum(len(b) for b in self.held.values()), self.total

    def cudaMalloc(self, nbytes):  # noqa: N802
        assert self.recording is None  # a graph must hold no allocation
        if nbytes > self.cudaMemGetInfo()[1]:
            return self.cudaError_t.cudaErrorMemoryAllocation, None
        return self._ok, self._new(self.held, nbytes, 0xAB)

    def cudaMallocHost(self, nbytes):  # noqa: N802
        return self._ok, self._new(self.pinned, nbytes, 0)

    def _new(self, store, nbytes, fill):
        buffer = (ctypes.c_byte * nbytes)()
        ctypes.memset(buffer, fill, nbytes)  # memory of a device is not zero by itself
        store[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def cudaFree(self, address):  # noqa: N802
        del self.held[address]
        return (self._ok,)

    def cudaFreeHost(self, address):  # noqa: N802
        del self.pinned[address]
        return (self._ok,)

    def cudaMemcpyAsync(self, target, source, nbytes, kind, stream):  # noqa: N802
        assert stream == 7
        names = {
            self.cudaMemcpyKind.cudaMemcpyHostToDevice: ("to_device", target),
            self.cudaMemcpyKind.cudaMemcpyDeviceToHost: ("to_host", source),
            self.cudaMemcpyKind.cudaMemcpyDeviceToDevice: ("within", target),
        }
        name, on_device = names[kind]
        assert len(self.held[on_device]) == nbytes  # whole tensors, and memory of the device

        def work():
            self.counts[name] += 1
            ctypes.memmove(target, source, nbytes)

        self.do(work)
        return (self._ok,)

    def cudaMemsetAsync(self, address, value, nbytes, stream):  # noqa: N802
        assert len(self.held[address]) == nbytes
        self.do(lambda: ctypes.memset(address, value, nbytes))
        return (self._ok,)

    def cudaStreamBeginCapture(self, stream, mode):  # noqa: N802
        self.recording = []
        return (self._ok,)

    def cudaStreamEndCapture(self, stream):  # noqa: N802
        recorded, self.recording = self.recording, None
        return (self._ok, recorded) if self.can_record else (self.cudaError_t.cudaErrorUnknown, None)

    def cudaGraphInstantiate(self, graph, flags):  # noqa: N802
        self.graphs[id(graph)] = graph
        return self._ok, id(graph)

    def cudaGraphDestroy(self, graph):  # noqa: N802
        return (self._ok,)

    def cudaGraphExecDestroy(self, executable):  # noqa: N802
        del self.graphs[executable]
        return (self._ok,)

    def cudaGraphLaunch(self, executable, stream):  # noqa: N802
        self.counts["launches"] += 1
        for work in self.graphs[executable]:
            work()
        return (self._ok,)


class TensorRTTwin:
    """The module ``tensorrt``, version 11; ``refuse`` makes its parser refuse, ``fail`` its builder fail."""

    __version__ = "11.4.0"
    TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")

    class ILogger:
        Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")

    class IProgressMonitor:
        pass

    def __init__(self, cuda: CudaTwin) -> None:
        self.cuda, self.refuse, self.fail, self.builds = cuda, False, False, 0
        self.timings: list[bytes] = []
        self.Builder = lambda logger: _Builder(self, logger)
        self.OnnxParser = lambda network, logger: _Parser(self, network)
        self.Runtime = lambda logger: _Runtime(self, logger)

    @staticmethod
    def nptype(kind):
        return kind


class _Parser:
    def __init__(self, trt, network):
        self.trt, self.network, self.num_errors = trt, network, 0

    def parse(self, graph: bytes) -> bool:
        self.network.graph, self.num_errors = graph, 2 * self.trt.refuse
        return not self.trt.refuse

    def get_error(self, index):
        words = {"desc": "no importer\n for it.", "node_name": "node_7", "node_operator": "Fold"}
        return SimpleNamespace(**{name: lambda word=word: word for name, word in words.items()})


class _Config:
    progress_monitor = None

    def __init__(self, trt):
        self.trt, self.cache = trt, None

    def create_timing_cache(self, content: bytes):
        return content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache not in (b"", b"timings of " + self.trt.cuda.gpu.encode()):
            return False
        self.cache = cache
        self.trt.timings.append(cache)
        return True

    def get_timing_cache(self):
        return SimpleNamespace(serialize=lambda: memoryview(b"timings of " + self.trt.cuda.gpu.encode()))


class _Builder:
    def __init__(self, trt, logger):
        self.trt, self.logger = trt, logger

    def create_network(self):
        return SimpleNamespace(graph=b"")

    def create_builder_config(self):
        return _Config(self.trt)

    def build_serialized_network(self, network, config):
        self.trt.builds += 1
        monitor = config.progress_monitor
        monitor.phase_start("Building Engine", None, 1)
        monitor.phase_start("Tactic Selection", "Building Engine", 4)
        goes_on = all(monitor.step_complete("Tactic Selection", step) for step in range(4))
        monitor.phase_finish("Tactic Selection")
        monitor.phase_finish("Building Engine")
        if self.trt.fail or not goes_on:
            self.logger.log(self.trt.ILogger.Severity.ERROR, "[builder] insufficient\nmemory")
            return None
        return memoryview(b"plan for " + self.trt.cuda.gpu.encode() + b"\n" + network.graph)


class _Runtime:
    def __init__(self, trt, logger):
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, plan: bytes):
        head, _, graph = plan.partition(b"\n")
        if head != b"plan for " + self.trt.cuda.gpu.encode():
            self.logger.log(self.trt.ILogger.Severity.ERROR, "serialization failed")
            return None
        return _Engine(self.trt, graph)


class _Engine:
    device_memory_size_v2 = 64 << 20

    def __init__(self, trt, graph):
        self.trt = trt
        self.session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        kinds = {"tensor(uint8)": np.uint8, "tensor(int32)": np.int32, "tensor(float)": np.float32}
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        self.io = {v.name: (tuple(v.shape), kinds[v.type], v in inputs) for v in (*outputs, *inputs)}
        self.num_io_tensors = len(self.io)

    def get_tensor_name(self, index):
        return list(self.io)[index]

    def get_tensor_shape(self, name):
        return self.io[name][0]

    def get_tensor_dtype(self, name):
        return self.io[name][1]

    def get_tensor_mode(self, name):
        return self.trt.TensorIOMode.INPUT if self.io[name][2] else self.trt.TensorIOMode.OUTPUT

    def create_execution_context(self):
        if self.trt.cuda.cudaMemGetInfo()[1] < self.device_memory_size_v2:
            return None
        self.trt.cuda.total -= self.device_memory_size_v2
        return _Context(self)


class _Context:
    def __init__(self, engine):
        self.engine, self.address = engine, {}

    def set_tensor_address(self, name, address):
        self.address[name] = address
        return name in self.engine.io

    def execute_async_v3(self, stream):
        assert stream == 7
        bound = dict(self.address)
        self.engine.trt.cuda.do(lambda: self._run(bound))
        return True

    def _run(self, bound):
        arrays = {}
        for name, (shape, kind, _) in self.engine.io.items():
            buffer = self.engine.trt.cuda.held[bound[name]]
            arrays[name] = np.frombuffer(buffer, kind).reshape(shape)
        outputs = [name for name, (*_, is_input) in self.engine.io.items() if not is_input]
        results = self.engine.session.run(
            outputs, {name: arrays[name] for name, (*_, is_input) in self.engine.io.items() if is_input}
        )
        for name, result in zip(outputs, results, strict=True):
            arrays[name][...] = result
