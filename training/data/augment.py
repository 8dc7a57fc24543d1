# SPDX-License-Identifier: Apache-2.0
"""Augmentation of images (resize, crop, roll, mirror) and of the grid (flips in x and y), applied to everything that
must move along: pixels, cameras, lift tables, rays, labels, boxes, ego motion (BEVDet, arXiv 2112.11790).

Image augmentation changes which pixel a voxel reads and nothing in the world: rays and labels stay. A roll of the
image about its centre is a camera rolled about its axis, so it stays a ``Camera``; mirroring has no camera and acts on
the tables' columns. A grid flip mirrors the world and leaves the images: the flipped voxel reads what its mirror image
read, so it acts on the tables' voxels. Where a graph is told the cameras, or pixels are splatted, mirror and flip are
matrices among others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch

from occflownet_core.boxes import MovingBoxes
from occflownet_core.camera import Camera, CameraRig
from occflownet_core.camera_matrices import CameraMatrices
from occflownet_core.errors import DatasetError
from occflownet_core.grid import VoxelGrid
from occflownet_core.lift_tables import LiftSpec, LiftTables, build_lift_tables
from occflownet_core.preprocess import ImageTransform
from occflownet_core.renderer.rays import Rays
from occflownet_core.splat_tables import SplatTables


@dataclass(frozen=True)
class ImageWarp:
    """From an image on disk to the network's: the vehicle's own pipeline, then a roll about the centre, then a mirror.

    Attributes:
        transform: resize and crop.
        roll_rad: clockwise turn of the content (v points down).
        mirrored: left and right exchanged, after the roll.
    """

    transform: ImageTransform
    roll_rad: float = 0.0
    mirrored: bool = False

    def jpeg(self, data: bytes) -> np.ndarray:
        """uint8 RGB [H, W, 3] from an encoded image; raises as ``ImageTransform.jpeg`` does."""
        return self._roll_and_mirror(self.transform.jpeg(data))

    def image(self, image_rgb: np.ndarray) -> np.ndarray:
        """uint8 RGB [H, W, 3] from a decoded one; raises as ``ImageTransform.image`` does."""
        return self._roll_and_mirror(self.transform.image(image_rgb))

    def camera(self, camera: Camera) -> Camera:
        """The camera that took the rolled, not yet mirrored image."""
        camera = self.transform.camera(camera)
        roll = self._roll()
        rolled = roll[:, :2] @ camera.intrinsic[:2, :2]
        # Rolled intrinsics = (upper triangular) @ (rotation about the optical axis): a 2 x 2 RQ decomposition.
        sine, cosine = rolled[1] / np.linalg.norm(rolled[1])
        about_axis = np.eye(4)
        about_axis[:2, :2] = [[cosine, -sine], [sine, cosine]]
        intrinsic = np.eye(3)
        intrinsic[:2, :2] = np.triu(rolled @ about_axis[:2, :2].T)
        intrinsic[:2, 2] = roll[:, :2] @ camera.intrinsic[:2, 2] + roll[:, 2]
        return replace(camera, intrinsic=intrinsic, ego_from_camera=camera.ego_from_camera @ about_axis.T)

    def pixels(self, source_pixel: np.ndarray) -> np.ndarray:
        """Continuous pixels [..., 2] of the network's image, of those of the image on disk."""
        matrix = self.matrix()
        return source_pixel @ matrix[:2, :2].T + matrix[:2, 2]

    def matrix(self) -> np.ndarray:
        """[3, 3], from continuous pixels (u, v, 1) of the image on disk to those of the network's."""
        t = self.transform
        resized, rolled, mirrored = np.eye(3), np.eye(3), np.eye(3)
        resized[[0, 1], [0, 1]] = t.resized_width_px / t.source_width_px, t.resized_height_px / t.source_height_px
        resized[:2, 2] = -t.left_px, -t.top_px
        rolled[:2] = self._roll()
        if self.mirrored:
            mirrored[0] = -1, 0, t.width_px
        return mirrored @ rolled @ resized

    def _roll(self) -> np.ndarray:
        """[2, 3], acting on continuous pixels of the cropped image."""
        cosine, sine = np.cos(self.roll_rad), np.sin(self.roll_rad)
        rotation = np.array([[cosine, -sine], [sine, cosine]])
        centre = np.array([self.transform.width_px, self.transform.height_px]) / 2
        return np.concatenate([rotation, (centre - rotation @ centre)[:, None]], axis=1)

    def _roll_and_mirror(self, image: np.ndarray) -> np.ndarray:
        if self.roll_rad:
            roll = self._roll()
            # OpenCV counts from the first pixel's centre, continuous pixels from its corner.
            roll[:, 2] += roll[:, :2] @ (0.5, 0.5) - 0.5
            image = cv2.warpAffine(image, roll, image.shape[1::-1], flags=cv2.INTER_LINEAR)
        return np.ascontiguousarray(image[:, ::-1]) if self.mirrored else image


@dataclass(frozen=True)
class GridFlip:
    """The world mirrored about the middle of the grid, in x, in y, or both.

    Attributes:
        x, y: which axes.
    """

    x: bool = False
    y: bool = False

    def matrix(self, grid: VoxelGrid) -> np.ndarray:
        """``flipped_from_ego`` [4, 4]: a reflection, its own inverse."""
        matrix = np.eye(4)
        for axis, flipped in enumerate((self.x, self.y)):
            if flipped:
                matrix[axis, axis] = -1
                matrix[axis, 3] = grid.lower_m[axis] + grid.upper_m[axis]
        return matrix

    def motion(self, target_from_source: np.ndarray, grid: VoxelGrid) -> np.ndarray:
        """An ego motion [4, 4] between two frames that are both flipped."""
        return self.matrix(grid) @ target_from_source @ self.matrix(grid)

    def voxels(self, array: np.ndarray) -> np.ndarray:
        """Anything per voxel, [X, Y, Z, ...]."""
        axes = [axis for axis, flipped in enumerate((self.x, self.y)) if flipped]
        return np.ascontiguousarray(np.flip(array, axes))

    def tables(self, tables: LiftTables, grid: VoxelGrid) -> LiftTables:
        """Lift tables on the same grid: each voxel reads what its mirror image read."""
        x, y, z = grid.shape
        axes = [2 - axis for axis, flipped in enumerate((self.x, self.y)) if flipped]

        def flip(column: np.ndarray) -> np.ndarray:
            volume = np.flip(column.reshape(z, y, x, *column.shape[1:]), axes)
            return np.ascontiguousarray(volume).reshape(column.shape)

        return replace(
            tables,
            pixel_index=flip(tables.pixel_index),
            depth_index=flip(tables.depth_index),
            depth_weight=flip(tables.depth_weight),
            camera_index=flip(tables.camera_index),
        )

    def rays(self, rays: Rays, grid: VoxelGrid) -> Rays:
        """Rays of the mirrored world."""
        matrix = torch.from_numpy(self.matrix(grid)).to(rays.origin_m)
        sign = matrix.diagonal()[:3]
        return replace(rays, origin_m=rays.origin_m * sign + matrix[:3, 3], direction=rays.direction * sign)

    def boxes(self, boxes: MovingBoxes, grid: VoxelGrid) -> MovingBoxes:
        """Boxes of the mirrored world. A box is its own mirror image, so its pose is reflected on both sides."""
        mirror = torch.from_numpy(self.matrix(grid))
        within = mirror.clone()
        within[:3, 3] = 0
        return replace(
            boxes,
            ego_from_box_now=mirror @ boxes.ego_from_box_now @ within,
            ego_from_box_then=mirror @ boxes.ego_from_box_then @ within,
        )


@dataclass(frozen=True)
class Augmentation:
    """How strongly to augment; the defaults are BEVDet's, as OccFlowNet takes them over.

    Attributes:
        scale: least and greatest change of the resize factor, as a share of it (published: -0.06 to 0.11 of a factor
            of 0.44, from 1600 to 704 px).
        roll_deg: greatest turn of an image, either way.
        mirror: mirror every image with probability 1/2.
        flip_x, flip_y: mirror the world along that axis with probability 1/2.

    Raises:
        DatasetError: the range of scales is empty, or the roll is not in 0..45 degrees.
    """

    scale: tuple[float, float] = (-0.136, 0.25)
    roll_deg: float = 5.4
    mirror: bool = True
    flip_x: bool = True
    flip_y: bool = True

    def __post_init__(self) -> None:
        if len(self.scale) != 2 or not self.scale[0] <= self.scale[1]:
            raise DatasetError(f"augmentation scale is {self.scale}; give the least and the greatest change")
        if not 0 <= self.roll_deg <= 45:
            raise DatasetError(f"augmentation roll_deg is {self.roll_deg}; give 0 to 45 degrees")

    def draw(self, rng: np.random.Generator, cameras: int) -> AugmentationDraw:
        """One random choice for all frames of a window."""
        images = tuple(
            ImageDraw(
                scale_change=rng.uniform(*self.scale),
                left=rng.uniform(),
                roll_rad=np.radians(rng.uniform(-self.roll_deg, self.roll_deg)),
                mirrored=bool(self.mirror and rng.random() < 0.5),
            )
            for _ in range(cameras)
        )
        flip = GridFlip(bool(self.flip_x and rng.random() < 0.5), bool(self.flip_y and rng.random() < 0.5))
        return AugmentationDraw(images, flip)


@dataclass(frozen=True)
class ImageDraw:
    """One camera's share of a draw.

    Attributes:
        scale_change: of the resize factor, as a share of it.
        left: where the window lies across the resized image, 0 (left) to 1 (right).
        roll_rad, mirrored: as in ``ImageWarp``.
    """

    scale_change: float = 0.0
    left: float = 0.5
    roll_rad: float = 0.0
    mirrored: bool = False

    def warp(self, source_width_px: int, source_height_px: int, width_px: int, height_px: int) -> ImageWarp:
        """The warp for an image of the given size. The window stays at the bottom, where the road is."""
        fit = ImageTransform.fit(source_width_px, source_height_px, width_px, height_px)
        if self.scale_change or self.left != 0.5:
            factor = fit.resized_width_px / source_width_px * max(1 + self.scale_change, 0.01)
            resized_width_px, resized_height_px = round(source_width_px * factor), round(source_height_px * factor)
            fit = replace(
                fit,
                resized_width_px=resized_width_px,
                resized_height_px=resized_height_px,
                left_px=int(self.left * max(0, resized_width_px - width_px)),
                top_px=resized_height_px - height_px,
            )
        return ImageWarp(fit, self.roll_rad, self.mirrored)


@dataclass(frozen=True)
class AugmentationDraw:
    """What was drawn for one window.

    Attributes:
        images: one per camera.
        flip: of the grid.
    """

    images: tuple[ImageDraw, ...]
    flip: GridFlip = GridFlip()

    @classmethod
    def none(cls, cameras: int) -> AugmentationDraw:
        """No augmentation: the vehicle's own pipeline."""
        return cls((ImageDraw(),) * cameras)


def warped_tables(
    rig: CameraRig, warps: Sequence[ImageWarp], flip: GridFlip, spec: LiftSpec
) -> LiftTables | SplatTables:
    """Lift tables for augmented images and grid.

    Args:
        rig: cameras of the images on disk.
        warps: one per camera.
        flip: of the grid.
        spec: the lift's shapes.
    """
    seen = CameraRig(tuple(warp.camera(camera) for warp, camera in zip(warps, rig, strict=True)))
    mirrored = np.array([warp.mirrored for warp in warps])
    matrices = CameraMatrices.of(seen, spec.reference_focal_px).mirrored(mirrored).in_frame(flip.matrix(spec.grid))
    tables = build_lift_tables(seen, spec, matrices)
    if isinstance(tables, SplatTables):
        return tables
    if mirrored.any():
        tables = _with_mirrored_columns(tables, mirrored, spec.feature_width)
    return flip.tables(tables, spec.grid) if flip.x or flip.y else tables


def _with_mirrored_columns(tables: LiftTables, mirrored: np.ndarray, width: int) -> LiftTables:
    def mirror(index: np.ndarray, camera: np.ndarray) -> np.ndarray:
        return np.where(mirrored[camera], index + (width - 1) - 2 * (index % width), index)

    return replace(
        tables,
        pixel_index=mirror(tables.pixel_index, tables.camera_index),
        depth_index=mirror(tables.depth_index, tables.camera_index[..., None]),
    )
