# SPDX-License-Identifier: Apache-2.0
"""~/mesh: the surface of a set's field as one marker, built in a thread of its own, as fine as its budget allows."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import QoSProfile
from visualization_msgs.msg import Marker

from occflownet_core.mesh import Mesh, extract_mesh, triangles_of_cases
from occflownet_core.mesh_budget import MeshBudget
from occflownet_core.occupancy_frame import OccupancyFrame
from occflownet_core.query import FieldSamples, QueryableField
from occflownet_core.runtime.bundle import Bundle
from occflownet_ros import conversions
from occflownet_ros.diagnostics import Complaints, MeshReport, traced
from occflownet_ros.newest_worker import NewestWorker
from occflownet_ros.parameters import Settings

_QUEUE = QoSProfile(depth=1)
_NICER_BY, _NICEST = 5, 19
_NEEDED = {"skimage": "scikit-image", "onnxruntime": "onnxruntime"}
"""Modules that meshes need beside the node's own, and the packages that bring them."""


class _AbandonedError(Exception):
    """The mesh at hand is not wanted any more."""


@dataclass(frozen=True)
class _Abandonable:
    """A field that gives up between two evaluations; each takes a tenth of a second or two.

    Attributes:
        field: what answers.
        is_wanted: asked before each evaluation.
    """

    field: QueryableField
    is_wanted: Callable[[], bool]

    def probability(self, points_m: np.ndarray) -> np.ndarray:
        self._require_wanted()
        return self.field.probability(points_m)

    def samples(self, points_m: np.ndarray, gradient: bool = False) -> FieldSamples:
        self._require_wanted()
        return self.field.samples(points_m, gradient)

    def _require_wanted(self) -> None:
        if not self.is_wanted():
            raise _AbandonedError


class MeshOutput:
    """The publisher of ``~/mesh`` and the thread that builds what it says.

    Of the frames that come while a mesh is built the newest is meshed next, and the others never.

    Args:
        node: whose lifecycle publisher it is.
        bundle: whose fields are meshed.
        complain: takes (subject, sentence) about trouble.
    """

    def __init__(self, node: LifecycleNode, bundle: Bundle, complain: Complaints) -> None:
        self._node = node
        self._bundle = bundle
        self._complain = complain
        self._problem = why_no_mesh(bundle)
        self._has_told_problem = False
        self._publisher = node.create_lifecycle_publisher(Marker, "~/mesh", _QUEUE)
        self._worker: NewestWorker[tuple[OccupancyFrame, Settings]] | None = None
        self._queries = None
        self._budget = MeshBudget()
        self._report = MeshReport(self._problem)
        self._counters: Counter[str] = Counter()
        self._lock = threading.Lock()  # guards the two above

    def is_wanted(self) -> bool:
        """Whether someone subscribes and can be served; who cannot be is told why, once."""
        if not self._publisher.get_subscription_count():
            return False
        if self._problem and not self._has_told_problem:
            self._has_told_problem = True
            self._complain("mesh", self._problem)
        return not self._problem

    def submit(self, frame: OccupancyFrame, settings: Settings) -> None:
        """Build the mesh of a frame, which has its field's features, as soon as the one at hand is done."""
        if self._worker is None:
            self._worker = NewestWorker("mesh", self._work)
        if self._worker.submit((frame, settings)):
            self._count("replaced")

    def stop(self) -> None:
        """Give up the mesh at hand and the one that waits."""
        if self._worker is not None:
            self._worker.stop()
        self._worker = None

    def report(self) -> MeshReport:
        is_heard = bool(self._publisher.get_subscription_count())
        with self._lock:
            return replace(self._report, is_heard=is_heard, counters=self._counters.copy())

    def close(self) -> None:
        self.stop()
        self._node.destroy_lifecycle_publisher(self._publisher)

    # The mesh thread, top to bottom

    def _work(self, request: tuple[OccupancyFrame, Settings], is_wanted: Callable[[], bool]) -> None:
        _make_way()
        frame, settings = request
        budget_s = settings.mesh_budget_ms / 1e3
        try:
            mesh = self._built(frame, settings, budget_s, is_wanted)
        except _AbandonedError:
            return
        except Exception as error:
            self._fail(error)
            mesh = None
        try:
            self._publisher.publish(conversions.mesh_bytes(frame, mesh))
        except Exception as error:
            self._fail(error)
        else:
            if mesh is not None:
                self._record(mesh, self._budget.end(len(mesh.cells.cells)), budget_s)

    def _built(self, frame: OccupancyFrame, settings: Settings, budget_s: float, is_wanted: Callable[[], bool]) -> Mesh:
        if self._queries is None:
            from occflownet_core.runtime.field_query import FieldQuery

            self._queries = FieldQuery(self._bundle)
            triangles_of_cases()  # imports scikit-image, which is no part of any mesh's time
        field = _Abandonable(self._queries.field(frame.field_features), is_wanted)
        coarse = self._budget.begin(budget_s, self._bundle.lift.grid, settings.mesh_cell_m)
        threshold = settings.threshold(self._bundle.occupancy_threshold)
        return extract_mesh(field, coarse, threshold, self._budget.levels, go_on=self._budget.go_on)

    def _record(self, mesh: Mesh, took_s: float, budget_s: float) -> None:
        self._count("built", *(("late",) if took_s > budget_s else ()))
        with self._lock:
            self._report = MeshReport(
                took_ms=1e3 * took_s, cell_m=mesh.cells.grid.voxel_size_m, triangles=len(mesh.triangles)
            )

    def _fail(self, error: Exception) -> None:
        """Say that a mesh could not be made; the next one may."""
        if self._node.context.ok():  # else the process was told to end
            self._count("failed")
            self._complain("mesh", f"a mesh could not be made: {error}{traced(error)}")

    def _count(self, *outcomes: str) -> None:
        with self._lock:
            self._counters.update(outcomes)


def why_no_mesh(bundle: Bundle) -> str:
    """What keeps a bundle's fields from being meshed here, in one sentence; empty if nothing does."""
    if not bundle.field_channels:
        return f"there are no meshes: model '{bundle.name}' was exported without its field; export it again"
    for module, package in _NEEDED.items():
        if importlib.util.find_spec(module) is None:
            return f"there are no meshes: they need {package}, which is not installed; run: pip install {package}"
    return ""


def _make_way() -> None:
    """Let this thread have what the engine leaves; on Linux alone each thread has a niceness of its own."""
    if sys.platform == "linux":
        nicer = min(os.getpriority(os.PRIO_PROCESS, os.getpid()) + _NICER_BY, _NICEST)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nicer)
