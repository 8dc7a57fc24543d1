# SPDX-License-Identifier: Apache-2.0
"""MISE: the cells of a fine lattice that a field's surface passes through, found by evaluating near the surface alone.

Multiresolution isosurface extraction after Mescheder et al., Occupancy Networks (CVPR 2019), section 3.3: a coarse lattice
is evaluated as a whole; cells whose corners disagree about being occupied are halved along each axis, level by level.
Beyond the paper, the surface is *followed* at every level: where a cell's face is cut, so is the cell across it, even if
its parent's corners agreed. What is found is therefore closed (but for the box's faces): each connected piece of the
surface is there as a whole, exactly as evaluating the whole fine lattice gives it, or not at all. Not at all means that it
slipped between the coarse lattice's points, as what is larger than a coarse cell cannot.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from occflownet_core.errors import ConfigError, EngineError, GeometryError
from occflownet_core.grid import VoxelGrid
from occflownet_core.query import POINTS_AT_A_TIME, batches

Evaluate = Callable[[np.ndarray], np.ndarray]
"""Probability of being occupied [N], 0..1, at points float32 [N, 3] in metres."""

CORNERS = np.array(list(itertools.product((0, 1), repeat=3)), dtype=np.int32)
"""[8, 3] lattice offsets of a cell's corners, in C order."""

_HALVED = np.array(list(itertools.product((0, 1, 2), repeat=3)), dtype=np.int32)  # [27, 3] points of a halved cell
_PARENT_CORNERS = np.flatnonzero((_HALVED != 1).all(axis=1))  # [8] rows of _HALVED, in the order of CORNERS
_BLOCK_BITS = 3
_CELLS_AT_A_TIME = 1 << 16
_ROUNDING = 1e-6


class SparseLattice:
    """Values at some points of a regular lattice, in blocks that are made where they are needed.

    Args:
        shape: number of points along x, y, z.

    Attributes:
        values: [L] float32 by flat index, NaN where nothing was evaluated; another array once ``index`` has made blocks.
    """

    _EDGE = 1 << _BLOCK_BITS

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self._blocks = tuple(-(-n // self._EDGE) for n in shape)
        self._directory = np.full(np.prod(self._blocks), -1, dtype=np.int32)
        self._block_of = np.empty(0, dtype=np.int64)  # place in the directory of every block made
        self.values = np.empty(0, dtype=np.float32)

    def index(self, nodes: np.ndarray) -> np.ndarray:
        """Flat index int64 [...] of lattice points [..., 3]; stays valid for good."""
        high, low = nodes >> _BLOCK_BITS, nodes & (self._EDGE - 1)
        place = (high[..., 0] * self._blocks[1] + high[..., 1]) * self._blocks[2] + high[..., 2]
        block = self._directory[place]
        if (block < 0).any():
            self._make(np.unique(place[block < 0]))
            block = self._directory[place]
        within = (low[..., 0] * self._EDGE + low[..., 1]) * self._EDGE + low[..., 2]
        return block.astype(np.int64) * self._EDGE**3 + within

    def nodes(self, index: np.ndarray) -> np.ndarray:
        """Lattice points int32 [n, 3] of flat indices [n]."""
        block, within = np.divmod(index, self._EDGE**3)
        high = np.unravel_index(self._block_of[block], self._blocks)
        low = np.unravel_index(within, (self._EDGE,) * 3)
        return np.stack([h * self._EDGE + w for h, w in zip(high, low, strict=True)], axis=-1).astype(np.int32)

    def _make(self, places: np.ndarray) -> None:
        self._directory[places] = np.arange(len(self._block_of), len(self._block_of) + len(places))
        self._block_of = np.concatenate([self._block_of, places])
        needed = len(self._block_of) * self._EDGE**3
        if needed > len(self.values):
            grown = np.full(max(needed, 2 * len(self.values)), np.nan, dtype=np.float32)
            grown[: len(self.values)] = self.values
            self.values = grown


@dataclass(frozen=True)
class SurfaceCells:
    """The cells that a surface passes through.

    Attributes:
        cells: int32 [A, 3], of ``grid``, each once, in no order.
        corner_index: int64 [A, 8], lattice points with equal index are one; in the order of ``CORNERS``.
        corner_probability: float32 [A, 8].
        grid: the finest cells that were reached.
        level: how many times the coarse cells were halved for it.
        evaluations: how many points were evaluated, over all levels.
    """

    cells: np.ndarray
    corner_index: np.ndarray
    corner_probability: np.ndarray
    grid: VoxelGrid
    level: int
    evaluations: int


def surface_cells(
    evaluate: Evaluate,
    coarse: VoxelGrid,
    threshold: float,
    levels: int,
    closed: bool = False,
    go_on: Callable[[int, int], bool] = lambda level, cells: True,
) -> SurfaceCells:
    """The cells that the surface ``probability = threshold`` passes through, at ``coarse`` halved ``levels`` times.

    Args:
        evaluate: the field; called with at most ``POINTS_AT_A_TIME`` points, all in the box (its upper faces excluded).
        coarse: the box, and the cells whose corners are all evaluated.
        threshold: what counts as occupied is above; inside (0, 1).
        levels: how many times cells are halved.
        closed: take the box's faces as free, so that the surface closes there; without, it ends there.
        go_on: asked before each level with its number (from 1) and the number of cells to halve; False ends the search
            at the level that has been reached.

    Raises:
        ConfigError: the threshold is not inside (0, 1), or the number of levels negative.
        EngineError: the field's answer is not one number for each point.
    """
    if not 0 < threshold < 1:
        raise ConfigError(f"threshold is {threshold}; give a probability between 0 and 1, e.g. the bundle's own")
    if levels < 0:
        raise ConfigError(f"levels is {levels}; give 0 or more halvings of the coarse cells")
    search = _Search(evaluate, coarse, threshold, closed)
    for level in range(1, levels + 1):
        if not go_on(level, len(search.cells)):
            break
        search.halve()
    return search.found()


def levels_to(coarse: VoxelGrid, finest_m: float) -> int:
    """How many times cells must be halved to be no larger than a size.

    Raises:
        GeometryError: the size is not a positive number.
    """
    if not 0 < finest_m < math.inf:
        raise GeometryError(f"the resolution is {finest_m:g}; give a size in metres, e.g. 0.1")
    return max(0, math.ceil(math.log2(coarse.voxel_size_m / finest_m) - _ROUNDING))


class _Search:
    """The lattice of one level, and its cells that are cut; ``halve`` goes one level down."""

    def __init__(self, evaluate: Evaluate, coarse: VoxelGrid, threshold: float, closed: bool) -> None:
        self._evaluate, self._closed = evaluate, closed
        self._threshold = np.float32(threshold)
        self._grid, self._level, self._evaluations = coarse, 0, 0
        self._lattice = SparseLattice(tuple(n + 1 for n in coarse.shape))
        every = np.stack(np.meshgrid(*map(np.arange, coarse.shape), indexing="ij"), axis=-1).astype(np.int32)
        every = every.reshape(-1, 3)
        cut = [part[self._is_cut(self._corner_values(part))] for part in _parts(every)]
        self.cells = np.concatenate(cut)

    def halve(self) -> None:
        parents, parent_lattice = self.cells, self._lattice
        fine = VoxelGrid(self._grid.lower_m, self._grid.upper_m, self._grid.voxel_size_m / 2)
        self._grid, self._level = fine, self._level + 1
        self._lattice = SparseLattice(tuple(n + 1 for n in fine.shape))
        cut = [self._cut_children(part, parent_lattice) for part in _parts(parents)]
        self.cells = self._followed(np.concatenate(cut))

    def found(self) -> SurfaceCells:
        index = self._lattice.index(self.cells[:, None] + CORNERS)  # [A, 8]
        values = self._lattice.values[index]
        return SurfaceCells(self.cells, index, values, self._grid, self._level, self._evaluations)

    def _cut_children(self, parents: np.ndarray, parent_lattice: SparseLattice) -> np.ndarray:
        index = self._lattice.index(2 * parents[:, None] + _HALVED)  # [A, 27]
        parent_index = parent_lattice.index(parents[:, None] + CORNERS)  # [A, 8]
        self._lattice.values[index[:, _PARENT_CORNERS]] = parent_lattice.values[parent_index]
        values = self._known(index).reshape(-1, 3, 3, 3)
        occupied = values > self._threshold
        children = []
        for i, j, k in CORNERS:
            corners = occupied[:, i : i + 2, j : j + 2, k : k + 2].reshape(-1, 8)
            cut = corners.any(axis=1) & ~corners.all(axis=1)
            children.append(2 * parents[cut] + np.array([i, j, k], dtype=np.int32))
        return np.concatenate(children)

    def _followed(self, cells: np.ndarray) -> np.ndarray:
        """The cut cells and all that they are connected with through cut faces."""
        seen = np.zeros(len(self._lattice.values), dtype=bool)  # by the flat index of a cell's lower corner
        seen[self._lattice.index(cells)] = True
        found, frontier = [cells], cells
        while len(frontier):
            across = [self._across_cut_faces(part) for part in _parts(frontier)]
            index = np.unique(self._lattice.index(np.concatenate(across)))
            if len(self._lattice.values) > len(seen):
                seen = np.concatenate([seen, np.zeros(len(self._lattice.values) - len(seen), dtype=bool)])
            index = index[~seen[index]]
            seen[index] = True
            frontier = self._lattice.nodes(index)
            for part in _parts(frontier):
                self._corner_values(part)
            found.append(frontier)
        return np.concatenate(found)

    def _across_cut_faces(self, cells: np.ndarray) -> np.ndarray:
        """The neighbours [n, 3], inside the box, of cells [A, 3] whose common face is cut; with repetitions."""
        occupied = (self._corner_values(cells) > self._threshold).reshape(-1, 2, 2, 2)
        neighbours = []
        for axis, side in itertools.product(range(3), (0, 1)):
            face = np.take(occupied, side, axis=1 + axis).reshape(-1, 4)
            at = cells[face.any(axis=1) & ~face.all(axis=1)]
            at[:, axis] += 2 * side - 1
            neighbours.append(at[(at[:, axis] >= 0) & (at[:, axis] < self._grid.shape[axis])])
        return np.concatenate(neighbours)

    def _is_cut(self, corner_values: np.ndarray) -> np.ndarray:
        occupied = corner_values > self._threshold
        return occupied.any(axis=1) & ~occupied.all(axis=1)

    def _corner_values(self, cells: np.ndarray) -> np.ndarray:
        return self._known(self._lattice.index(cells[:, None] + CORNERS))

    def _known(self, index: np.ndarray) -> np.ndarray:
        """Values [...] at flat indices [...]; what has none yet is evaluated."""
        lattice = self._lattice
        values = lattice.values[index]
        missing = np.isnan(values)
        if not missing.any():
            return values
        wanted = np.unique(index[missing])
        if self._closed:
            nodes = lattice.nodes(wanted)
            on_face = ((nodes == 0) | (nodes == self._grid.shape)).any(axis=1)
            lattice.values[wanted[on_face]] = 0.0
            wanted = wanted[~on_face]
        for part in batches(len(wanted), POINTS_AT_A_TIME):
            lattice.values[wanted[part]] = _evaluated(self._evaluate, self._points_m(lattice.nodes(wanted[part])))
        self._evaluations += len(wanted)
        return lattice.values[index]

    def _points_m(self, nodes: np.ndarray) -> np.ndarray:
        points_m = self._grid.metric_from_index(nodes).astype(np.float32)
        # The box ends just before its upper faces; what is right before them is what the surface there is made of.
        return np.minimum(points_m, np.nextafter(np.float32(self._grid.upper_m), np.float32(-np.inf)))


def _evaluated(evaluate: Evaluate, points_m: np.ndarray) -> np.ndarray:
    probability = np.asarray(evaluate(points_m))
    if probability.shape != (len(points_m),) or np.isnan(probability).any():
        raise EngineError(
            f"the field gave {probability.shape} values, {int(np.isnan(probability).sum())} of them NaN, at "
            f"{len(points_m)} points; it must give one probability for each"
        )
    return probability


def _parts(cells: np.ndarray) -> Iterator[np.ndarray]:
    for part in batches(len(cells), _CELLS_AT_A_TIME):
        yield cells[part]
