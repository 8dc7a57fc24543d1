# SPDX-License-Identifier: Apache-2.0
"""The keyframes of any data root in nuScenes' format: an index made through nuscenes-devkit, and reading its files.

The devkit holds every table as dictionaries (gigabytes for the full data set). The index keeps what training needs of
the chosen scenes, so that loader processes stay small, and lets the devkit go.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from occflownet_core import poses
from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import DatasetError, GeometryError
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import LABEL_FROM_LIDARSEG, LIDARSEG_NAMES
from training.data.splits import scenes_of_split

CAMERAS = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
ANCHOR_CAMERA = "CAM_FRONT"
LIDAR = "LIDAR_TOP"
POINT_FIELDS = 5
"""x, y, z (metres, LiDAR frame), intensity, ring: float32 each in a ``.pcd.bin``."""

_TABLES = (
    *("category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose"),
    *("log", "scene", "sample", "sample_data", "sample_annotation", "map"),
)


@dataclass(frozen=True, eq=False)
class SensorFrame:
    """One recording of one sensor.

    Attributes:
        channel: e.g. ``CAM_FRONT``.
        path: the file.
        stamp_us: when it was taken, microseconds.
        ego_from_sensor: [4, 4] extrinsics.
        global_from_ego: [4, 4] the vehicle's pose at ``stamp_us`` (each sensor has its own).
        intrinsic: [3, 3] pixels, cameras only.
        width_px, height_px: image size, cameras only.
    """

    channel: str
    path: Path
    stamp_us: int
    ego_from_sensor: np.ndarray
    global_from_ego: np.ndarray
    intrinsic: np.ndarray | None = None
    width_px: int = 0
    height_px: int = 0

    @property
    def global_from_sensor(self) -> np.ndarray:
        return self.global_from_ego @ self.ego_from_sensor


@dataclass(frozen=True, eq=False)
class AnnotatedBoxes:
    """The annotated objects of one keyframe.

    Attributes:
        global_from_box: [N, 4, 4] pose of each box: x along its length, z up, origin at its centre.
        size_m: [N, 3] length, width, height (x, y, z of the box).
        label: [N] uint8 class.
        instance: [N] int64, the same number for the same object in every keyframe of the root.
    """

    global_from_box: np.ndarray
    size_m: np.ndarray
    label: np.ndarray
    instance: np.ndarray

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True, eq=False)
class Keyframe:
    """One annotated moment: six images, mostly a LiDAR sweep, and the labels that belong to them.

    Attributes:
        token: of the sample.
        scene: the scene's name.
        split: the split or scenes that it was opened by, for error sentences.
        cameras: in the index's camera order.
        lidar: the LIDAR_TOP sweep, or None.
        lidarseg_path, panoptic_path: labels of the sweep's points, or None where the tables list none.
        occupancy_path: where Occ3D's labels would lie (the file need not exist).
        boxes: annotated objects.
    """

    token: str
    scene: str
    split: str
    cameras: tuple[SensorFrame, ...]
    lidar: SensorFrame | None
    lidarseg_path: Path | None
    panoptic_path: Path | None
    occupancy_path: Path
    boxes: AnnotatedBoxes

    @property
    def anchor(self) -> SensorFrame:
        """The camera whose stamp is the vehicle's reference time at run time: CAM_FRONT, or the first one."""
        return next((camera for camera in self.cameras if camera.channel == ANCHOR_CAMERA), self.cameras[0])

    @property
    def reference(self) -> SensorFrame:
        """The sensor whose stamp the keyframe's ego frame holds for: LIDAR_TOP, as Occ3D's labels and the boxes do.

        The anchor camera, which the vehicle refers to, fires about 35 ms earlier on nuScenes: the two ego frames lie
        0.35 m apart at 10 m/s, nearly one voxel.
        """
        return self.lidar or self.anchor

    @property
    def stamp_us(self) -> int:
        return self.reference.stamp_us

    @property
    def global_from_ego(self) -> np.ndarray:
        return self.reference.global_from_ego

    def rig(self, at_reference: bool = True) -> CameraRig:
        """The cameras as their images are on disk.

        Args:
            at_reference: True moves each camera by what the vehicle drove between its own stamp and the reference's,
                so that its pixels show what lies at ego coordinates of the reference time; False gives the bare
                extrinsics, which are all that a vehicle knows.
        """
        return CameraRig(tuple(self._camera(frame, at_reference) for frame in self.cameras))

    def _camera(self, frame: SensorFrame, at_reference: bool) -> Camera:
        pose = frame.ego_from_sensor
        if at_reference:
            pose = poses.inverse(self.global_from_ego) @ frame.global_from_sensor
        return Camera(frame.channel, frame.width_px, frame.height_px, frame.intrinsic, pose)


class KeyframeIndex:
    """All keyframes of the chosen scenes, scene after scene, in order of time.

    Args:
        dataroot: folder of a data set in nuScenes' format (nuScenes itself, MiniCity).
        version: folder of its tables, e.g. ``v1.0-trainval`` or ``v1.0-mini``.
        split: see ``splits.scenes_of_split``.
        scenes: names of scenes, instead of a split.
        cameras: channels, in the order in which the network sees them.
        labels_folder: folder in the root that has voxel labels in Occ3D's layout.

    Raises:
        DatasetError: the root, a table, the split or a scene is missing, or a keyframe lacks a camera.
    """

    def __init__(
        self,
        dataroot: str | Path,
        version: str = "v1.0-trainval",
        split: str = "all",
        scenes: Sequence[str] | None = None,
        cameras: Sequence[str] = CAMERAS,
        labels_folder: str = "gts",
    ) -> None:
        self.dataroot, self.version, self.labels_folder = Path(dataroot), version, labels_folder
        tables = _open_tables(self.dataroot, version)
        names = scenes_of_split(self.dataroot / version, [s["name"] for s in tables.scene], split, scenes)
        self.split = split if scenes is None else "scenes " + ", ".join(scenes)
        self.cameras = tuple(cameras)
        self._instances = {record["token"]: i for i, record in enumerate(tables.instance)}
        self.scenes: dict[str, range] = {}
        self.keyframes: list[Keyframe] = []
        by_name = {scene["name"]: scene for scene in tables.scene}
        for name in names:
            first = len(self.keyframes)
            token = by_name[name]["first_sample_token"]
            while token:
                sample = tables.get("sample", token)
                self.keyframes.append(self._keyframe(tables, name, sample))
                token = sample["next"]
            self.scenes[name] = range(first, len(self.keyframes))

    def __len__(self) -> int:
        return len(self.keyframes)

    def __getitem__(self, index: int) -> Keyframe:
        return self.keyframes[index]

    def neighbour(self, index: int, offset: int) -> int | None:
        """Index of the keyframe ``offset`` keyframes later in the same scene, or None past the scene's ends."""
        other = index + offset
        return other if other in self.scenes[self.keyframes[index].scene] else None

    def first(self, count: int) -> KeyframeIndex:
        """The index of the first ``count`` keyframes of each scene.

        Raises:
            DatasetError: the count is below 1.
        """
        if count < 1:
            raise DatasetError(f"the first {count} keyframes of each scene are none; ask for at least 1")
        result = copy(self)
        result.scenes, result.keyframes = {}, []
        for name, scene in self.scenes.items():
            start = len(result.keyframes)
            result.keyframes += self.keyframes[scene.start : scene.stop][:count]
            result.scenes[name] = range(start, len(result.keyframes))
        return result

    def _keyframe(self, tables, scene: str, sample: dict) -> Keyframe:
        missing = [channel for channel in self.cameras if channel not in sample["data"]]
        if missing:
            raise DatasetError(
                f"keyframe {sample['token']} of {scene} (split '{self.split}') has no {', '.join(missing)}; "
                "leave the scene out or choose other cameras"
            )
        lidar_token = sample["data"].get(LIDAR)
        return Keyframe(
            token=sample["token"],
            scene=scene,
            split=self.split,
            cameras=tuple(self._sensor_frame(tables, sample["data"][channel]) for channel in self.cameras),
            lidar=self._sensor_frame(tables, lidar_token) if lidar_token else None,
            lidarseg_path=self._point_labels(tables, "lidarseg", lidar_token),
            panoptic_path=self._point_labels(tables, "panoptic", lidar_token),
            occupancy_path=self.dataroot / self.labels_folder / scene / sample["token"] / "labels.npz",
            boxes=self._boxes(tables, sample["anns"]),
        )

    def _sensor_frame(self, tables, token: str) -> SensorFrame:
        data = tables.get("sample_data", token)
        calibration = tables.get("calibrated_sensor", data["calibrated_sensor_token"])
        ego = tables.get("ego_pose", data["ego_pose_token"])
        intrinsic = calibration["camera_intrinsic"]
        try:
            return SensorFrame(
                channel=data["channel"],
                path=self.dataroot / data["filename"],
                stamp_us=data["timestamp"],
                ego_from_sensor=poses.pose(calibration["translation"], calibration["rotation"]),
                global_from_ego=poses.pose(ego["translation"], ego["rotation"]),
                intrinsic=np.array(intrinsic, dtype=np.float64) if intrinsic else None,
                width_px=data["width"] or 0,
                height_px=data["height"] or 0,
            )
        except GeometryError as error:
            raise DatasetError(f"sample_data {token} ({data['filename']}, split '{self.split}'): {error}") from None

    def _point_labels(self, tables, table: str, lidar_token: str | None) -> Path | None:
        if lidar_token is None or lidar_token not in tables.token_index.get(table, ()):
            return None
        return self.dataroot / tables.get(table, lidar_token)["filename"]

    def _boxes(self, tables, tokens: Sequence[str]) -> AnnotatedBoxes:
        records = [tables.get("sample_annotation", token) for token in tokens]
        box_poses = [poses.pose(record["translation"], record["rotation"]) for record in records]
        width_length_height = np.array([record["size"] for record in records], dtype=np.float64).reshape(-1, 3)
        return AnnotatedBoxes(
            global_from_box=np.array(box_poses).reshape(-1, 4, 4),
            size_m=width_length_height[:, [1, 0, 2]],
            label=np.array([label_of_category(record["category_name"]) for record in records], dtype=np.uint8),
            instance=np.array([self._instances[record["instance_token"]] for record in records], dtype=np.int64),
        )


def label_of_category(name: str) -> int:
    """The class of a nuScenes category, e.g. ``vehicle.car`` -> 4; categories without lidarseg index are ``others``."""
    return int(LABEL_FROM_LIDARSEG[LIDARSEG_NAMES.index(name)]) if name in LIDARSEG_NAMES else 0


def read_bytes(path: Path, what: str, keyframe: Keyframe) -> bytes:
    """Content of a keyframe's file.

    Raises:
        DatasetError: the file is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(
            f"{what} {path} of keyframe {keyframe.token} (split '{keyframe.split}') cannot be read "
            f"({error.strerror}); complete the data set"
        ) from None


def load_points(keyframe: Keyframe) -> np.ndarray:
    """The sweep's points, float32 [N, 5]: see ``POINT_FIELDS``.

    Raises:
        DatasetError: there is no sweep, or its file is missing, empty or cut short.
    """
    if keyframe.lidar is None:
        raise DatasetError(
            f"keyframe {keyframe.token} of {keyframe.scene} (split '{keyframe.split}') has no {LIDAR}; "
            "leave the scene out, or take pseudo-labels as the source of rays"
        )
    path = keyframe.lidar.path
    data = read_bytes(path, "point cloud", keyframe)
    if not data or len(data) % (4 * POINT_FIELDS):
        raise DatasetError(
            f"point cloud {path} (split '{keyframe.split}') holds {len(data)} bytes, "
            f"no whole number of points of {4 * POINT_FIELDS}; it was cut short: copy it again"
        )
    return np.frombuffer(data, dtype=np.float32).reshape(-1, POINT_FIELDS)


def load_occupancy(keyframe: Keyframe, grid: VoxelGrid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Occ3D labels uint8 [X, Y, Z], camera mask and LiDAR mask bool [X, Y, Z].

    Raises:
        DatasetError: the file is missing, damaged, or for another grid.
    """
    path = keyframe.occupancy_path
    if not path.is_file():
        raise DatasetError(
            f"occupancy labels {path} are missing (split '{keyframe.split}'); "
            "unpack Occ3D's gts folder into the data root, or work without 3D labels"
        )
    try:
        with np.load(path) as content:
            arrays = [content[name] for name in ("semantics", "mask_camera", "mask_lidar")]
    except Exception as error:  # zip, NumPy and key errors alike mean a damaged file
        raise DatasetError(
            f"occupancy labels {path} (split '{keyframe.split}') are damaged ({error}); copy them again"
        ) from None
    if any(array.shape != grid.shape for array in arrays):
        raise DatasetError(
            f"occupancy labels {path} have shape {arrays[0].shape}; the grid has {grid.shape} cells (x, y, z)"
        )
    labels, camera, lidar = arrays
    return labels.astype(np.uint8), camera.astype(bool), lidar.astype(bool)


class _Tables:
    """The devkit's tables, and which tokens the label tables hold."""

    def __init__(self, devkit) -> None:
        self._devkit = devkit
        self.token_index = devkit._token2ind
        self.scene, self.instance = devkit.scene, devkit.instance

    def get(self, table: str, token: str) -> dict:
        try:
            return self._devkit.get(table, token)
        except KeyError:
            raise DatasetError(
                f"table {table}.json of {self._devkit.table_root} has no entry {token}, which another table refers to; "
                "the tables are incomplete: copy them again"
            ) from None


def _open_tables(dataroot: Path, version: str) -> _Tables:
    folder = dataroot / version
    if not folder.is_dir():
        versions = sorted(path.parent.name for path in dataroot.glob("*/sample.json"))
        raise DatasetError(
            f"there are no tables at {folder}; "
            + (f"the root has version {', '.join(versions)}" if versions else "give the folder that holds v1.0-*/")
        )
    missing = [name for name in _TABLES if not (folder / f"{name}.json").is_file()]
    if missing:
        raise DatasetError(f"{folder} lacks the table {', '.join(f'{name}.json' for name in missing)}; copy it again")
    from nuscenes import NuScenes  # takes seconds to import (matplotlib, scikit-learn)

    try:
        return _Tables(NuScenes(version, str(dataroot), verbose=False))
    except Exception as error:  # the devkit raises bare assertions, KeyErrors and JSON errors alike
        raise DatasetError(
            f"nuscenes-devkit cannot open {folder} ({type(error).__name__}: {error}); the tables are damaged or "
            "label files do not match them"
        ) from None
