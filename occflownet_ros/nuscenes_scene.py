# SPDX-License-Identifier: Apache-2.0
"""One scene of a nuScenes-format data set as plain records, read through nuscenes-devkit's tables."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import DatasetError, ImageError
from occflownet_core.poses import RecordedPose
from occflownet_core.preprocess import require_complete_jpeg

if TYPE_CHECKING:
    from nuscenes.nuscenes import NuScenes

LIDAR = "LIDAR_TOP"
LIDAR_POINT_BYTES = 20  # float32 x, y, z, intensity, ring
_TABLES = [
    "attribute",
    "calibrated_sensor",
    "category",
    "ego_pose",
    "instance",
    "log",
    "map",
    "sample",
    "sample_annotation",
    "sample_data",
    "scene",
    "sensor",
    "visibility",
]


@dataclass(frozen=True)
class SensorFrame:
    """One measurement: where its file is, when it was taken, and from where (poses in the tables' own numbers)."""

    channel: str
    modality: str
    stamp_ns: int
    path: Path
    width_px: int
    height_px: int
    intrinsic: np.ndarray | None
    mount: RecordedPose
    ego: RecordedPose
    lidarseg_path: Path | None = None

    @property
    def ego_from_sensor(self) -> np.ndarray:
        """[4, 4]."""
        return self.mount.matrix

    @property
    def global_from_ego(self) -> np.ndarray:
        """[4, 4] at the sensor's own stamp."""
        return self.ego.matrix

    def camera(self) -> Camera:
        return Camera(self.channel, self.width_px, self.height_px, self.intrinsic, self.ego_from_sensor)


@dataclass(frozen=True)
class Keyframe:
    """An annotated sample: its token, LIDAR_TOP's stamp, and its Occ3D labels where there are any."""

    token: str
    stamp_ns: int
    labels_path: Path | None


@dataclass
class Scene:
    """All measurements of a scene in time order, with what a user should know about what is missing."""

    name: str
    frames: list[SensorFrame]
    keyframes: list[Keyframe]
    notes: list[str] = field(default_factory=list)

    @property
    def channels(self) -> dict[str, SensorFrame]:
        """The first measurement of each sensor."""
        return {frame.channel: frame for frame in reversed(self.frames)}

    @property
    def rig(self) -> CameraRig:
        cameras = [frame.camera() for frame in self.channels.values() if frame.modality == "camera"]
        return CameraRig(tuple(sorted(cameras, key=lambda camera: camera.name)))

    @property
    def ego_poses(self) -> dict[int, RecordedPose]:
        """The vehicle's pose at every sensor's own stamp (nanoseconds), in time order."""
        return {frame.stamp_ns: frame.ego for frame in self.frames}


def open_nuscenes(dataroot: Path, version: str) -> NuScenes:
    """The devkit's view of a data root.

    Raises:
        DatasetError: the devkit is not installed, or the root lacks its tables or holds unreadable ones.
    """
    try:
        from nuscenes.nuscenes import NuScenes
    except ImportError:
        raise DatasetError("nuscenes-devkit is not installed; run: pip install nuscenes-devkit") from None
    folder = dataroot / version
    missing = [name for name in _TABLES if not (folder / f"{name}.json").is_file()]
    if missing:
        raise DatasetError(
            f"{folder} lacks the nuScenes tables {', '.join(missing)}; "
            "give the folder that holds samples/ and the version's tables, and its --version"
        )
    try:
        return NuScenes(version, str(dataroot), verbose=False)
    except (AssertionError, KeyError, TypeError, ValueError, OSError) as error:
        raise DatasetError(f"the nuScenes tables in {folder} cannot be read ({error}); unpack them again") from None


def read_scene(nusc: NuScenes, name: str, sweeps: bool = True) -> Scene:
    """A scene's camera, LiDAR and radar measurements, keyframes and (where they are on the disk) sweeps.

    Raises:
        DatasetError: there is no such scene, it has no images, a table row is missing, or a keyframe's file is.
    """
    record = next((scene for scene in nusc.scene if scene["name"] == name), None)
    if record is None:
        names = ", ".join(sorted(scene["name"] for scene in nusc.scene)) or "none"
        raise DatasetError(f"scene {name} is not in {nusc.dataroot} {nusc.version}; it has {names}")
    try:
        samples = {s["token"]: s for s in nusc.sample if s["scene_token"] == record["token"]}
        rows = [row for row in nusc.sample_data if row["sample_token"] in samples]
        frames, absent = _frames(nusc, rows, sweeps)
        keyframes = _keyframes(nusc, name, samples, rows)
    except KeyError as error:
        raise DatasetError(f"scene {name} refers to {error}, which the tables do not hold; unpack them again") from None
    scene = Scene(name, frames, keyframes)
    if not any(frame.modality == "camera" for frame in frames):
        raise DatasetError(f"scene {name} has no camera images; choose another scene")
    scene.notes = _notes(scene, absent)
    return scene


def _frames(nusc: NuScenes, rows: list[dict], sweeps: bool) -> tuple[list[SensorFrame], Counter]:
    """Measurements in time order; how many sweeps of each channel the tables list but the disk lacks."""
    frames, absent = [], Counter()
    for row in rows:
        path = Path(nusc.dataroot) / row["filename"]
        mount = nusc.get("calibrated_sensor", row["calibrated_sensor_token"])
        if not row["is_key_frame"] and not sweeps:
            continue
        # Radar points go into no topic: only their stamps and poses are used, so their files may be absent.
        if row["sensor_modality"] != "radar" and not path.is_file():
            if row["is_key_frame"]:
                raise DatasetError(f"{path} is missing; download the blob that holds it")
            absent[row["channel"]] += 1
            continue
        ego = nusc.get("ego_pose", row["ego_pose_token"])
        frames.append(
            SensorFrame(
                channel=row["channel"],
                modality=row["sensor_modality"],
                stamp_ns=row["timestamp"] * 1000,
                path=path,
                width_px=row["width"],
                height_px=row["height"],
                intrinsic=np.array(mount["camera_intrinsic"]) if mount["camera_intrinsic"] else None,
                mount=RecordedPose(mount["translation"], mount["rotation"]),
                ego=RecordedPose(ego["translation"], ego["rotation"]),
                lidarseg_path=_lidarseg_path(nusc, row["token"]),
            )
        )
    return sorted(frames, key=lambda frame: (frame.stamp_ns, frame.channel)), absent


def _lidarseg_path(nusc: NuScenes, token: str) -> Path | None:
    listed = "lidarseg" in nusc.table_names and token in nusc._token2ind["lidarseg"]
    return Path(nusc.dataroot) / nusc.get("lidarseg", token)["filename"] if listed else None


def _keyframes(nusc: NuScenes, scene: str, samples: dict[str, dict], rows: list[dict]) -> list[Keyframe]:
    # A sample's own timestamp is its LIDAR_TOP's, also where that measurement is not in the tables.
    stamps = {token: sample["timestamp"] * 1000 for token, sample in samples.items()}
    for row in rows:
        if row["is_key_frame"] and row["channel"] == LIDAR:
            stamps[row["sample_token"]] = row["timestamp"] * 1000
    keyframes = []
    for token, stamp_ns in sorted(stamps.items(), key=lambda item: item[1]):
        labels = Path(nusc.dataroot) / "gts" / scene / token / "labels.npz"
        keyframes.append(Keyframe(token, stamp_ns, labels if labels.is_file() else None))
    return keyframes


def _notes(scene: Scene, absent: Counter) -> list[str]:
    notes = []
    if LIDAR not in scene.channels:
        notes.append(f"{scene.name} has no {LIDAR} data: the bag holds cameras and odometry only")
    if absent:
        what = ", ".join(f"{count} of {channel}" for channel, count in sorted(absent.items()))
        notes.append(f"sweeps that the tables list are not on the disk and are left out: {what}")
    labelled = sum(keyframe.labels_path is not None for keyframe in scene.keyframes)
    if labelled == 0:
        notes.append(f"there are no Occ3D labels (gts/{scene.name}): the bag holds no ground truth")
    elif labelled < len(scene.keyframes):
        notes.append(f"{labelled} of {len(scene.keyframes)} keyframes have Occ3D labels (gts/{scene.name})")
    for channel, first in scene.channels.items():
        mounts = (frame.ego_from_sensor for frame in scene.frames if frame.channel == channel)
        if not all(np.array_equal(mount, first.ego_from_sensor) for mount in mounts):
            notes.append(f"{channel} moves on the vehicle during the scene: /tf_static holds its first pose")
    return notes


def read_jpeg(frame: SensorFrame) -> bytes:
    """The image file as it is.

    Raises:
        DatasetError: it is empty, no JPEG, or cut short.
    """
    data = frame.path.read_bytes()
    if data[:2] != b"\xff\xd8":
        raise DatasetError(f"{frame.path} is not a JPEG; unpack it again")
    try:
        require_complete_jpeg(np.frombuffer(data, dtype=np.uint8))
    except ImageError as error:
        raise DatasetError(f"{frame.path}: {error}; unpack it again") from None
    return data


def read_points(frame: SensorFrame) -> np.ndarray:
    """float32 [n, 5]: x, y, z in the sensor's frame (metres), intensity, ring.

    Raises:
        DatasetError: the file is empty or ends in the middle of a point.
    """
    data = frame.path.read_bytes()
    if not data or len(data) % LIDAR_POINT_BYTES:
        raise DatasetError(
            f"{frame.path} has {len(data)} bytes, not a multiple of {LIDAR_POINT_BYTES}: it was cut short; unpack it again"
        )
    return np.frombuffer(data, dtype="<f4").reshape(-1, 5)


def read_lidarseg(frame: SensorFrame, points: int) -> np.ndarray | None:
    """nuScenes-lidarseg index uint8 [n] of each of a sweep's points, None where the tables list none.

    Raises:
        DatasetError: the file is missing, or for another number of points.
    """
    if frame.lidarseg_path is None:
        return None
    try:
        labels = np.fromfile(frame.lidarseg_path, dtype=np.uint8)
    except OSError as error:
        raise DatasetError(
            f"lidarseg labels {frame.lidarseg_path} cannot be read ({error.strerror}); unpack them again"
        ) from None
    if len(labels) != points:
        raise DatasetError(
            f"lidarseg labels {frame.lidarseg_path} are for {len(labels)} points and {frame.path} has {points}; "
            "unpack both again"
        )
    return labels


def read_labels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Occ3D's ``semantics`` and ``mask_camera``, uint8 [X, Y, Z].

    Raises:
        DatasetError: the file is cut short, lacks one of them, or they differ in shape.
    """
    try:
        with np.load(path) as file:
            semantics, mask = file["semantics"].astype(np.uint8), file["mask_camera"].astype(np.uint8)
    except Exception as error:
        raise DatasetError(f"{path} cannot be read ({error}); unpack it again") from None
    if semantics.ndim != 3 or semantics.shape != mask.shape:
        raise DatasetError(
            f"{path}: semantics {semantics.shape} and mask_camera {mask.shape} are not one grid [X, Y, Z]"
        )
    return semantics, mask
