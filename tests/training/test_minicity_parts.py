# SPDX-License-Identifier: Apache-2.0
"""MiniCity's parts against slow twins: ray casting, voxel traversal, patterns, paths, meshes, and who is in the city."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("embreex", reason="MiniCity needs the train extra")

from shapely.geometry import Polygon

from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import LIDARSEG_NAMES, label_of, labels_from_lidarseg
from training.data.minicity import mesh, people, props, vehicles
from training.data.minicity.palette import Palette
from training.data.minicity.path import Path, Speed, joined
from training.data.minicity.raycast import FAR_M, MISS, Tracer
from training.data.minicity.sampling import clipped, surface_samples
from training.data.minicity.streets import plan_streets
from training.data.minicity.texture import pulse
from training.data.minicity.traffic import populate
from training.data.minicity.voxels import traverse


def nearest_by_hand(corners: np.ndarray, origin: np.ndarray, direction: np.ndarray) -> float:
    """Range of the first triangle along a ray (Moller and Trumbore, 1997), infinite for none."""
    best = np.inf
    for a, b, c in corners:
        e1, e2 = b - a, c - a
        p = np.cross(direction, e2)
        determinant = e1 @ p
        if abs(determinant) < 1e-12:
            continue
        s = origin - a
        u = (s @ p) / determinant
        q = np.cross(s, e1)
        v = (direction @ q) / determinant
        t = (e2 @ q) / determinant
        if u >= 0 and v >= 0 and u + v <= 1 and 0 < t < best:
            best = t
    return best


def test_tracer_finds_what_a_loop_over_triangles_finds():
    rng = np.random.default_rng(3)
    corners = rng.uniform(-5, 5, (40, 1, 3)) + rng.uniform(-6, 6, (40, 3, 3))
    origins = rng.uniform(-8, 8, (200, 3))
    directions = rng.normal(size=(200, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    tracer = Tracer(corners)
    hits = tracer.first_hits(origins, directions)
    expected = np.array([nearest_by_hand(corners, o, d) for o, d in zip(origins, directions, strict=True)])
    struck = np.isfinite(expected)
    assert 20 < struck.sum() < 180
    np.testing.assert_array_equal(hits.hit, struck)
    np.testing.assert_allclose(hits.range_m[struck], expected[struck], rtol=1e-4)
    assert (hits.range_m[~struck] == FAR_M).all()
    assert (hits.face[~struck] == MISS).all()
    # The hit point is where the barycentric coordinates of the triangle say.
    u, v = hits.barycentric[struck].T[..., None]
    a, b, c = corners[hits.face[struck]].transpose(1, 0, 2)
    point = origins[struck] + hits.range_m[struck, None] * directions[struck]
    np.testing.assert_allclose((1 - u - v) * a + u * b + v * c, point, atol=1e-3)
    limit = np.full(200, 6.0)
    np.testing.assert_array_equal(tracer.blocked(origins, directions, limit), expected < 6.0)


def test_a_tracer_of_nothing_hits_nothing():
    tracer = Tracer(np.zeros((0, 3, 3)))
    hits = tracer.first_hits(np.zeros((2, 3)), np.ones((2, 3)))
    assert not hits.hit.any()
    assert not tracer.blocked(np.zeros((2, 3)), np.ones((2, 3)), np.ones(2)).any()


GRID = VoxelGrid((-4.0, -4.0, -1.0), (4.0, 4.0, 1.0), 0.5)
inside = st.tuples(st.floats(-3.9, 3.9), st.floats(-3.9, 3.9), st.floats(-0.9, 0.9))
anywhere = st.tuples(st.floats(-9, 9), st.floats(-9, 9), st.floats(-3, 3))


@settings(max_examples=150, deadline=None)
@given(origin=inside, end=anywhere)
def test_traversal_visits_every_voxel_that_samples_on_the_segment_meet(origin, end):
    """The twin walks in steps of 2 mm; traversal may add only voxels that the segment touches within 4 mm."""
    origin, end = np.array(origin), np.array(end)
    steps = max(2, int(np.linalg.norm(end - origin) / 0.002))
    on_segment = origin + np.linspace(0, 1, steps)[:, None] * (end - origin)
    cell, within = GRID.cells(on_segment)
    seen = traverse(GRID, origin[None], end[None])
    by_hand = np.zeros(GRID.shape, dtype=bool)
    by_hand[tuple(cell[within].T)] = True
    extra = np.argwhere(seen & ~by_hand)
    missing = np.argwhere(by_hand & ~seen)
    for voxels, shrink in ((extra, -0.004), (missing, 0.004)):
        for voxel in voxels:  # only a grazed edge or corner may differ
            low = GRID.metric_from_index(voxel) + shrink
            high = GRID.metric_from_index(voxel + 1) - shrink
            touched = ((on_segment >= low) & (on_segment <= high)).all(axis=1).any()
            assert touched if shrink < 0 else not touched


def test_traversal_stops_in_the_first_occupied_voxel():
    wall = np.zeros(GRID.shape, dtype=bool)
    wall[12] = True  # x from 2.0 to 2.5
    seen = traverse(GRID, np.array([[-3.75, 0.25, 0.25]]), np.array([[3.75, 0.25, 0.25]]), wall)
    assert np.argwhere(seen).tolist() == [[i, 8, 2] for i in range(13)]


@settings(max_examples=100, deadline=None)
@given(x=st.floats(-20, 20), period=st.floats(0.2, 5), fill=st.floats(0.05, 1.0), width=st.floats(0.05, 8))
def test_pulse_is_the_mean_of_the_train_over_the_window(x, period, fill, width):
    at = x + width * (np.arange(4000) + 0.5) / 4000 - width / 2
    mean = (np.mod(at / period, 1) < fill).mean()
    found = pulse(np.array([x]), np.array([period]), np.array([fill]), np.array([width]))[0]
    assert found == pytest.approx(mean, abs=0.01)


def test_a_pulse_train_without_period_covers_everything():
    assert pulse(np.array([3.0]), np.array([0.0]), np.array([0.3]), np.array([1.0]))[0] == 1


def test_distance_is_the_integral_of_the_speed():
    speed = Speed(mean_mps=6.0, swing_mps=1.5, rate=0.7, phase=0.4)
    t = np.linspace(0, 10, 20001)
    v = speed.mps(t)
    by_trapezia = np.sum((v[1:] + v[:-1]) / 2 * np.diff(t))
    assert float(speed.distance_m(10.0)) == pytest.approx(by_trapezia, abs=1e-6)
    assert float(speed.distance_m(0.0)) == 0


def test_path_is_parametrised_by_arc_length_and_goes_on_straight():
    path = Path(np.array([[0, 0], [10, 0]]))
    position, heading = path.at(np.array([-2.0, 4.0, 13.0]))
    np.testing.assert_allclose(position, [[-2, 0], [4, 0], [13, 0]], atol=1e-12)
    np.testing.assert_allclose(heading, 0, atol=1e-12)
    np.testing.assert_allclose(path.offset(2.0).at(5.0)[0], [5, 2])
    np.testing.assert_allclose(path.reversed().at(1.0)[0], [9, 0])


@pytest.mark.parametrize(("turn", "centre"), [(1, (12.0, 8.0)), (-1, (12.0, -8.0))])
def test_joined_paths_turn_on_a_circle(turn, centre):
    """East along y = 0, then north or south along x = 20, radius 8: the arc's centre is 8 m before the corner."""
    first = Path(np.array([[-30.0, 0], [10, 0]]))
    second = Path(np.array([[20.0, -40 * turn], [20, 40 * turn]]))
    way = joined(first, second, 8.0)
    on_arc = [p for p in way.points_m if p[0] > 12.6 and abs(p[1]) < 7.4]
    assert len(on_arc) > 10
    np.testing.assert_allclose(np.linalg.norm(np.array(on_arc) - centre, axis=1), 8.0, atol=0.02)
    np.testing.assert_allclose(way.at(way.length_m)[0], [20, 40 * turn], atol=1e-9)
    assert abs(np.diff(way.heading)).max() < 0.5 / 8.0 * 1.3  # no kinks


def test_flat_surfaces_keep_their_area_and_look_up():
    ring = Polygon([(0, 0), (90, 0), (90, 50), (0, 50)], [[(10, 10), (20, 10), (20, 30), (10, 30)]])
    surface = mesh.flat(ring, 0.15, 0)
    assert surface.areas_m2().sum() == pytest.approx(90 * 50 - 10 * 20)
    np.testing.assert_allclose(surface.normals(), [[0, 0, 1]] * len(surface), atol=1e-9)


@pytest.mark.parametrize(
    ("solid", "volume"),
    [
        (mesh.block((0, 2), (0, 3), (0, 4), 0), 24.0),
        (mesh.prism([(0, 0), (2, 0), (0, 1)], (0, 5), 0), 5.0),
        (mesh.hull([(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)], 0), 1 / 6),
        (mesh.cylinder((0, 0, 0), (0, 0, 2), 1.0, 0, sides=400), 2 * np.pi),
        (mesh.ellipsoid((1, 2, 3), (1, 1, 2), 0, 4), 8 / 3 * np.pi),
    ],
)
def test_solids_are_closed_and_face_outwards(solid, volume):
    """Divergence theorem: the signed volume under a closed surface is positive when its faces look out."""
    a, b, c = solid.corners.transpose(1, 0, 2)
    signed = (a * np.cross(b, c)).sum() / 6
    assert signed == pytest.approx(volume, rel=0.01)


def test_samples_are_spread_by_area_and_clipping_keeps_the_surface():
    wall = mesh.block((0, 10), (0, 20), (0, 12), 0).labelled(28)
    points, category = surface_samples(wall, 10.0, np.random.default_rng(0))
    assert len(points) == pytest.approx(10 * 2 * (200 + 120 + 240), rel=0.01)
    assert (category == 28).all()
    low = clipped(wall, np.array([[5.0, 10.0]]), 100.0, 5.0)
    kept = low.corners.mean(axis=1)
    assert kept[:, 2].max() < 5.0 + 3.0
    # Two 10 m and two 20 m walls up to 5 m, and the floor, are all there; at most one more layer of triangles.
    assert 2 * 10 * 5 + 2 * 20 * 5 + 200 <= low.areas_m2().sum() <= 2 * 10 * 8 + 2 * 20 * 8 + 200


@pytest.mark.parametrize(
    ("make", "length", "width", "height"),
    [
        (vehicles.car, (3.8, 5.5), (1.6, 2.1), (1.35, 2.2)),
        (vehicles.truck, (6.4, 9.1), (2.2, 2.6), (2.7, 3.6)),
        (vehicles.trailer, (7.4, 11.1), (2.4, 2.6), (3.2, 3.9)),
        (vehicles.bus, (9.9, 12.4), (2.5, 2.6), (2.9, 3.4)),
        (vehicles.construction_vehicle, (6.0, 7.5), (2.2, 2.8), (2.9, 3.4)),
        (lambda r, p: vehicles.bicycle(r, p, True), (1.5, 1.9), (0.5, 0.75), (1.6, 2.0)),
        (lambda r, p: vehicles.motorcycle(r, p, True), (1.9, 2.3), (0.6, 0.9), (1.5, 2.0)),
        (lambda r, p: people.pedestrian(r, p, "human.pedestrian.adult", True), (0.4, 1.0), (0.4, 0.8), (1.5, 2.0)),
        (props.jersey_barrier, (1.8, 2.1), (0.4, 0.7), (0.8, 1.1)),
        (props.traffic_cone, (0.3, 0.5), (0.3, 0.5), (0.6, 0.9)),
    ],
)
def test_things_have_the_size_of_their_kind_and_stand_on_the_ground(make, length, width, height):
    for seed in range(4):
        model = make(np.random.default_rng(seed), Palette())
        low, high = model.corners.min(axis=(0, 1)), model.corners.max(axis=(0, 1))
        assert low[2] == pytest.approx(0, abs=0.06)
        for extent, (least, most) in zip(high - low, (length, width, height), strict=True):
            assert least <= extent <= most


def test_every_boxed_class_appears_within_a_few_scenes_and_nobody_collides():
    shown = set()
    for index in range(5):
        plan = plan_streets(np.random.default_rng((1, index)), 4.0)
        actors = populate(np.random.default_rng((2, index)), Palette(), plan, np.zeros((0, 3)), 4.0)
        shown |= {int(labels_from_lidarseg(LIDARSEG_NAMES.index(a.category))) for a in actors}
        ego, _ = plan.ego(np.linspace(0, 4, 17))
        for actor in actors:
            place, _ = actor.place(np.linspace(0, 4, 17))
            assert np.linalg.norm(place - ego, axis=1).min() > 1.0
        speed = plan.ego_speed.mps(np.linspace(0, 4, 50))
        assert speed.min() >= 3
        assert speed.max() <= 12
    names = ["others", "barrier", "bicycle", "bus", "car", "construction_vehicle", "motorcycle", "pedestrian"]
    assert {label_of(n) for n in [*names, "traffic_cone", "trailer", "truck"]} <= shown


def test_surfaces_of_a_plan_do_not_overlap():
    for index in range(3):
        plan = plan_streets(np.random.default_rng((4, index)), 4.0)
        surfaces = [plan.road, plan.islands, plan.sidewalk, plan.verge, plan.terrain]
        for i, a in enumerate(surfaces):
            for b in surfaces[i + 1 :]:
                assert a.intersection(b).area < 0.5
        for paint in plan.paint.values():
            assert paint.difference(plan.road.buffer(0.01)).area < 0.01
