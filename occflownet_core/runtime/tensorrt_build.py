# SPDX-License-Identifier: Apache-2.0
"""Building a bundle's TensorRT engine: from its graph to a file that holds for this GPU, and what is said meanwhile.

Written against the Python bindings of TensorRT 11 (names checked in the published wheel of 11.4 and the sources of 11.1).
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from occflownet_core.errors import EngineError
from occflownet_core.runtime.bundle import Bundle
from occflownet_core.runtime.cuda_device import Gpu, find_gpu
from occflownet_core.runtime.engine_file import EngineKey, load_or_build
from occflownet_core.runtime.graph_file import graph_bytes

_log = logging.getLogger(__name__)

_OLDEST = 11
_SAY_EVERY_S = 10.0


def tensorrt() -> ModuleType:
    """The module ``tensorrt``.

    Raises:
        EngineError: it is not installed, cannot be loaded, or is too old.
    """
    try:
        import tensorrt as trt
    except ImportError as error:
        if error.name == "tensorrt":
            raise EngineError(
                "TensorRT is not installed; pip install tensorrt cuda-bindings onnx, or use the backend 'onnxruntime'"
            ) from None
        raise EngineError(
            f"TensorRT is installed but cannot be loaded ({error}); install it again, with all of its libraries"
        ) from None
    if int(trt.__version__.partition(".")[0]) < _OLDEST:
        raise EngineError(f"TensorRT here is {trt.__version__}; {_OLDEST} or newer is needed: pip install -U tensorrt")
    return trt


def engine_key(bundle: Bundle, precision: str, gpu: Gpu, version: str) -> EngineKey:
    """What an engine of a bundle's graph is valid for."""
    digest = hashlib.sha256(bundle.graph_path.read_bytes()).hexdigest()
    return EngineKey(digest, precision, version, gpu.name, gpu.compute_capability)


def prepare_engine(
    bundle: Bundle, precision: str, folder: Path, rebuild: bool = False, console: Console | None = None
) -> tuple[Path, float | None]:
    """Have a valid engine file of a bundle in a folder, building it if need be.

    Args:
        bundle: from ``load_bundle``.
        precision: ``fp32`` or ``fp16``.
        folder: of engines.
        rebuild: build even if a valid one is there.
        console: for a progress bar; None logs instead.

    Returns:
        The file, and the seconds that building took, None if it was there.

    Raises:
        EngineError: TensorRT, the driver or the GPU is missing, the graph is refused, or memory runs out.
    """
    trt, gpu = tensorrt(), find_gpu()
    key = engine_key(bundle, precision, gpu, trt.__version__)
    path = folder / key.file_name
    started_s = time.monotonic()
    _, was_built = load_or_build(path, key, lambda: build_plan(bundle, precision, folder, gpu, console), rebuild)
    return path, time.monotonic() - started_s if was_built else None


def build_plan(bundle: Bundle, precision: str, folder: Path, gpu: Gpu, console: Console | None = None) -> bytes:
    """Compile a bundle's graph for the GPU of this machine.

    Raises:
        EngineError: the graph uses what TensorRT lacks (its node is named), or TensorRT fails.
    """
    trt = tensorrt()
    graph = checked_graph(bundle, precision)
    _log.info(
        "engine: TensorRT %s builds '%s' in %s for %s; this takes minutes",
        trt.__version__,
        bundle.name,
        precision,
        gpu.name,
    )
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network()  # strongly typed, as every network of TensorRT 11 is
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        raise EngineError(refusal(trt.__version__, [parser.get_error(i) for i in range(parser.num_errors)]))
    config = builder.create_builder_config()
    timings = folder / timing_file_name(gpu, trt.__version__)
    _load_timings(config, timings)
    with BuildProgress(console) as progress:
        monitor = make_monitor(trt, progress)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(
            f"TensorRT {trt.__version__} could not build '{bundle.name}': {logger.last_error or 'no reason given'}"
        )
    _save_timings(config, timings)
    return bytes(plan)


def checked_graph(bundle: Bundle, precision: str) -> bytes:
    """The graph to build, refused early if it uses what TensorRT lacks; the check needs the package onnx.

    Raises:
        EngineError: it does.
    """
    graph = graph_bytes(bundle, precision)
    try:
        import onnx

        from occflownet_core.runtime.native_operators import require_native
    except ImportError:
        return graph  # the parser will say so too, later and in its own words
    require_native(onnx.load_from_string(graph))
    return graph


def refusal(version: str, errors: list) -> str:
    """One sentence of a parser's errors, with the node of the first."""
    if not errors:
        return f"TensorRT {version} cannot read the graph; export the model again"
    first = errors[0]
    reason = " ".join(str(first.desc()).split()).rstrip(".")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return (
        f"TensorRT {version} refuses node '{first.node_name()}' ({first.node_operator()}): {reason}{more}; "
        "export the model without it, or use the backend 'onnxruntime'"
    )


def timing_file_name(gpu: Gpu, version: str) -> str:
    """Where timings of kernels are kept: they hold for a GPU and a version, whatever the graph."""
    return f"timings-{re.sub(r'[^A-Za-z0-9.]+', '_', gpu.name)}-sm{gpu.compute_capability}-trt{version}.cache"


def _load_timings(config: object, path: Path) -> None:
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    # Refused where it is of another device or damaged; an empty one is always accepted.
    if not config.set_timing_cache(config.create_timing_cache(content), False):
        _log.warning("engine: timings in %s are of another machine or damaged; kernels are timed anew", path)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _save_timings(config: object, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(config.get_timing_cache().serialize()))
    except OSError as error:
        _log.warning("engine: timings cannot be kept in %s (%s); the next build will time kernels again", path, error)


def make_logger(trt: ModuleType) -> object:
    """TensorRT's messages on our log: its warnings and errors as such, the rest for debugging.

    Its attribute ``last_error`` holds the latest error's words.
    """

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = ""

        def log(self, severity: object, message: str) -> None:
            levels = {
                trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
                trt.ILogger.Severity.ERROR: logging.ERROR,
                trt.ILogger.Severity.WARNING: logging.WARNING,
            }
            level = levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:
                self.last_error = " ".join(message.split())
            _log.log(level, "TensorRT: %s", message)

    return Logger()


def make_monitor(trt: ModuleType, progress: BuildProgress) -> object:
    """TensorRT's view of a ``BuildProgress``."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()


class BuildProgress:
    """How far a build is: bars on a console, or a line in the log every ten seconds. Called from several threads.

    Args:
        console: where bars go; None logs.
        clock_s: monotonic.
    """

    def __init__(self, console: Console | None = None, clock_s: Callable[[], float] = time.monotonic) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self._bars = Progress(*columns, TimeElapsedColumn(), console=console, transient=True) if console else None
        self._clock_s = clock_s
        self._said_s = clock_s()
        self._lock = threading.Lock()
        self._tasks: dict[str, object] = {}
        self._phases: dict[str, tuple[int, int]] = {}
        self._depth: dict[str, int] = {}
        self._is_wanted = True

    def __enter__(self) -> BuildProgress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def cancel(self) -> None:
        """Ask the build to end at its next step."""
        self._is_wanted = False

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._depth[phase] = self._depth.get(parent, -1) + 1 if parent else 0
            self._phases[phase] = (0, steps)
            if self._bars:
                self._tasks[phase] = self._bars.add_task("  " * self._depth[phase] + phase, total=steps)

    def step(self, phase: str, step: int) -> bool:
        """Note that step ``step`` (counted from 0) is done; False asks TensorRT to stop."""
        with self._lock:
            steps = self._phases.get(phase, (0, step + 1))[1]
            self._phases[phase] = (step + 1, steps)
            if self._bars and phase in self._tasks:
                self._bars.update(self._tasks[phase], completed=step + 1)
            elif self._clock_s() - self._said_s >= _SAY_EVERY_S:
                self._said_s = self._clock_s()
                _log.info("engine: %s", self.sentence())
            return self._is_wanted

    def finish(self, phase: str) -> None:
        with self._lock:
            self._phases.pop(phase, None)
            if self._bars and phase in self._tasks:
                self._bars.remove_task(self._tasks.pop(phase))

    def sentence(self) -> str:
        """What is being done, the widest phase first."""
        nested = sorted(self._phases, key=self._depth.__getitem__)
        return ", ".join(f"{phase} {done} of {steps}" for phase in nested for done, steps in [self._phases[phase]])
