# SPDX-License-Identifier: Apache-2.0
"""Which scenes of a data root belong to a split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from occflownet_core.errors import DatasetError

ALL = "all"


def scenes_of_split(
    tables: Path, present: Sequence[str], split: str = ALL, scenes: Sequence[str] | None = None
) -> list[str]:
    """Names of the chosen scenes that the root holds, in the root's order.

    A split is ``all``, a name in the root's own ``splits.json`` (nuscenes-devkit's form for other data sets:
    ``{"train": [scene names], ...}`` beside the tables), or one of nuScenes' official splits (``train``, ``val``,
    ``mini_train``, ``mini_val``, ...).

    Args:
        tables: folder of the root's tables.
        present: names of the scenes that the root holds.
        split: name of the split.
        scenes: names of scenes; overrides the split, and each must be present.

    Raises:
        DatasetError: a scene is not there, there is no such split, or none of its scenes is there.
    """
    if scenes is not None:
        missing = [name for name in scenes if name not in present]
        if missing or not scenes:
            raise DatasetError(f"{tables} has no scene {', '.join(missing) or '(none given)'}; it has {_some(present)}")
        return [name for name in present if name in scenes]
    if split == ALL:
        return list(present)
    own = _own_splits(tables / "splits.json")
    from nuscenes.utils.splits import create_splits_scenes

    wanted = own.get(split) or create_splits_scenes().get(split)
    if wanted is None:
        names = sorted({*own, *create_splits_scenes(), ALL})
        raise DatasetError(f"there is no split '{split}'; choose one of {', '.join(names)}")
    chosen = [name for name in present if name in set(wanted)]
    if not chosen:
        raise DatasetError(
            f"split '{split}' has no scene in {tables}, which has {_some(present)}; choose split '{ALL}' or scenes"
        )
    return chosen


def only_version(dataroot: Path) -> str:
    """The root's folder of tables, where it has just one.

    Raises:
        DatasetError: there is none, or there are several.
    """
    versions = sorted(path.parent.name for path in dataroot.glob("*/sample.json"))
    if len(versions) != 1:
        raise DatasetError(
            f"{dataroot} has several folders with tables ({', '.join(versions)}); choose one with --version, or --data.version in training"
            if versions
            else f"{dataroot} has no folder with tables; give the root of a data set in nuScenes' format"
        )
    return versions[0]


def _own_splits(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        return {str(name): [str(scene) for scene in scenes] for name, scenes in content.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DatasetError(
            f"{path} cannot be read as splits ({error}); write {{'train': [scene names], ...}}"
        ) from None


def _some(names: Sequence[str], shown: int = 6) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
