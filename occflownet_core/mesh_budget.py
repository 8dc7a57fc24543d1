# SPDX-License-Identifier: Apache-2.0
"""MeshBudget: how fine a mesh can be in the time there is, judged by what it has cost so far and what the one before cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from occflownet_core.grid import VoxelGrid
from occflownet_core.mise import levels_to

# What later steps cost in points of the first lattice, which is evaluated and so measured first. The demo model's field
# takes 6 to 11 points for halving a cell, half as many for moving on with a cell of the last level.
_HALVING_POINTS = 12.0
_FINISHING_POINTS = 3.0
_GROWTH = 5.0
"""Cut cells per halved cell: four where the surface is smooth, six in the demo model's field, which is full of shreds."""

_FIRST_SHARE = 0.5
_LEAST_CELLS = 100
"""Fewer take as long as so many: what is spent on calls, and not on cells."""


class MeshBudget:
    """Ends each of many searches for a surface at the level that its budget allows: coarser when late.

        budget = MeshBudget()
        coarse = budget.begin(0.5, bundle.lift.grid, finest_m=0.1)
        mesh = extract_mesh(field, coarse, threshold, budget.levels, go_on=budget.go_on)
        save_mesh(mesh, "scene.glb")
        took_s = budget.end(len(mesh.cells.cells))

    A mesh costs so much per point of its first lattice, per cell that is halved, and per cut cell of its last level (whose
    vertices are found, refined, coloured and handed on). The first two are measured on the mesh itself and the third on the
    mesh before: on a machine that has just become busy, meshes become coarser at once.

    Args:
        clock: in seconds.

    Attributes:
        levels: for ``extract_mesh``: one more than finest cells need, so that ``go_on`` is asked when they are reached.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.levels = 0
        self._clock = clock
        self._point_s: float | None = None
        self._finishing_s: float | None = None
        self._began_s = self._step_began_s = self._budget_s = 0.0
        self._points = self._halved = 0

    def begin(self, budget_s: float, coarse: VoxelGrid, finest_m: float) -> VoxelGrid:
        """A mesh's time begins; the cells to begin with: ``coarse``, or larger ones where that lattice alone would take more
        than half of the budget.

        Args:
            budget_s: until ``end``.
            coarse: cells whose corners are all to be evaluated.
            finest_m: cells are halved until they are no larger, if there is time.
        """
        while self._point_s is not None and _corners(coarse) * self._point_s > _FIRST_SHARE * budget_s:
            if any(n % 2 for n in coarse.shape):
                break
            coarse = coarse.coarsened(2)
        self.levels = levels_to(coarse, finest_m) + 1
        self._points, self._halved, self._budget_s = _corners(coarse), 0, budget_s
        self._began_s = self._step_began_s = self._clock()
        return coarse

    def go_on(self, level: int, cells: int) -> bool:
        """For ``extract_mesh``: whether so many cells are to be halved."""
        now_s, took_s = self._step()
        if level == 1:
            self._point_s = took_s / self._points
            halving_s = _HALVING_POINTS * self._point_s
        else:
            halving_s = took_s / max(self._halved, _LEAST_CELLS)
        finishing_s = _FINISHING_POINTS * self._point_s if self._finishing_s is None else self._finishing_s
        self._halved = cells
        expected_s = cells * (halving_s + _GROWTH * finishing_s)
        return level < self.levels and now_s - self._began_s + expected_s <= self._budget_s

    def end(self, cells: int) -> float:
        """The mesh of so many cut cells is where it was to go; how long all of it took, in seconds."""
        now_s, took_s = self._step()
        self._finishing_s = took_s / max(cells, _LEAST_CELLS)
        return now_s - self._began_s

    def _step(self) -> tuple[float, float]:
        """Now, and how long it is since the last step."""
        now_s = self._clock()
        took_s, self._step_began_s = now_s - self._step_began_s, now_s
        return now_s, took_s


def _corners(grid: VoxelGrid) -> int:
    return math.prod(n + 1 for n in grid.shape)
