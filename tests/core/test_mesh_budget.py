# SPDX-License-Identifier: Apache-2.0
"""MeshBudget on a clock that counts evaluated points: coarser when late, at once on a machine that became slower."""

import pytest

from occflownet_core.mesh import extract_mesh
from occflownet_core.mesh_budget import MeshBudget
from tests.core.surface_twins import BOX, ball

FINEST_M = 1 / 16  # four levels below BOX


class Machine:
    """A ball's field; time passes with every evaluated point, of the search and of refined vertices alike."""

    def __init__(self) -> None:
        self.now_s, self.seconds_per_point = 0.0, 1.0
        self.budget = MeshBudget(lambda: self.now_s)

    def probability(self, points_m):
        self.now_s += self.seconds_per_point * len(points_m)
        return ball(3.0).probability(points_m)

    def samples(self, points_m, gradient=False):
        self.now_s += self.seconds_per_point * len(points_m)
        return ball(3.0).samples(points_m, gradient)

    def mesh(self, budget_s: float):
        """Cell size, and what the budget says that it took."""
        coarse = self.budget.begin(budget_s, BOX, FINEST_M)
        mesh = extract_mesh(self, coarse, 0.5, self.budget.levels, go_on=self.budget.go_on)
        return mesh.cells.grid.voxel_size_m, self.budget.end(len(mesh.cells.cells))


def test_a_budget_makes_the_surface_coarser_and_not_late():
    sizes_m = []
    for budget_s in (1_500, 8_000, 20_000, 80_000, 1e9):
        machine = Machine()
        for _ in range(2):  # the first knows nothing of what finishing costs
            size_m, took_s = machine.mesh(budget_s)
            assert took_s <= budget_s
        sizes_m.append(size_m)
    assert sizes_m == sorted(sizes_m, reverse=True) and len(set(sizes_m)) >= 4
    assert (sizes_m[0], sizes_m[-1]) == (BOX.voxel_size_m, FINEST_M)


def test_a_machine_that_became_slower_makes_coarser_meshes_at_once_and_finer_ones_again():
    machine = Machine()
    usual_m = machine.mesh(60_000)[0]
    machine.seconds_per_point = 10.0
    slow_m, took_s = machine.mesh(60_000)
    assert slow_m > usual_m and took_s <= 60_000
    machine.seconds_per_point = 1.0
    machine.mesh(60_000)  # may still count on the slow one's finishing
    assert machine.mesh(60_000)[0] == usual_m


def test_where_the_first_lattice_alone_takes_too_long_a_coarser_one_is_begun_with():
    """BOX has 9^3 = 729 corners; with cells twice as long 5^3 = 125, which is less than half of 300."""
    machine = Machine()
    late = machine.mesh(300)
    assert late[0] == BOX.voxel_size_m and late[1] > 300
    assert machine.budget.begin(300, BOX, FINEST_M) == BOX.coarsened(2)
    assert machine.budget.begin(1458, BOX, FINEST_M) == BOX
    assert machine.budget.begin(1, BOX, FINEST_M).shape == (1, 1, 1)  # no further


@pytest.mark.parametrize(("finest_m", "levels"), [(2.0, 1), (1.0, 1), (0.5, 2), (0.06, 6)])
def test_the_search_is_asked_once_more_when_its_finest_cells_are_reached(finest_m, levels):
    budget = MeshBudget(lambda: 0.0)
    budget.begin(1.0, BOX, finest_m)
    assert budget.levels == levels
    assert [budget.go_on(level, 10) for level in range(1, levels + 1)] == [True] * (levels - 1) + [False]
