# SPDX-License-Identifier: Apache-2.0
"""The model bundle: one folder with a graph, what a vehicle must know to run it, and a hash of every file.

my_bundle/
    bundle.yaml            everything below, readable by a person
    model.onnx             the deployment graph
    field.onnx             optional: the graph of queries, which reads what model.onnx hands out as ``field_features``
    weights.safetensors    optional: the weights, for the torch engine
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from occflownet_core.errors import BundleError, GeometryError
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import CLASS_NAMES
from occflownet_core.lift_tables import DepthBins, LiftSpec
from occflownet_core.preprocess import ImageTransform

FORMAT_VERSION = 1
DESCRIPTION = "bundle.yaml"
GRAPH = "model.onnx"
FIELD_GRAPH = "field.onnx"
WEIGHTS = "weights.safetensors"
FIELD_FEATURES = "field_features"
"""The output of the deployment graph that the graph of queries reads."""

CPU, TENSORRT = "cpu", "tensorrt"
TARGETS = (CPU, TENSORRT)
"""What a graph in eight bits is made for."""

_OPTIONAL = frozenset({FIELD_GRAPH, WEIGHTS})
_HASH_DIGITS_SHOWN = 12


@dataclass(frozen=True)
class RecurrentState:
    """A graph output that is the same-named-by-contract input of the next run; zeros mean "no memory".

    Attributes:
        input, output: names of the graph's input and output.
        shape: of both.
        dtype: NumPy name, e.g. ``float32``.
    """

    input: str
    output: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Bundle:
    """A model and what a vehicle must know to run it.

    Attributes:
        directory: where its files lie.
        name: of the model.
        cameras: camera names, in the order in which the graph takes the images.
        image_width_px, image_height_px: size of the graph's images.
        grid: the grid of the labels.
        lift: shapes for ``build_lift_tables``.
        occupancy_threshold: a voxel is occupied where its occupancy probability is above; tuned on a validation split.
        recurrent: memory that the engine carries from run to run.
        outputs: names of the graph's other outputs (``labels`` always; ``occupancy_probability`` where present).
        field_channels: features per working cell that the graph hands out for queries; 0 where there are no queries.
        model: the network's configuration (``ModelConfig`` as plain values), for rebuilding it.
        provenance: how it was trained, in free words and values.
        metrics: what was measured, in free words and values; of a quantised model, before it was.
        quantisation: how the graph was brought to eight bits (``target``, ``data``, ``frames``, ``date``); empty where it was not.
    """

    directory: Path
    name: str
    cameras: tuple[str, ...]
    image_width_px: int
    image_height_px: int
    grid: VoxelGrid
    lift: LiftSpec
    occupancy_threshold: float
    recurrent: tuple[RecurrentState, ...] = ()
    outputs: tuple[str, ...] = ("labels",)
    field_channels: int = 0
    model: dict = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    quantisation: dict = field(default_factory=dict)

    @property
    def graph_path(self) -> Path:
        return self.directory / GRAPH

    @property
    def field_graph_path(self) -> Path | None:
        """The graph of queries, or None where the bundle carries none."""
        return self.directory / FIELD_GRAPH if self.field_channels else None

    @property
    def field_features_shape(self) -> tuple[int, ...]:
        """Of ``field_features``: [1, Z, Y, X, C] on the working grid."""
        return (1, *self.lift.grid.shape[::-1], self.field_channels)

    @property
    def weights_path(self) -> Path | None:
        """The weights' file, or None where the bundle carries none."""
        path = self.directory / WEIGHTS
        return path if path.exists() else None

    def image_transform(self, source_width_px: int, source_height_px: int) -> ImageTransform:
        """How a camera's image of the given size becomes the graph's."""
        return ImageTransform.fit(source_width_px, source_height_px, self.image_width_px, self.image_height_px)


def write_bundle(bundle: Bundle, files: Mapping[str, bytes]) -> None:
    """Write the bundle's folder; an older bundle there is replaced, the description last.

    Args:
        bundle: what goes into ``bundle.yaml``; ``bundle.directory`` is created.
        files: content of ``model.onnx``, of ``field.onnx`` if there are queries, and of ``weights.safetensors`` if wanted.

    Raises:
        BundleError: ``model.onnx`` is not among the files, a file is missing or too much, or the folder cannot be written.
    """
    if problem := _wrong_files(set(files), bundle.field_channels):
        raise BundleError(f"{problem}, got {', '.join(sorted(files)) or 'nothing'}")
    description = {
        "format_version": FORMAT_VERSION,
        "name": bundle.name,
        "provenance": bundle.provenance,
        "metrics": bundle.metrics,
        **({"quantisation": bundle.quantisation} if bundle.quantisation else {}),
        "occupancy_threshold": float(bundle.occupancy_threshold),
        "cameras": list(bundle.cameras),
        "image": {"width_px": bundle.image_width_px, "height_px": bundle.image_height_px},
        "grid": bundle.grid.to_dict(),
        "lift": {**asdict(bundle.lift), "grid": bundle.lift.grid.to_dict()},
        "classes": list(CLASS_NAMES),
        "outputs": list(bundle.outputs),
        "field_channels": bundle.field_channels,
        "recurrent": [{**asdict(state), "shape": list(state.shape)} for state in bundle.recurrent],
        "model": bundle.model,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    try:
        bundle.directory.mkdir(parents=True, exist_ok=True)
        for name in {DESCRIPTION, *_OPTIONAL} - set(files):
            (bundle.directory / name).unlink(missing_ok=True)
        for name, content in files.items():
            _write(bundle.directory / name, content)
        text = yaml.safe_dump(description, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)
        _write(bundle.directory / DESCRIPTION, text.encode())
    except (OSError, yaml.YAMLError) as error:
        raise BundleError(f"bundle {bundle.directory} cannot be written: {_first_line(error)}") from None


def load_bundle(path: str | Path) -> Bundle:
    """Read a bundle and check that it is whole, unaltered and of a kind this version runs.

    Args:
        path: the bundle's folder.

    Raises:
        BundleError: the folder or a file is missing, a file was altered, the description is malformed, or the format
            or the classes are not this version's.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise BundleError(f"there is no model bundle at {directory}; give the folder that holds {DESCRIPTION}")
    description = _read_description(directory / DESCRIPTION)
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(
            f"bundle {directory} has format version {version}, this program reads {FORMAT_VERSION}; "
            "export the model again with this version, or update the program"
        )
    try:
        bundle = _bundle(directory, description)
        hashes = {str(name): str(digest) for name, digest in description["sha256"].items()}
    except KeyError as error:
        raise BundleError(
            f"{directory / DESCRIPTION} lacks the entry {error.args[0]!r}; export the model again"
        ) from None
    except (TypeError, ValueError, AttributeError, GeometryError) as error:
        raise BundleError(f"{directory / DESCRIPTION} holds a wrong value ({error}); export the model again") from None
    _require_our_classes(directory, description.get("classes"))
    _require_whole_stride(bundle)
    _require_unaltered(bundle, hashes)
    return bundle


def _bundle(directory: Path, d: dict) -> Bundle:
    lift = dict(d["lift"])
    return Bundle(
        directory=directory,
        name=str(d["name"]),
        cameras=tuple(str(name) for name in d["cameras"]),
        image_width_px=int(d["image"]["width_px"]),
        image_height_px=int(d["image"]["height_px"]),
        grid=VoxelGrid(**d["grid"]),
        lift=LiftSpec(
            grid=VoxelGrid(**lift["grid"]),
            depth_bins=DepthBins(**lift["depth_bins"]),
            feature_height=int(lift["feature_height"]),
            feature_width=int(lift["feature_width"]),
            slots=int(lift["slots"]),
            reference_focal_px=lift["reference_focal_px"],
            method=str(lift.get("method", "gather")),
            knows_cameras=bool(lift.get("knows_cameras", False)),
        ),
        occupancy_threshold=float(d["occupancy_threshold"]),
        recurrent=tuple(
            RecurrentState(str(s["input"]), str(s["output"]), tuple(int(n) for n in s["shape"]), str(s["dtype"]))
            for s in d["recurrent"]
        ),
        outputs=tuple(str(name) for name in d["outputs"]),
        field_channels=int(d.get("field_channels", 0)),
        model=dict(d.get("model") or {}),
        provenance=dict(d.get("provenance") or {}),
        metrics=dict(d.get("metrics") or {}),
        quantisation=dict(d.get("quantisation") or {}),
    )


def _read_description(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{path.parent} holds no {DESCRIPTION}; give the folder of a model bundle") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BundleError(f"{path} cannot be read as YAML ({_first_line(error)}); export the model again") from None
    if not isinstance(content, dict):
        raise BundleError(f"{path} holds no table of entries; export the model again")
    return content


def _require_our_classes(directory: Path, classes: object) -> None:
    if classes == list(CLASS_NAMES):
        return
    theirs = classes if isinstance(classes, list) else []
    pairs = enumerate(zip(theirs, CLASS_NAMES, strict=False))
    what = next((f"class {i} is {a!r} where this program has {b!r}" for i, (a, b) in pairs if a != b), None)
    what = what or f"it has {len(theirs)} classes where this program has {len(CLASS_NAMES)}"
    raise BundleError(f"bundle {directory} was made for other classes: {what}; use a model of the Occ3D classes")


def _require_whole_stride(bundle: Bundle) -> None:
    """Refuse an image size that its own feature map does not divide: no camera could ever be prepared for it."""
    lift, image = bundle.lift, f"{bundle.image_width_px} x {bundle.image_height_px}"
    features = lift.feature_width, lift.feature_height
    whole = min(features) > 0 and not (bundle.image_width_px % features[0] or bundle.image_height_px % features[1])
    if not whole or bundle.image_width_px // features[0] != bundle.image_height_px // features[1]:
        raise BundleError(
            f"{bundle.directory / DESCRIPTION} has images of {image} px and a feature map of {features[0]} x {features[1]}, "
            "which do not go together; export the model again"
        )


def _wrong_files(names: set[str], field_channels: int) -> str:
    """What a bundle must hold, where these are not its files; empty where they are."""
    needed = {GRAPH, FIELD_GRAPH} if field_channels else {GRAPH}
    if needed <= names <= needed | {WEIGHTS}:
        return ""
    return f"a bundle holds {GRAPH}, {FIELD_GRAPH if field_channels else f'no {FIELD_GRAPH}'} and maybe {WEIGHTS}"


def _require_unaltered(bundle: Bundle, hashes: Mapping[str, str]) -> None:
    directory = bundle.directory
    if problem := _wrong_files(set(hashes), bundle.field_channels):
        raise BundleError(
            f"{directory / DESCRIPTION} lists hashes of {', '.join(sorted(hashes)) or 'nothing'}; "
            f"{problem}: export the model again"
        )
    for name in sorted(_OPTIONAL - set(hashes)):
        if (directory / name).exists():
            raise BundleError(
                f"{directory / name} does not belong to the bundle (it has no hash in {DESCRIPTION}); delete it"
            )
    for name, expected in hashes.items():
        try:
            actual = hashlib.sha256((directory / name).read_bytes()).hexdigest()
        except OSError as error:
            raise BundleError(
                f"bundle {directory} lacks {name} ({error.strerror}); copy the whole folder again"
            ) from None
        if actual != expected:
            raise BundleError(
                f"{directory / name} was altered or cut short: its sha256 starts with {actual[:_HASH_DIGITS_SHOWN]}, "
                f"{DESCRIPTION} says {expected[:_HASH_DIGITS_SHOWN]}; copy the whole folder again"
            )


def _write(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves either the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
