# SPDX-License-Identifier: Apache-2.0
"""The Occ3D-nuScenes classes: names, colours, nuScenes mappings and dynamic sets, in one table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from occflownet_core.errors import DatasetError


@dataclass(frozen=True)
class SemanticClass:
    """One row of the class table.

    Attributes:
        name: Occ3D's name.
        color_rgb: the nuScenes colour of its (main) raw category, 0..255.
        filtered: content that the dynamic ray filter takes out of neighbour frames.
        boxed: content that annotated boxes move (box flow).
        blocks_vehicle: an obstacle to a vehicle wherever it stands in the vehicle's height band.
    """

    name: str
    color_rgb: tuple[int, int, int]
    filtered: bool = False
    boxed: bool = False
    blocks_vehicle: bool = True


CLASSES: tuple[SemanticClass, ...] = (
    SemanticClass("others", (255, 228, 196), filtered=True),
    SemanticClass("barrier", (112, 128, 144), filtered=True),
    SemanticClass("bicycle", (220, 20, 60), boxed=True),
    SemanticClass("bus", (255, 69, 0), filtered=True, boxed=True),
    SemanticClass("car", (255, 158, 0), filtered=True, boxed=True),
    SemanticClass("construction_vehicle", (233, 150, 70), filtered=True, boxed=True),
    SemanticClass("motorcycle", (255, 61, 99), boxed=True),
    SemanticClass("pedestrian", (0, 0, 230), filtered=True, boxed=True),
    SemanticClass("traffic_cone", (47, 79, 79)),
    SemanticClass("trailer", (255, 140, 0), filtered=True, boxed=True),
    SemanticClass("truck", (255, 99, 71), filtered=True, boxed=True),
    SemanticClass("driveable_surface", (0, 207, 191), blocks_vehicle=False),
    SemanticClass("other_flat", (175, 0, 75), blocks_vehicle=False),
    SemanticClass("sidewalk", (75, 0, 75), blocks_vehicle=False),
    SemanticClass("terrain", (112, 180, 60), blocks_vehicle=False),
    SemanticClass("manmade", (222, 184, 135)),
    SemanticClass("vegetation", (0, 175, 0)),
    SemanticClass("free", (0, 0, 0), blocks_vehicle=False),
)
"""Index in this tuple = label value; the last one, ``FREE``, is the absence of anything."""

CLASS_NAMES: tuple[str, ...] = tuple(c.name for c in CLASSES)
FREE: int = CLASS_NAMES.index("free")
OCCUPIED_CLASSES: int = FREE
"""Number of classes that something can have (17): every label below FREE."""

COLORS_RGB: np.ndarray = np.array([c.color_rgb for c in CLASSES], dtype=np.uint8)
"""[18, 3] uint8."""

FILTERED_CLASSES: tuple[int, ...] = tuple(i for i, c in enumerate(CLASSES) if c.filtered)
"""Classes that the dynamic ray filter removes (OccFlowNet, arXiv 2402.12792)."""

BOXED_CLASSES: tuple[int, ...] = tuple(i for i, c in enumerate(CLASSES) if c.boxed)
"""Classes whose objects are annotated with boxes that move (OccFlowNet, arXiv 2402.12792)."""

LIDARSEG_NAMES: tuple[str, ...] = (
    "noise",
    "animal",
    "human.pedestrian.adult",
    "human.pedestrian.child",
    "human.pedestrian.construction_worker",
    "human.pedestrian.personal_mobility",
    "human.pedestrian.police_officer",
    "human.pedestrian.stroller",
    "human.pedestrian.wheelchair",
    "movable_object.barrier",
    "movable_object.debris",
    "movable_object.pushable_pullable",
    "movable_object.trafficcone",
    "static_object.bicycle_rack",
    "vehicle.bicycle",
    "vehicle.bus.bendy",
    "vehicle.bus.rigid",
    "vehicle.car",
    "vehicle.construction",
    "vehicle.emergency.ambulance",
    "vehicle.emergency.police",
    "vehicle.motorcycle",
    "vehicle.trailer",
    "vehicle.truck",
    "flat.driveable_surface",
    "flat.other",
    "flat.sidewalk",
    "flat.terrain",
    "static.manmade",
    "static.other",
    "static.vegetation",
    "vehicle.ego",
)
"""nuScenes-lidarseg category names; position = raw index (0..31)."""

LABEL_FROM_LIDARSEG: np.ndarray = np.array(
    [0, 0, 7, 7, 7, 7, 7, 0, 0, 1, 0, 0, 8, 0, 2, 3, 3, 4, 5, 0, 0, 6, 9, 10, 11, 12, 13, 14, 15, 0, 16, 0],
    dtype=np.uint8,
)
"""[32] raw lidarseg index -> label, as Occ3D-nuScenes maps them."""

PANOPTIC_DIVISOR = 1000
"""A nuScenes-panoptic label is ``raw lidarseg index * 1000 + instance``."""


def labels_from_lidarseg(raw: np.ndarray) -> np.ndarray:
    """Occ3D labels, uint8 [...], of raw nuScenes-lidarseg indices [...] (0..31).

    Raises:
        DatasetError: an index is outside 0..31.
    """
    raw = np.asarray(raw)
    if raw.size and (raw.min() < 0 or raw.max() >= len(LABEL_FROM_LIDARSEG)):
        wrong = raw.max() if raw.max() >= len(LABEL_FROM_LIDARSEG) else raw.min()
        raise DatasetError(
            f"lidarseg index {int(wrong)} is outside 0..{len(LABEL_FROM_LIDARSEG) - 1}; "
            "check that the file is a lidarseg and not a panoptic one"
        )
    return LABEL_FROM_LIDARSEG[raw]


def labels_from_panoptic(panoptic: np.ndarray) -> np.ndarray:
    """Occ3D labels, uint8 [...], of nuScenes-panoptic labels [...] (raw index * 1000 + instance)."""
    return labels_from_lidarseg(np.asarray(panoptic) // PANOPTIC_DIVISOR)


def label_of(name: str) -> int:
    """Label of a class name.

    Raises:
        DatasetError: there is no such class.
    """
    if name not in CLASS_NAMES:
        raise DatasetError(f"unknown class '{name}'; the classes are {', '.join(CLASS_NAMES)}")
    return CLASS_NAMES.index(name)


def labels_above(threshold: float, probability: np.ndarray, label: np.ndarray) -> np.ndarray:
    """uint8 labels, any shape: the class where the probability is above the threshold, FREE elsewhere.

    Args:
        threshold: compared in single precision, as exported graphs do.
        probability: float32, of being occupied.
        label: uint8, the class that a voxel has if it is occupied.
    """
    return np.where(probability > np.float32(threshold), label, FREE).astype(np.uint8)
