# SPDX-License-Identifier: Apache-2.0
"""The converters between bags and data roots as tests call them."""

import json
from pathlib import Path

import yaml

from occflownet_ros import bag_to_nuscenes, nuscenes_to_bag
from tests.ros import own_vehicle as vehicle

VERSION = "v1.0-mini"


def convert(*arguments: object) -> int:
    return bag_to_nuscenes.main(["--bag", *map(str, arguments)])


def to_bag(root: Path, scene: str, out: Path, *options: str) -> Path:
    arguments = ["--dataroot", str(root), "--scene", scene, "--out", str(out / scene), *options]
    assert nuscenes_to_bag.main(arguments) == 0
    return out / scene


def table(root: Path, name: str) -> list[dict]:
    return json.loads((root / VERSION / f"{name}.json").read_text())


def own_map(folder: Path, **changes: str) -> Path:
    """The own vehicle's topics.yaml with some keys replaced or added; values are YAML."""
    content = yaml.safe_load(vehicle.TOPICS_YAML) | {key: yaml.safe_load(value) for key, value in changes.items()}
    (folder / "topics.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "topics.yaml"
