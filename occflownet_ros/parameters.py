# SPDX-License-Identifier: Apache-2.0
"""Every parameter of the node, in one table: name, type, default, limits, unit and a sentence. No ROS."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from occflownet_core.errors import OccflownetError
from occflownet_core.labels import CLASS_NAMES, FREE
from occflownet_core.runtime.engine import PRECISIONS
from occflownet_core.runtime.factory import BACKENDS

_WORD = r"[A-Za-z_]\w*"
_SHOWN = {"()": "[]", "": '""'}
_TOPIC = re.compile(rf"(~/|/)?{_WORD}(/{_WORD})*", re.ASCII)


class ParameterError(OccflownetError):
    """A parameter's value cannot be used."""


def _parameter(
    default: object,
    text: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    is_topic: bool = False,
    live: bool = False,
) -> object:
    """A row of the table; ``live`` parameters may change while the node is configured."""
    limits = {"unit": unit, "low": low, "high": high, "choices": choices, "is_topic": is_topic}
    limits |= {"text": text, "live": live}
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata={**limits, "default": default})
    return field(default=default, metadata={**limits, "default": default})


@dataclass(frozen=True)
class Settings:
    """The node's parameters. Each field is a row of the table: its metadata holds text, unit, limits and choices."""

    bundle: str = _parameter("", "Folder of the model bundle; required.")
    backend: str = _parameter(
        "auto",
        "Inference engine; auto takes the fastest installed (onnxruntime without a provider: its fastest but TensorRT).",
        choices=BACKENDS,
    )
    precision: str = _parameter(
        "fp32",
        "Precision that the engine computes in; fp16 is for GPUs: compare first what the model loses.",
        choices=PRECISIONS,
    )
    engine_cache: str = _parameter(
        "", "Folder of engines that TensorRT built for this machine; empty means ~/.cache/occflownet/engines."
    )
    build_only: bool = _parameter(
        False, "Configuring only builds the TensorRT engine (minutes), says where it is and ends the node."
    )
    threads: int = _parameter(0, "Threads of the inference engine; 0 lets it choose.", low=0, high=256)
    base_frame: str = _parameter("base_link", "Ego frame: extrinsics are relative to it, outputs are expressed in it.")
    camera_namespaces: tuple[str, ...] = _parameter(
        (),
        "Namespace of each camera, in the bundle's order; empty means /<camera name> of the bundle.",
        is_topic=True,
    )
    anchor_camera: str = _parameter(
        "", "Camera (name in the bundle) whose image opens a set and gives its stamp; empty means the bundle's first."
    )
    image_transport: str = _parameter(
        "compressed",
        "Subscribe to compressed or to raw images: image_rect_compressed or image_rect (see rectify).",
        choices=("compressed", "raw"),
    )
    rectify: bool = _parameter(
        False,
        "Images are as the sensor saw them (image_raw, image_raw/compressed): take out the distortion that camera_info "
        "describes. Otherwise they are taken as rectified.",
    )
    image_reliability: str = _parameter(
        "best_effort", "QoS reliability of the image subscriptions.", choices=("best_effort", "reliable")
    )
    image_depth: int = _parameter(4, "QoS queue depth of each image subscription.", low=1, high=100)
    decode_threads: int = _parameter(0, "Threads that decode images; 0 means one per core.", low=0, high=64)
    max_camera_time_diff_ms: float = _parameter(
        60.0,
        "An image further from the anchor's stamp never joins its set; best below the camera period.",
        unit="ms",
        low=0.0,
        high=10000.0,
        live=True,
    )
    deadline_ms: float = _parameter(
        100.0,
        "How long a set waits for its images after the anchor's arrival (in bag time under use_sim_time).",
        unit="ms",
        low=1.0,
        high=60000.0,
        live=True,
    )
    missing_cameras: str = _parameter(
        "drop",
        "At the deadline, drop an incomplete set or run it with the absent cameras masked.",
        choices=("drop", "mask"),
        live=True,
    )
    calibration_file: str = _parameter(
        "", "YAML file with the cameras' extrinsics (and intrinsics); empty means extrinsics from /tf_static."
    )
    intrinsics_source: str = _parameter(
        "camera_info",
        "Where intrinsics come from; calibration_file makes the node independent of camera_info.",
        choices=("camera_info", "calibration_file"),
    )
    calibration_timeout_s: float = _parameter(
        5.0,
        "After this long without a camera_info or an extrinsic the node warns and names what is missing.",
        unit="s",
        low=0.1,
        high=3600.0,
    )
    ego_motion: str = _parameter(
        "odometry",
        "Where the vehicle's motion comes from: odom_topic, tf (odom_frame to base_frame), or nowhere: without memory.",
        choices=("odometry", "tf", "none"),
    )
    odom_topic: str = _parameter(
        "/odom", "Topic of nav_msgs/Odometry of the base frame; empty is ego_motion none.", is_topic=True
    )
    odom_frame: str = _parameter("odom", "With ego_motion tf: frame that stands still and in which base_frame moves.")
    odom_reliability: str = _parameter(
        "best_effort",
        "QoS reliability of the subscription to odom_topic or /tf; best_effort matches every publisher.",
        choices=("best_effort", "reliable"),
    )
    odom_max_gap_ms: float = _parameter(
        200.0,
        "Poses further apart are not interpolated between, nor extrapolated beyond.",
        unit="ms",
        low=1.0,
        high=10000.0,
        live=True,
    )
    odom_wait_ms: float = _parameter(
        20.0,
        "How long a complete set waits for odometry that reaches its stamp, before extrapolating.",
        unit="ms",
        low=0.0,
        high=1000.0,
        live=True,
    )
    memory_max_gap_s: float = _parameter(
        2.0, "A longer time between two sets resets the memory.", unit="s", low=0.01, high=60.0, live=True
    )
    max_speed_mps: float = _parameter(
        60.0, "Faster ego motion counts as a jump and resets the memory.", unit="m/s", low=0.1, high=1000.0, live=True
    )
    max_yaw_rate_rps: float = _parameter(
        3.0, "Faster turning counts as a jump and resets the memory.", unit="rad/s", low=0.01, high=100.0, live=True
    )
    occupancy_threshold: float = _parameter(
        -1.0,
        "A voxel above this probability is occupied; negative takes the bundle's tuned value.",
        low=-1.0,
        high=1.0,
        live=True,
    )
    occupancy_max_rate_hz: float = _parameter(
        0.0, "Limit of ~/occupancy; 0 publishes every set.", unit="Hz", low=0.0, high=1000.0, live=True
    )
    voxels_max_rate_hz: float = _parameter(
        5.0, "Limit of ~/voxels; 0 publishes every set.", unit="Hz", low=0.0, high=1000.0, live=True
    )
    labels_max_rate_hz: float = _parameter(
        0.0, "Limit of ~/labels; 0 publishes every set.", unit="Hz", low=0.0, high=1000.0, live=True
    )
    costmap_max_rate_hz: float = _parameter(
        0.0, "Limit of ~/costmap; 0 publishes every set.", unit="Hz", low=0.0, high=1000.0, live=True
    )
    costmap_min_height_m: float = _parameter(
        0.2, "Voxels whose centre is lower do not block.", unit="m", low=-100.0, high=100.0, live=True
    )
    costmap_max_height_m: float = _parameter(
        2.2, "Voxels whose centre is higher do not block.", unit="m", low=-100.0, high=100.0, live=True
    )
    costmap_blocking_classes: tuple[str, ...] = _parameter(
        (),
        "Classes that block the cost map inside the band; empty means all but driveable_surface, other_flat, sidewalk and "
        "terrain.",
        choices=CLASS_NAMES[:FREE],
        live=True,
    )
    voxel_alpha: float = _parameter(0.9, "Opacity of the voxel markers.", low=0.0, high=1.0, live=True)
    voxel_coloring: str = _parameter(
        "class",
        "What colours the voxel markers: their class, or their height (Turbo map from the grid's bottom to its top).",
        choices=("class", "height"),
        live=True,
    )
    depth_max_rate_hz: float = _parameter(
        5.0,
        "Limit of ~/depth, for all cameras together; 0 publishes every set.",
        unit="Hz",
        low=0.0,
        high=1000.0,
        live=True,
    )
    depth_width_px: int = _parameter(
        176,
        "Width of the depth images, at most the camera's own; the height keeps the camera's aspect ratio.",
        unit="px",
        low=8,
        high=640,
        live=True,
    )
    mesh_max_rate_hz: float = _parameter(
        1.0, "Limit of ~/mesh; 0 meshes every set, as far as there is time.", unit="Hz", low=0.0, high=1000.0, live=True
    )
    mesh_budget_ms: float = _parameter(
        500.0, "Time for a mesh; its cells become as small as that allows.", unit="ms", low=1.0, high=60000.0, live=True
    )
    mesh_cell_m: float = _parameter(
        0.2, "Cells of the mesh are halved until they are no larger.", unit="m", low=0.05, high=10.0, live=True
    )

    @classmethod
    def from_values(cls, values: Mapping[str, object]) -> Settings:
        """Settings from parameter values; what is not given keeps its default.

        Raises:
            ParameterError: an unknown name, a value of the wrong type, or one outside its limits.
        """
        rows = {row.name: row for row in fields(cls)}
        for name in values:
            if name not in rows:
                raise ParameterError(unknown_parameter(name))
        settings = cls(**{name: _checked(rows[name], value) for name, value in values.items()})
        settings._check_together()
        return settings

    def threshold(self, tuned: float) -> float:
        """The occupancy threshold in force; ``tuned`` is the bundle's."""
        return self.occupancy_threshold if self.occupancy_threshold >= 0 else tuned

    @property
    def engine_folder(self) -> Path | None:
        """Where engines lie; None for the usual place."""
        return Path(self.engine_cache).expanduser() if self.engine_cache else None

    @property
    def follows(self) -> str:
        """What ego motion comes from in the end: odometry, tf or none."""
        return "none" if self.ego_motion == "odometry" and not self.odom_topic else self.ego_motion

    def _check_together(self) -> None:
        if self.build_only and self.backend not in ("auto", "tensorrt"):
            raise ParameterError(
                f"build_only builds an engine of the backend tensorrt, and backend is {self.backend}; set it to tensorrt"
            )
        if self.costmap_min_height_m >= self.costmap_max_height_m:
            raise ParameterError(
                f"costmap_min_height_m is {self.costmap_min_height_m:g} and costmap_max_height_m "
                f"{self.costmap_max_height_m:g}; the first must be lower"
            )
        if self.ego_motion == "tf" and self.odom_frame in ("", self.base_frame):
            raise ParameterError(
                f"odom_frame is '{self.odom_frame}' and base_frame '{self.base_frame}'; "
                "ego motion from tf is that of one frame in another: name both"
            )
        if self.rectify and self.intrinsics_source == "calibration_file":
            raise ParameterError(
                "rectify needs the distortion of camera_info, and intrinsics_source is calibration_file; "
                "use camera_info, or send rectified images"
            )
        if self.intrinsics_source == "calibration_file" and not self.calibration_file:
            raise ParameterError("intrinsics_source is calibration_file, but calibration_file is empty; name a file")


NAMES: tuple[str, ...] = tuple(row.name for row in fields(Settings))
LIVE: frozenset[str] = frozenset(row.name for row in fields(Settings) if row.metadata["live"])
"""Parameters that take effect while the node is configured or active; the others need a cleanup first."""

EVERY_SET = {"deadline_ms": 10_000.0, "image_reliability": "reliable", "odom_reliability": "reliable"}
"""Node parameters for replays that want every set, however busy the machine is; a vehicle's defaults drop late ones."""

LOCKSTEP = {**EVERY_SET, "odom_wait_ms": 1000.0, "memory_max_gap_s": 60.0}
"""Values for replays keyframe by keyframe: besides, a set waits for its pose, and the memory outlives the time between two."""


def check_value(name: str, value: object) -> None:
    """Check a parameter's value by itself.

    Raises:
        ParameterError: it is of the wrong type, or outside its limits.
    """
    _checked({row.name: row for row in fields(Settings)}[name], value)


def defaults() -> dict[str, object]:
    """ROS values of the defaults, by name, in the table's order (tuples as lists; ROS has no empty string list)."""
    return {
        row.name: list(d) or [""] if isinstance(d := row.metadata["default"], tuple) else d for row in fields(Settings)
    }


def unknown_parameter(name: str) -> str:
    """The sentence about a name that is not in the table, with the nearest that is."""
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "see docs/topics_and_parameters.md for those that exist"
    return f"there is no parameter '{name}'; {hint}"


def describe(name: str) -> tuple[str, str]:
    """A parameter's sentence (with its unit), and its limits in words."""
    row = {row.name: row for row in fields(Settings)}[name]
    unit = f" [{row.metadata['unit']}]" if row.metadata["unit"] else ""
    return row.metadata["text"] + unit, _limits(row)


def table_markdown() -> str:
    """The table of the documentation."""
    lines = ["| parameter | default | limits | unit | while running | what it does |", "|---|---|---|---|---|---|"]
    for row in fields(Settings):
        default = row.metadata["default"]
        shown = str(default).lower() if isinstance(default, bool) else _SHOWN.get(str(default), str(default))
        live = "changes" if row.metadata["live"] else "fixed"
        cells = (f"`{row.name}`", f"`{shown}`", _limits(row), row.metadata["unit"], live, row.metadata["text"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _limits(row) -> str:
    if row.metadata["choices"]:
        return ", ".join(row.metadata["choices"])
    if row.metadata["low"] is not None:
        return f"{row.metadata['low']:g} to {row.metadata['high']:g}"
    if isinstance(row.metadata["default"], bool):
        return "true, false"
    return "strings" if isinstance(row.metadata["default"], tuple) else "string"


def _checked(row, value: object) -> object:
    default, choices = row.metadata["default"], row.metadata["choices"]
    if isinstance(default, tuple):
        entries = _checked_strings(row.name, value)
        for entry in entries:
            _check_topic(row, entry)
            if choices and entry not in choices:
                raise ParameterError(f"{row.name} has '{entry}'; choose from {', '.join(choices)}")
        return entries
    if isinstance(default, str):
        if not isinstance(value, str):
            raise ParameterError(f"{row.name} is {value!r}; give a string")
        if choices and value not in choices:
            raise ParameterError(f"{row.name} is '{value}'; choose {' or '.join(choices)}")
        if value:
            _check_topic(row, value)
        return value
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ParameterError(f"{row.name} is {value!r}; give true or false")
        return value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or (isinstance(default, int) and value != int(value)):
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise ParameterError(f"{row.name} is {value!r}; give {kind} from {_limits(row)}")
    if not row.metadata["low"] <= value <= row.metadata["high"]:
        raise ParameterError(f"{row.name} is {value:g}; give {row.metadata['unit'] or 'a value'} from {_limits(row)}")
    return type(default)(value)


def _check_topic(row, value: str) -> None:
    if row.metadata["is_topic"] and not _TOPIC.fullmatch(value):
        raise ParameterError(
            f"{row.name} has '{value}', which is no ROS name; give words of letters, digits and _, none beginning with a "
            "digit, with one / between them and none at the end"
        )


def _checked_strings(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(entry, str) for entry in _iterable(name, value)):
        raise ParameterError(f"{name} is {value!r}; give a list of strings")
    entries = tuple(value)
    return () if entries in ((), ("",)) else entries


def _iterable(name: str, value: object) -> list:
    try:
        return list(value)
    except TypeError:
        raise ParameterError(f"{name} is {value!r}; give a list of strings") from None
