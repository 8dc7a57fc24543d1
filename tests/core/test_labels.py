# SPDX-License-Identifier: Apache-2.0
"""The class table against nuScenes' own names and colours."""

import numpy as np
import pytest

from occflownet_core import labels
from occflownet_core.errors import DatasetError


def test_names_and_colours_are_nuscenes_own():
    colour_map = pytest.importorskip("nuscenes.utils.color_map").get_colormap()
    assert list(colour_map) == list(labels.LIDARSEG_NAMES)
    for label in range(labels.OCCUPIED_CLASSES):
        own_categories = [
            n for n, c in zip(labels.LIDARSEG_NAMES, labels.LABEL_FROM_LIDARSEG, strict=True) if c == label
        ]
        assert tuple(labels.COLORS_RGB[label]) in {tuple(colour_map[name]) for name in own_categories}


@pytest.mark.parametrize(
    ("raw_name", "label_name"),
    [
        ("noise", "others"),
        ("human.pedestrian.police_officer", "pedestrian"),
        ("human.pedestrian.stroller", "others"),
        ("vehicle.bus.bendy", "bus"),
        ("vehicle.emergency.police", "others"),
        ("static_object.bicycle_rack", "others"),
        ("static.vegetation", "vegetation"),
        ("vehicle.ego", "others"),
    ],
)
def test_raw_categories_map_as_occ3d_does(raw_name, label_name):
    raw = labels.LIDARSEG_NAMES.index(raw_name)
    assert labels.labels_from_lidarseg(np.array(raw)) == labels.label_of(label_name)
    assert labels.labels_from_panoptic(np.array(raw * 1000 + 7)) == labels.label_of(label_name)


def test_dynamic_sets_are_the_papers():
    assert labels.FILTERED_CLASSES == (0, 1, 3, 4, 5, 7, 9, 10)
    assert labels.BOXED_CLASSES == (2, 3, 4, 5, 6, 7, 9, 10)
    assert labels.FREE == 17


def test_a_panoptic_value_given_as_lidarseg_is_refused():
    with pytest.raises(DatasetError, match=r"17001 is outside 0\.\.31"):
        labels.labels_from_lidarseg(np.array([3, 17001]))


def test_unknown_names_are_refused():
    with pytest.raises(DatasetError, match="unknown class 'tram'"):
        labels.label_of("tram")
