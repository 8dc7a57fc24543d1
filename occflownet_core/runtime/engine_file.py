# SPDX-License-Identifier: Apache-2.0
"""Files of engines that were built for one machine: what they are valid for stands in their head, and is checked.

occflownet-engine 1\\n
{"graph_sha256": ..., "tensorrt": ..., "gpu": ..., ..., "plan_bytes": ..., "plan_sha256": ...}\\n
the plan, as TensorRT serialised it
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from occflownet_core.errors import EngineError

_log = logging.getLogger(__name__)

_MAGIC = b"occflownet-engine 1\n"
_LONGEST_HEAD = 4096


@dataclass(frozen=True)
class EngineKey:
    """All that an engine depends on; it is valid for nothing else.

    Attributes:
        graph_sha256: of the ONNX file that it was built from.
        precision: ``fp32`` or ``fp16``.
        tensorrt: version.
        gpu: its name.
        compute_capability: e.g. ``8.7``.
    """

    graph_sha256: str
    precision: str
    tensorrt: str
    gpu: str
    compute_capability: str

    @property
    def file_name(self) -> str:
        """A name that tells people the key; the file's head holds all of it."""
        parts = (
            self.graph_sha256[:16],
            self.precision,
            self.gpu,
            f"sm{self.compute_capability}",
            f"trt{self.tensorrt}",
        )
        return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", part) for part in parts) + ".engine"


class StaleEngineError(EngineError):
    """An engine file cannot be used: it is of another key, was altered or cut short, or is something else."""


def write_engine(path: Path, key: EngineKey, plan: bytes) -> None:
    """Write an engine so that a crash leaves either the old file or the new one.

    Raises:
        EngineError: the folder cannot be written.
    """
    head = {**asdict(key), "plan_bytes": len(plan), "plan_sha256": hashlib.sha256(plan).hexdigest()}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(_MAGIC + json.dumps(head).encode() + b"\n" + plan)
        os.replace(partial, path)
    except OSError as error:
        raise EngineError(
            f"engine {path} cannot be written ({error.strerror}); name another folder with engine_cache"
        ) from None


def read_engine(path: Path, key: EngineKey) -> bytes:
    """The plan in an engine file.

    Raises:
        StaleEngineError: the file is not a whole, unaltered engine of exactly this key; the sentence says in what it
            differs.
        FileNotFoundError: there is no such file.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StaleEngineError(f"engine {path} cannot be read ({error.strerror})") from None
    head_end = content.find(b"\n", len(_MAGIC), _LONGEST_HEAD)
    if not content.startswith(_MAGIC) or head_end < 0:
        raise StaleEngineError(f"{path} is no engine file of this version")
    try:
        head = json.loads(content[len(_MAGIC) : head_end])
        found = EngineKey(**{field.name: str(head[field.name]) for field in fields(EngineKey)})
        size, digest = int(head["plan_bytes"]), str(head["plan_sha256"])
    except (ValueError, KeyError, TypeError):
        raise StaleEngineError(f"the head of engine {path} is damaged") from None
    for field in fields(EngineKey):
        ours, theirs = getattr(key, field.name), getattr(found, field.name)
        if ours != theirs:
            raise StaleEngineError(f"engine {path} was built for {field.name} {theirs}, here it is {ours}")
    plan = content[head_end + 1 :]
    if len(plan) != size or hashlib.sha256(plan).hexdigest() != digest:
        raise StaleEngineError(f"engine {path} was altered or cut short ({len(plan)} of {size} bytes)")
    return plan


def load_or_build(path: Path, key: EngineKey, build: Callable[[], bytes], rebuild: bool = False) -> tuple[bytes, bool]:
    """The plan of a key: the file's where that is valid, else a new one, which is then written there.

    Args:
        path: of the file.
        key: what the plan must be for.
        build: makes a plan.
        rebuild: make a new one whatever is there.

    Returns:
        The plan, and whether it was built.

    Raises:
        EngineError: of ``build``, or the file cannot be written.
    """
    if not rebuild:
        try:
            return read_engine(path, key), False
        except FileNotFoundError:
            _say_what_is_there_instead(path, key)
        except StaleEngineError as error:
            _log.warning("engine: %s; it is built anew", error)
    plan = build()
    write_engine(path, key, plan)
    return plan, True


def _say_what_is_there_instead(path: Path, key: EngineKey) -> None:
    """Name engines of the same graph that are for something else, so that a rebuild does not come as a surprise."""
    others = sorted(path.parent.glob(f"{key.graph_sha256[:16]}-*.engine")) if path.parent.is_dir() else []
    for other in others:
        try:
            read_engine(other, key)
        except (StaleEngineError, OSError) as error:
            _log.warning("engine: %s; another one is built", error)
