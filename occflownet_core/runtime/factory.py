# SPDX-License-Identifier: Apache-2.0
"""The factory of engines: which one runs a bundle on this machine, and why.

The only module that knows all of them; each is imported when it is chosen, since none needs the others' packages.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

from occflownet_core.errors import EngineError
from occflownet_core.runtime.bundle import Bundle
from occflownet_core.runtime.engine import HALF, PRECISIONS, SINGLE, Engine

_log = logging.getLogger(__name__)

BACKENDS = ("auto", "tensorrt", "onnxruntime", "onnxruntime-tensorrt", "onnxruntime-cuda", "onnxruntime-cpu", "torch")
_CACHE_VARIABLE = "OCCFLOWNET_ENGINE_CACHE"


def create_engine(
    bundle: Bundle,
    backend: str = "auto",
    threads: int | None = None,
    precision: str = SINGLE,
    engine_cache: Path | None = None,
) -> Engine:
    """Make the engine that runs a bundle.

    Args:
        bundle: from ``load_bundle``.
        backend: ``tensorrt``; ``onnxruntime`` with the provider ``-tensorrt``, ``-cuda`` or ``-cpu``, or without one: the
            GPU if this build of it has one, else the CPU; ``torch`` (needs PyTorch and a bundle with weights); or
            ``auto``: the first of these that this machine can run. The choice and its reason are logged.
        threads: CPU threads for the run; None takes every core this process may use.
        precision: ``fp32``, or ``fp16``.
        engine_cache: folder of TensorRT engines; None takes ``engine_cache_folder()``.

    Raises:
        EngineError: the backend or precision is unknown or cannot run here.
    """
    if backend not in BACKENDS:
        raise EngineError(f"there is no backend '{backend}'; use one of {', '.join(BACKENDS)}")
    if precision not in PRECISIONS:
        raise EngineError(f"there is no precision '{precision}'; use one of {', '.join(PRECISIONS)}")
    if threads is None:
        threads = len(os.sched_getaffinity(0))
    if threads < 1:
        raise EngineError(f"threads is {threads}; give 1 or more, or None for every core")
    if backend in ("auto", "onnxruntime"):
        backend, reason = _choose(bundle, backend)
        _log.info("engine: %s (%s)", backend, reason)
    if precision == HALF and backend in ("onnxruntime-cpu", "torch"):
        _log.warning("engine: fp16 is slower than fp32 on a CPU; it is of use there to see what a GPU would lose")
    engine_cache = engine_cache or engine_cache_folder()
    if backend == "tensorrt":
        from occflownet_core.runtime.tensorrt_engine import TensorRTEngine

        return TensorRTEngine(bundle, precision, engine_cache)
    _require_installed(backend)
    if backend == "torch":
        from occflownet_core.runtime.torch_engine import TorchEngine

        return TorchEngine(bundle, threads, precision)
    from occflownet_core.runtime.onnx_engine import OnnxEngine

    return OnnxEngine(bundle, threads, backend.removeprefix("onnxruntime-"), precision, engine_cache)


def engine_cache_folder() -> Path:
    """Where engines built for this machine lie: ``$OCCFLOWNET_ENGINE_CACHE``, else ``~/.cache/occflownet/engines``."""
    named = os.environ.get(_CACHE_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "occflownet" / "engines"


def _choose(bundle: Bundle, backend: str) -> tuple[str, str]:
    """The fastest backend of a kind that this machine can run, and why it is that one."""
    kinds = {"auto": (_tensorrt, _onnxruntime, _torch), "onnxruntime": (_onnxruntime,)}
    passed_over = []
    for usable in kinds[backend]:
        chosen, reason = usable(bundle)
        if chosen:
            return chosen, "; ".join([reason, *passed_over])
        passed_over.append(reason)
    raise EngineError(
        f"no engine can run here: {'; '.join(passed_over)}; install onnxruntime (pip install onnxruntime)"
    )


def _tensorrt(bundle: Bundle) -> tuple[str, str]:
    if not _is_installed("tensorrt"):
        return "", "TensorRT is not installed"
    from occflownet_core.runtime.cuda_device import find_gpu

    try:
        return "tensorrt", f"TensorRT is installed and there is a GPU, {find_gpu().name}"
    except EngineError as error:
        return "", f"TensorRT is installed but {error}"


def _onnxruntime(bundle: Bundle) -> tuple[str, str]:
    """The CUDA provider where there is one; the TensorRT provider builds for minutes and must be asked for."""
    if not _is_installed("onnxruntime"):
        return "", "ONNX Runtime is not installed"
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return "onnxruntime-cuda", "ONNX Runtime is installed with its CUDA provider"
    return "onnxruntime-cpu", "ONNX Runtime is installed and runs every bundle on the CPU"


def _torch(bundle: Bundle) -> tuple[str, str]:
    if not _is_installed("torch"):
        return "", "PyTorch is not installed"
    if bundle.weights_path is None:
        return "", "the bundle carries no weights for PyTorch"
    return "torch", "PyTorch is installed, and the bundle carries its weights"


def _require_installed(backend: str) -> None:
    package = backend.partition("-")[0]
    if not _is_installed(package):
        raise EngineError(f"backend '{backend}' needs the package {package}, which is not installed; use 'auto'")


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
