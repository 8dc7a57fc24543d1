# SPDX-License-Identifier: Apache-2.0
"""Rays: construction, what is refused, choosing and joining."""

import numpy as np
import pytest
import torch

from occflownet_core.errors import GeometryError
from occflownet_core.labels import FREE
from occflownet_core.renderer import Rays


def rays_along_x(count: int = 4, **changes) -> Rays:
    values = {
        "origin_m": [1.0, 2.0, 3.0],
        "direction": [1.0, 0.0, 0.0],
        "range_m": np.arange(1.0, count + 1),
        "label": np.arange(count),
        "time_index": -1,
        "camera_index": 2,
    }
    return Rays.from_numpy(**{**values, **changes})


def test_one_origin_and_one_index_serve_all_rays():
    rays = rays_along_x()
    assert len(rays) == 4
    assert rays.origin_m.dtype == torch.float32 and rays.label.dtype == torch.int64
    assert rays.origin_m.tolist() == [[1.0, 2.0, 3.0]] * 4
    assert rays.time_index.tolist() == [-1] * 4 and rays.camera_index.tolist() == [2] * 4
    assert rays.end_m.tolist() == [[2.0, 2.0, 3.0], [3.0, 2.0, 3.0], [4.0, 2.0, 3.0], [5.0, 2.0, 3.0]]


def test_a_ray_without_return_is_infinite_and_free():
    rays = rays_along_x(2, range_m=[5.0, np.inf], label=[4, FREE])
    assert rays.returned.tolist() == [True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": [2.0, 0.0, 0.0]}, "direction has length 2;"),
        ({"direction": [np.nan, 0.0, 0.0]}, "direction has length nan"),
        ({"origin_m": [np.inf, 0.0, 0.0]}, "origin is not finite"),
        ({"range_m": [1.0, 2.0, 0.0, 3.0]}, "a range is 0 m"),
        ({"range_m": [1.0, np.nan, 1.0, 3.0]}, "a range is nan m"),
        ({"range_m": [1.0, np.inf, 1.0, 3.0]}, "without return has label 1; label it 17"),
        ({"label": FREE}, "with return has label 17"),
        ({"label": -1}, "with return has label -1"),
    ],
)
def test_impossible_values_are_refused_in_one_sentence(changes, message):
    with pytest.raises(GeometryError, match=message):
        rays_along_x(**changes)


def test_shapes_must_agree():
    rays = rays_along_x()
    with pytest.raises(GeometryError, match=r"label has shape \(3,\); expected \(4,\)"):
        Rays(rays.origin_m, rays.direction, rays.range_m, rays.label[:3], rays.label, rays.label, rays.label)


def test_a_mask_indices_and_slices_choose_rays():
    rays = rays_along_x()
    assert rays[rays.range_m > 2].label.tolist() == [2, 3]
    assert rays[torch.tensor([3, 0])].label.tolist() == [3, 0]
    assert rays[:1].label.tolist() == [0]


def test_sampling_repeats_with_its_generator_and_never_doubles_a_ray():
    rays = rays_along_x(100, label=0, range_m=np.arange(1.0, 101))
    first, again, other = (rays.sample(30, torch.Generator().manual_seed(seed)).range_m for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique()) == 30
    assert torch.equal(rays.sample(100).range_m, rays.range_m)


def test_joining_keeps_order_and_what_all_parts_have():
    with_axis = rays_along_x(2, axis_cosine=[0.5, 1.0])
    both = Rays.cat([with_axis, rays_along_x(1)])
    assert both.label.tolist() == [0, 1, 0] and both.axis_cosine is None
    assert Rays.cat([with_axis, with_axis]).axis_cosine.tolist() == [0.5, 1.0, 0.5, 1.0]
    with pytest.raises(GeometryError, match="no rays to concatenate"):
        Rays.cat([])


def test_no_rays_are_rays_too():
    empty = Rays.empty()
    assert len(empty) == 0 and len(Rays.cat([empty, rays_along_x(2)])) == 2
