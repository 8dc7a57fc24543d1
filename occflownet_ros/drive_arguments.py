# SPDX-License-Identifier: Apache-2.0
"""The command-line arguments that name a recorded drive, and the drive they name: image sets of a bag or of a data root."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from occflownet_core.errors import DatasetError
from occflownet_core.runtime.bundle import Bundle
from occflownet_core.runtime.drive import EngineInput


def add_drive(parser: argparse.ArgumentParser) -> None:
    """Arguments ``--bag`` or ``--dataroot``, and what belongs to them."""
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--bag", type=Path, help="rosbag2 folder, or a .mcap or .db3 file")
    data.add_argument("--dataroot", type=Path, metavar="DIR", help="root in nuScenes' format (needs nuscenes-devkit)")
    parser.add_argument("--version", help="the root's folder of tables (default: the only one there is)")
    parser.add_argument("--scenes", nargs="+", default=[], metavar="NAME", help="scenes of the root (default: all)")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="cameras (default: those of the bag)")
    parser.add_argument("--anchor-camera", default="", metavar="NAME", help="default: CAM_FRONT, or the bundle's first")


def require_one_kind(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with argparse's own error where arguments of a data root come with a bag."""
    if not arguments.dataroot and (arguments.version or arguments.scenes):
        parser.error("--version and --scenes belong to --dataroot; a bag has neither")


def image_sets(arguments: argparse.Namespace, bundle: Bundle, gt: Path | None = None) -> Iterator[EngineInput]:
    """The complete image sets of the drive, in order.

    Raises:
        OccflownetError: the drive cannot be read, or lacks what the bundle needs.
    """
    from occflownet_ros.engine_inputs import bag_inputs, dataset_inputs

    if arguments.bag:
        return bag_inputs(arguments.bag, bundle, arguments.anchor_camera, arguments.calibration, gt)
    version = arguments.version or _only_version(arguments.dataroot)
    return dataset_inputs(arguments.dataroot, version, arguments.scenes, bundle, arguments.anchor_camera)


def _only_version(dataroot: Path) -> str:
    found = sorted(path.parent.name for path in dataroot.glob("*/sample_data.json"))
    if len(found) != 1:
        raise DatasetError(f"{dataroot} has the tables {', '.join(found) or 'of no version'}; name one with --version")
    return found[0]
