# SPDX-License-Identifier: Apache-2.0
"""What a replay evaluation is going to do: bundle, bag, ground truth and parameters, read and checked to go together."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from occflownet_core.errors import BagError, DatasetError, OccflownetError
from occflownet_core.runtime.bundle import Bundle, load_bundle
from occflownet_ros.bag import Bag
from occflownet_ros.bag_calibration import save_bags_rig
from occflownet_ros.bag_keyframes import BagKeyframe, NodeInputs, find_inputs, read_keyframes
from occflownet_ros.calibration_source import anchor_index
from occflownet_ros.ground_truth import TrueKeyframe, read_ground_truth
from occflownet_ros.parameters import LOCKSTEP as LOCKSTEP_PARAMETERS
from occflownet_ros.parameters import Settings

LOCKSTEP, REALTIME = "lockstep", "realtime"


@dataclass(frozen=True)
class Plan:
    """What will be replayed and how; everything that can be refused has been by the time there is one.

    Attributes:
        bag: path.
        bundle: the model.
        mode: ``lockstep`` or ``realtime``.
        rate: of the bag's clock, None in lockstep.
        inputs: the bag's topics that the node hears.
        anchor_camera: opens a set.
        keyframes: of the bag.
        truth: about those of them that are labelled.
        parameters: the node's, where they differ from its defaults.
        span_ns: first and last stamp of the bag.
    """

    bag: Path
    bundle: Bundle
    mode: str
    rate: float | None
    inputs: NodeInputs
    anchor_camera: str
    keyframes: list[BagKeyframe]
    truth: list[TrueKeyframe]
    parameters: dict[str, object]
    span_ns: tuple[int, int]

    @property
    def threshold(self) -> float:
        """Occupancy threshold in force."""
        given = float(self.parameters.get("occupancy_threshold", -1.0))
        return given if given >= 0 else self.bundle.occupancy_threshold


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Read and check all that the replay depends on.

    Raises:
        OccflownetError: the bundle, the bag, the ground truth and the parameters do not go together.
    """
    bundle = load_bundle(arguments.bundle)
    given = _given_parameters(arguments.param)
    anchor_camera = arguments.anchor_camera or given.get("anchor_camera") or default_anchor(bundle)
    anchor = anchor_index(bundle.cameras, anchor_camera)
    settings = Settings.from_values(given)
    with Bag(arguments.bag) as bag:
        inputs = find_inputs(bag, bundle.cameras, settings.camera_namespaces, settings.odom_topic)
        keyframes = read_keyframes(bag, inputs, anchor, settings.max_camera_time_diff_ms)
        span_ns = bag.start_ns, bag.end_ns
    if arguments.mode == LOCKSTEP and not any(keyframe.is_complete for keyframe in keyframes):
        what = "no keyframe has an image of every camera" if keyframes else "no keyframe markers (topic /keyframe)"
        raise BagError(
            f"bag {arguments.bag} has {what}, so there is nothing to step through; "
            f"use --mode {REALTIME}, or make the bag with nuscenes_to_bag"
        )
    if arguments.gt is not None and not keyframes:
        raise BagError(
            f"bag {arguments.bag} has no keyframe markers (topic /keyframe), so --gt cannot be matched to it; "
            "leave --gt out, or make the bag with nuscenes_to_bag"
        )
    truth = read_ground_truth(arguments.bag, arguments.gt) if keyframes else []
    for keyframe in truth:
        if keyframe.labels.shape != bundle.grid.shape:
            raise DatasetError(
                f"the ground truth has {keyframe.labels.shape} cells, the bundle's grid {bundle.grid.shape}; "
                "evaluate a bundle of the same grid"
            )
    return Plan(
        arguments.bag,
        bundle,
        arguments.mode,
        (arguments.rate or 1.0) if arguments.mode == REALTIME else None,
        inputs,
        anchor_camera,
        keyframes,
        truth,
        _node_parameters(arguments, bundle, inputs, anchor_camera, given),
        span_ns,
    )


def default_anchor(bundle: Bundle) -> str:
    """The camera whose stamp a set carries unless another is named: the front camera, as in training."""
    return "CAM_FRONT" if "CAM_FRONT" in bundle.cameras else bundle.cameras[0]


def _given_parameters(assignments: Sequence[str]) -> dict[str, object]:
    given = {}
    for assignment in assignments:
        name, separator, value = assignment.partition(":=")
        if not separator:
            raise OccflownetError(f"--param {assignment} is not NAME:=VALUE; write e.g. --param deadline_ms:=150")
        try:
            given[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise OccflownetError(f"--param {assignment}: {value} is no value; quote strings that hold signs") from None
    return given


def _node_parameters(
    arguments: argparse.Namespace,
    bundle: Bundle,
    inputs: NodeInputs,
    anchor_camera: str,
    given: Mapping[str, object],
) -> dict[str, object]:
    """The node's parameters that differ from its defaults; writes the bag's calibration to ``--out`` if it is needed."""
    calibration = arguments.calibration
    if calibration is None and (arguments.bag / "calibration.yaml").is_file():
        calibration = arguments.bag / "calibration.yaml"
    if calibration is None and inputs.infos:
        # The player sends no transforms: the node gets the bag's own as a file.
        calibration = arguments.out / "calibration.yaml"
        base_frame = Settings.from_values(given).base_frame
        save_bags_rig(arguments.bag, inputs, bundle.cameras, base_frame, calibration)
    if calibration is None:
        raise BagError(
            f"bag {arguments.bag} has no camera_info of every camera; give the cameras' intrinsics and extrinsics with "
            "--calibration FILE"
        )
    parameters: dict[str, object] = {
        **(LOCKSTEP_PARAMETERS if arguments.mode == LOCKSTEP else {}),
        "bundle": str(arguments.bundle),
        "anchor_camera": anchor_camera,
        "image_transport": inputs.image_transport,
        "odom_topic": inputs.odometry,
        "calibration_file": str(calibration),
        "intrinsics_source": "camera_info" if inputs.infos else "calibration_file",
    }
    if arguments.mode == REALTIME and (arguments.rate or 1.0) != 1.0:
        parameters["use_sim_time"] = True  # deadlines then count in the bag's time
    parameters = {**parameters, **given}
    Settings.from_values({name: value for name, value in parameters.items() if name != "use_sim_time"})
    return parameters
