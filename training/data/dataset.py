# SPDX-License-Identifier: Apache-2.0
"""NuScenesOccupancy: the torch data set of training, windows of consecutive keyframes with their supervision."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Literal, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from occflownet_core import poses
from occflownet_core.boxes import MovingBoxes
from occflownet_core.camera import CameraRig
from occflownet_core.errors import DatasetError
from occflownet_core.grid import OCC3D_GRID, VoxelGrid
from occflownet_core.labels import BOXED_CLASSES
from occflownet_core.lift_tables import LiftSpec, LiftTables
from occflownet_core.splat_tables import SplatTables
from occflownet_core.views import EncoderPixels, Views
from training.data.augment import Augmentation, AugmentationDraw, GridFlip, ImageDraw, ImageWarp, warped_tables
from training.data.batch import Occupancy, OccupancySample
from training.data.nuscenes import Keyframe, KeyframeIndex, load_occupancy
from training.data.rays import UNLABELLED, FrameRays, RayLimits, RaySource, temporal_rays
from training.data.views import load_image, load_views

_TABLES_KEPT = 4
_FAR_BOX_M = 80.0

T = TypeVar("T")


class NuScenesOccupancy(Dataset):
    """Windows of keyframes of any data root in nuScenes' format.

    Item ``i`` is a list of ``window`` consecutive samples that ends at the i-th keyframe with enough keyframes of its
    scene before it. An item may be asked for as ``(i, epoch)``: its random choices (augmentation, thinning of rays)
    then depend on ``seed``, ``i`` and ``epoch`` alone.

    Args:
        index: keyframes.
        image_width_px, image_height_px: size of the network's images.
        lift: shapes of the network's lift (``model.lift_spec``).
        grid: where labels are given.
        rays: source of 2D supervision, or None for none.
        horizon: keyframes before and after the current one whose rays, images and boxes count.
        max_rays: rays per sample; more are thinned out at random.
        beyond_is_free: see ``RayLimits``.
        sources: give the images of all keyframes in the horizon as views, each with so many to compare it with; 0: none.
        boxes: whether to give the motion of annotated objects.
        depth: whether to give depth images, from the current keyframe's rays.
        occupancy: whether 3D labels must be there, may be there, or are left out.
        window: number of consecutive keyframes of an item.
        supervised: how many of them, the last ones, carry supervision; the others only fill the network's memory.
        augmentation: None for the vehicle's own pipeline.
        at_reference: see ``Keyframe.rig``.
        seed: of all random choices.

    Raises:
        DatasetError: on a horizon or window that is not possible, or no scene as long as the window. Items raise it
            where a file is missing or damaged.
    """

    def __init__(
        self,
        index: KeyframeIndex,
        image_width_px: int,
        image_height_px: int,
        lift: LiftSpec,
        grid: VoxelGrid = OCC3D_GRID,
        rays: RaySource | None = None,
        horizon: int = 3,
        max_rays: int | None = None,
        beyond_is_free: bool = False,
        sources: int = 0,
        boxes: bool = False,
        depth: bool = False,
        occupancy: Literal["required", "present", "none"] = "none",
        window: int = 1,
        supervised: int = 1,
        augmentation: Augmentation | None = None,
        at_reference: bool = True,
        seed: int = 0,
    ) -> None:
        if horizon < 0 or not 1 <= supervised <= window:
            raise DatasetError(
                f"horizon is {horizon}, window {window}, supervised {supervised}; "
                "give a horizon of 0 or more and 1 <= supervised <= window"
            )
        if depth and rays is None:
            raise DatasetError("depth images are made of rays; give a source of rays, or do without depth")
        if occupancy not in ("required", "present", "none"):
            raise DatasetError(f"occupancy is '{occupancy}'; choose required, present or none")
        self.index, self.lift, self.grid = index, lift, grid
        self.image_width_px, self.image_height_px = image_width_px, image_height_px
        self.source, self.horizon, self.limits, self.max_rays = (
            rays,
            horizon,
            RayLimits(grid, beyond_is_free=beyond_is_free),
            max_rays,
        )
        self.sources, self.boxes, self.depth, self.occupancy = sources, boxes, depth, occupancy
        self.window, self.supervised = window, supervised
        self.augmentation, self.at_reference, self.seed = augmentation, at_reference, seed
        self.ends = [last for scene in index.scenes.values() for last in scene[window - 1 :]]
        if not self.ends:
            raise DatasetError(
                f"no scene of split '{index.split}' in {index.dataroot} has {window} keyframes; use a shorter window"
            )
        # A keyframe is a neighbour of as many others as fit into two horizons, and of the window's.
        self._rays = _Cache(2 * horizon + window)
        self._tables = _Cache(_TABLES_KEPT)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, item: int | tuple[int, int]) -> list[OccupancySample]:
        item, epoch = item if isinstance(item, tuple) else (item, 0)
        rng = np.random.default_rng([self.seed, epoch, item])
        cameras = len(self.index.cameras)
        draw = self.augmentation.draw(rng, cameras) if self.augmentation else AugmentationDraw.none(cameras)
        last = self.ends[item]
        return [
            self._sample(i, draw, rng, starts=i == last - self.window + 1, supervised=i > last - self.supervised)
            for i in range(last - self.window + 1, last + 1)
        ]

    def _sample(
        self, i: int, draw: AugmentationDraw, rng: np.random.Generator, starts: bool, supervised: bool
    ) -> OccupancySample:
        keyframe, flip = self.index[i], draw.flip
        rig = keyframe.rig(self.at_reference)
        warps = [
            image.warp(camera.width_px, camera.height_px, self.image_width_px, self.image_height_px)
            for image, camera in zip(draw.images, rig, strict=True)
        ]
        motion = None if starts else self.index[i - 1]
        if motion is not None:
            motion = flip.motion(poses.inverse(motion.global_from_ego) @ keyframe.global_from_ego, self.grid)
        frames = self._frames(i) if supervised and self.source else None
        depth_m, depth_label = (
            depth_images(frames[0][1], warps, rig, self.lift) if self.depth and frames else (None, None)
        )
        return OccupancySample(
            token=keyframe.token,
            scene=keyframe.scene,
            stamp_us=keyframe.stamp_us,
            images=np.stack([load_image(keyframe, c, warp) for c, warp in enumerate(warps)]),
            tables=self._lift_tables(rig, warps, flip),
            previous_from_current=motion,
            rays=flip.rays(temporal_rays(frames, self.limits, self.max_rays, rng), self.grid) if frames else None,
            views=self._views(i, flip) if self.sources and supervised else None,
            encoder_pixels=self._encoder_pixels(rig, warps) if self.sources and supervised else None,
            boxes=flip.boxes(moving_boxes(self.index, i, self.horizon), self.grid)
            if self.boxes and supervised
            else None,
            depth_m=depth_m,
            depth_label=depth_label,
            occupancy=self._occupancy(keyframe, flip) if supervised else None,
            frame_time_s=self._frame_times(i),
        )

    def _frames(self, i: int) -> dict[int, tuple[Keyframe, FrameRays]]:
        frames = {}
        for offset in range(-self.horizon, self.horizon + 1):
            j = self.index.neighbour(i, offset)
            if j is not None:
                keyframe = self.index[j]
                frames[offset] = keyframe, self._rays.get(j, lambda k=keyframe: self.source.frame_rays(k))
        return frames

    def _views(self, i: int, flip: GridFlip) -> Views:
        """The images around keyframe ``i``, as the vehicle's own pipeline makes them, seen from its (maybe flipped) frame."""
        flipped_from_global = flip.matrix(self.grid) @ poses.inverse(self.index[i].global_from_ego)
        frames = {
            offset: (self.index[j], flipped_from_global @ self.index[j].global_from_ego)
            for offset, j in _neighbours(self.index, i, self.horizon)
        }
        return load_views(frames, self.image_width_px, self.image_height_px, self.sources)

    def _encoder_pixels(self, rig: CameraRig, warps: list[ImageWarp]) -> EncoderPixels:
        fits = [ImageDraw().warp(c.width_px, c.height_px, self.image_width_px, self.image_height_px) for c in rig]
        matrices = [fit.matrix() @ np.linalg.inv(warp.matrix()) for fit, warp in zip(fits, warps, strict=True)]
        focals_px = [warp.camera(camera).intrinsic[0, 0] for warp, camera in zip(warps, rig, strict=True)]
        depths_m = np.stack([self.lift.bin_depths_m(focal_px) for focal_px in focals_px]).astype(np.float32)
        return EncoderPixels(torch.from_numpy(np.stack(matrices)[None, :, :2]), torch.from_numpy(depths_m)[None])

    def _lift_tables(self, rig: CameraRig, warps: list[ImageWarp], flip: GridFlip) -> LiftTables | SplatTables:
        if self.augmentation:
            return warped_tables(rig, warps, flip, self.lift)
        key = b"".join(matrix.tobytes() for camera in rig for matrix in (camera.intrinsic, camera.ego_from_camera))
        return self._tables.get(key, lambda: warped_tables(rig, warps, flip, self.lift))

    def _occupancy(self, keyframe: Keyframe, flip: GridFlip) -> Occupancy | None:
        if self.occupancy == "none" or (self.occupancy == "present" and not keyframe.occupancy_path.is_file()):
            return None
        return Occupancy(*(flip.voxels(array) for array in load_occupancy(keyframe, self.grid)))

    def _frame_times(self, i: int) -> np.ndarray:
        neighbours = [self.index.neighbour(i, offset) for offset in range(-self.horizon, self.horizon + 1)]
        now_us = self.index[i].stamp_us
        times = [np.nan if j is None else (self.index[j].stamp_us - now_us) * 1e-6 for j in neighbours]
        return np.array(times, dtype=np.float32)


class _Cache:
    """The latest values, made once each."""

    def __init__(self, size: int) -> None:
        self._size, self._values = size, OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if key in self._values:
            self._values.move_to_end(key)
        else:
            self._values[key] = make()
            if len(self._values) > self._size:
                self._values.popitem(last=False)
        return self._values[key]


def moving_boxes(index: KeyframeIndex, i: int, horizon: int, classes: tuple[int, ...] = BOXED_CLASSES) -> MovingBoxes:
    """How the annotated objects near keyframe ``i`` move between it and each neighbour, in its ego frame."""
    now = index[i]
    ego_from_global = poses.inverse(now.global_from_ego)
    at = {t: _boxes_by_instance(index[j], ego_from_global, classes) for t, j in _neighbours(index, i, horizon)}
    nowhere = np.full((4, 4), np.nan)
    rows = []
    for t, then_boxes in at.items():
        for instance in {**at[0], **then_boxes} if t else ():
            here, there = at[0].get(instance), then_boxes.get(instance)
            _, size_m, label = here or there
            rows.append((here[0] if here else nowhere, there[0] if there else nowhere, size_m, label, t))
    if not rows:
        return MovingBoxes.empty()
    return MovingBoxes.from_numpy(*(np.array(column) for column in zip(*rows, strict=True)))


def _neighbours(index: KeyframeIndex, i: int, horizon: int) -> list[tuple[int, int]]:
    pairs = ((t, index.neighbour(i, t)) for t in range(-horizon, horizon + 1))
    return [(t, j) for t, j in pairs if j is not None]


def _boxes_by_instance(
    keyframe: Keyframe, ego_from_global: np.ndarray, classes: tuple[int, ...]
) -> dict[int, tuple[np.ndarray, np.ndarray, int]]:
    """Instance -> pose [4, 4], size [3], label, of boxes with a volume that are not far away."""
    boxes = keyframe.boxes
    ego_from_box = ego_from_global @ boxes.global_from_box
    near = np.linalg.norm(ego_from_box[:, :2, 3], axis=1) < _FAR_BOX_M
    kept = np.flatnonzero(near & np.isin(boxes.label, classes) & (boxes.size_m > 0).all(axis=1))
    return {int(boxes.instance[b]): (ego_from_box[b], boxes.size_m[b], int(boxes.label[b])) for b in kept}


def depth_images(
    rays: FrameRays, warps: list[ImageWarp], rig: CameraRig, lift: LiftSpec
) -> tuple[np.ndarray, np.ndarray]:
    """Depth of the nearest return in each feature cell, as the depth bins count it, and that return's class.

    Args:
        rays: of the keyframe that the images belong to.
        warps: one per camera.
        rig: cameras of the images on disk.
        lift: feature size and depth bins.

    Returns:
        Depth float32 [N, h, w], 0 where there is no return; class uint8 [N, h, w], ``UNLABELLED`` where nobody knows it.
    """
    height, width = lift.feature_height, lift.feature_width
    depth_images_m = np.zeros((len(warps), height * width), dtype=np.float32)
    labels = np.full((len(warps), height * width), UNLABELLED, dtype=np.uint8)
    for c, (warp, camera) in enumerate(zip(warps, rig, strict=True)):
        mine = (rays.camera_index == c) & np.isfinite(rays.depth_m)
        cell = np.floor(warp.pixels(rays.pixel[mine]) * (width / warp.transform.width_px)).astype(np.int64)
        inside = ((cell >= 0) & (cell < (width, height))).all(axis=1)
        depth_m = lift.network_depth_m(rays.depth_m[mine][inside], warp.camera(camera).intrinsic[0, 0])
        far_first = np.argsort(-depth_m, kind="stable")  # the nearest return of a cell is written last, and stays
        at = (cell[inside] @ (1, width))[far_first]
        depth_images_m[c, at] = depth_m[far_first]
        labels[c, at] = rays.label[mine][inside][far_first]
    shape = (len(warps), height, width)
    return depth_images_m.reshape(shape), labels.reshape(shape)
