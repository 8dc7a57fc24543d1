# SPDX-License-Identifier: Apache-2.0
"""Pictures of labelled voxels for people: shaded cubes seen from anywhere, camera mosaics, legends. No GPU needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import CLASS_NAMES, COLORS_RGB, FREE

BACKGROUND_RGB = np.array([250, 250, 248], dtype=np.float64)
INK_RGB = (38, 42, 48)
FAINT_INK_RGB = (110, 116, 124)

_SUPERSAMPLING = 2
_NEAREST_M = 0.5
_EDGE_DARKENING = 0.2
_EDGED_FACE_PX = (4.0, 16.0)  # edges fade in between these sizes of a face's short side, supersampled
_CORNER_DARKENING = 0.045  # per occupied neighbour beside the space in front of a face: ambient occlusion
_SUBPIXEL_BITS = 4
# A face's light by its outward normal: the sun stands high, to the front left.
_LIGHT = {(0, 0, 1): 1.0, (0, 0, -1): 0.5, (1, 0, 0): 0.72, (-1, 0, 0): 0.82, (0, 1, 0): 0.9, (0, -1, 0): 0.64}
# Ego vehicle as the nuScenes cars are: 4.1 x 1.7 x 1.5 m, rear axle at the origin.
_EGO_CENTRE_M, _EGO_HALF_SIZE_M = (1.35, 0.0, 0.75), (2.05, 0.87, 0.75)
_EGO_RGB = (60, 64, 72)


@dataclass(frozen=True)
class View:
    """A perspective viewpoint in the ego frame.

    Attributes:
        eye_m, target_m: where the eye is and what it looks at.
        up: the direction that points upward in the picture.
        field_of_view_deg: opening angle across the picture's width.
        width_px, height_px: the picture's size.
    """

    eye_m: tuple[float, float, float]
    target_m: tuple[float, float, float]
    up: tuple[float, float, float]
    field_of_view_deg: float
    width_px: int
    height_px: int


def view_from_above(grid: VoxelGrid, width_px: int = 640, height_px: int = 640) -> View:
    """The whole grid seen from high above; forward (x) points up."""
    centre = (np.array(grid.lower_m) + grid.upper_m) / 2
    extent_m = max(np.array(grid.upper_m)[:2] - np.array(grid.lower_m)[:2])
    field_of_view_deg = 22.0
    height_m = 1.04 * extent_m / 2 / np.tan(np.radians(field_of_view_deg / 2)) * max(1.0, width_px / height_px)
    eye = (centre[0], centre[1], grid.upper_m[2] + height_m)
    return View(eye, tuple(centre), (1, 0, 0), field_of_view_deg, width_px, height_px)


def view_from_behind(grid: VoxelGrid, width_px: int = 960, height_px: int = 640) -> View:
    """A chase view: from behind and above the vehicle, looking ahead."""
    reach_m = grid.upper_m[0]
    return View(
        (-0.62 * reach_m, 0.0, 0.42 * reach_m), (0.12 * reach_m, 0.0, 0.0), (0, 0, 1), 62.0, width_px, height_px
    )


def draw_voxels(
    labels: np.ndarray,
    grid: VoxelGrid,
    view: View,
    colors_rgb: np.ndarray = COLORS_RGB,
    ego: bool = True,
) -> np.ndarray:
    """Draw occupied voxels as shaded cubes, far ones first (painter's algorithm).

    Args:
        labels: uint8 [X, Y, Z]; ``FREE`` is not drawn.
        grid: where the voxels lie.
        view: from where, and how large.
        colors_rgb: uint8 [18, 3], colour of each label.
        ego: whether to draw the ego vehicle.

    Returns:
        uint8 RGB [height, width, 3].
    """
    centres_m, normals, half_sizes_m, colors = _visible_faces(labels, grid, np.array(view.eye_m), colors_rgb)
    if ego:
        parts = _cuboid_faces(_EGO_CENTRE_M, _EGO_HALF_SIZE_M, _EGO_RGB)
        centres_m, normals, half_sizes_m, colors = (
            np.concatenate(pair) for pair in zip((centres_m, normals, half_sizes_m, colors), parts, strict=True)
        )
    facing = ((np.array(view.eye_m) - centres_m) * normals).sum(axis=1) > 0
    corners_m = _corners(centres_m[facing], normals[facing], half_sizes_m[facing])  # [F, 4, 3]
    pixels, depth_m = _project(corners_m, view)
    in_front = (depth_m > _NEAREST_M).all(axis=1)
    distance_m = np.linalg.norm(centres_m[facing] - view.eye_m, axis=1)
    lit = colors[facing] * np.array([_LIGHT[tuple(n)] for n in normals[facing].astype(int)])[:, None]
    return _paint(pixels[in_front], lit[in_front], distance_m[in_front], view)


def draw_mesh(
    vertices_m: np.ndarray, triangles: np.ndarray, colors_rgb: np.ndarray, view: View, ego: bool = True
) -> np.ndarray:
    """Draw a mesh in the light that voxels stand in, far triangles first; both sides of a surface can be seen.

    Args:
        vertices_m: [V, 3], ego frame.
        triangles: [T, 3], rows of ``vertices_m``.
        colors_rgb: uint8 [V, 3].
        view: from where, and how large.
        ego: whether to draw the ego vehicle.

    Returns:
        uint8 RGB [height, width, 3].
    """
    eye_m = np.array(view.eye_m)
    corners_m = vertices_m[triangles].astype(np.float64)  # [T, 3, 3]
    normals = np.cross(corners_m[:, 1] - corners_m[:, 0], corners_m[:, 2] - corners_m[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    lit = colors_rgb[triangles].mean(axis=1) * _light(normals)[:, None]
    if ego:
        # As triangles: each face of the cuboid, cut along a diagonal.
        faces, face_normals, half_sizes_m, face_colors = _cuboid_faces(_EGO_CENTRE_M, _EGO_HALF_SIZE_M, _EGO_RGB)
        rings = _corners(faces, face_normals, half_sizes_m)  # [6, 4, 3]
        corners_m = np.concatenate([corners_m, rings[:, [0, 1, 2]], rings[:, [0, 2, 3]]])
        lit = np.concatenate([lit, *[face_colors * _light(face_normals)[:, None]] * 2])
    pixels, depth_m = _project(corners_m, view)
    in_front = (depth_m > _NEAREST_M).all(axis=1)
    distance_m = np.linalg.norm(corners_m.mean(axis=1) - eye_m, axis=1)
    return _paint(pixels[in_front], lit[in_front], distance_m[in_front], view, edged=False)


def _light(normals: np.ndarray) -> np.ndarray:
    """Light [n] on faces of any normal [n, 3], which is that of the voxels' faces along the axes."""
    along = [_LIGHT[tuple(axis)] for axis in np.eye(3, dtype=int)]
    against = [_LIGHT[tuple(-axis)] for axis in np.eye(3, dtype=int)]
    return (normals**2 * np.where(normals > 0, along, against)).sum(axis=1)


def _visible_faces(labels: np.ndarray, grid: VoxelGrid, eye_m: np.ndarray, colors_rgb: np.ndarray):
    """Faces between an occupied voxel and a free one (or the border): centres, normals, half sizes, colours."""
    occupied = np.pad(labels != FREE, 1)
    inner = (slice(1, -1),) * 3
    centres, normals, colors = [], [], []
    for normal in _LIGHT:
        ahead = np.roll(occupied, [-n for n in normal], axis=(0, 1, 2))
        index = np.argwhere(occupied[inner] & ~ahead[inner])
        centres.append(grid.metric_from_index(index + 0.5 + 0.5 * np.array(normal)))
        normals.append(np.broadcast_to(np.array(normal, dtype=np.float64), centres[-1].shape))
        beside = _neighbours_in_plane(ahead, normal)[inner][tuple(index.T)]
        colors.append(colors_rgb[labels[tuple(index.T)]] * (1 - _CORNER_DARKENING * beside)[:, None])
    centres_m = np.concatenate(centres)
    half_sizes_m = np.full(centres_m.shape, grid.voxel_size_m / 2)
    return centres_m, np.concatenate(normals), half_sizes_m, np.concatenate(colors)


def _neighbours_in_plane(occupied: np.ndarray, normal: tuple[int, int, int]) -> np.ndarray:
    """How many of the 8 cells around each cell, in the plane across ``normal``, are occupied."""
    count = occupied.astype(np.uint8)
    for axis in (axis for axis in range(3) if not normal[axis]):
        count = count + np.roll(count, 1, axis) + np.roll(count, -1, axis)
    return count - occupied


def _cuboid_faces(centre_m: Sequence[float], half_size_m: Sequence[float], color_rgb: Sequence[int]):
    normals = np.array(list(_LIGHT), dtype=np.float64)
    centres_m = np.array(centre_m) + normals * half_size_m
    return centres_m, normals, np.tile(half_size_m, (6, 1)), np.tile(np.array(color_rgb, dtype=np.float64), (6, 1))


def _corners(centres_m: np.ndarray, normals: np.ndarray, half_sizes_m: np.ndarray) -> np.ndarray:
    """Four corners in ring order of each face, [F, 4, 3]."""
    axis = np.abs(normals).argmax(axis=1)
    first, second = np.eye(3)[(axis + 1) % 3] * half_sizes_m, np.eye(3)[(axis + 2) % 3] * half_sizes_m
    ring = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    return np.stack([centres_m + a * first + b * second for a, b in ring], axis=1)


def _project(points_m: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray]:
    """Supersampled pixels [..., 2] and depth [...] of points [..., 3]."""
    forward = np.array(view.target_m, dtype=np.float64) - view.eye_m
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, view.up)
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    seen = (points_m - np.array(view.eye_m)) @ np.stack([right, down, forward]).T
    depth_m = seen[..., 2]
    focal_px = view.width_px / 2 / np.tan(np.radians(view.field_of_view_deg / 2))
    safe_m = np.maximum(depth_m, _NEAREST_M)[..., None]
    pixels = seen[..., :2] / safe_m * focal_px + (view.width_px / 2, view.height_px / 2)
    return pixels * _SUPERSAMPLING, depth_m


def _paint(
    polygons: np.ndarray, colors: np.ndarray, distance_m: np.ndarray, view: View, edged: bool = True
) -> np.ndarray:
    size = (view.height_px * _SUPERSAMPLING, view.width_px * _SUPERSAMPLING)
    canvas = np.empty((*size, 3), dtype=np.uint8)
    canvas[:] = BACKGROUND_RGB
    if not len(polygons):
        return canvas[: view.height_px, : view.width_px]
    # Far faces fade a little into the background: the eye reads it as depth.
    span = max(float(np.ptp(distance_m)), 1e-6)
    haze = 0.22 * ((distance_m - distance_m.min()) / span)[:, None] ** 1.5
    colors = colors * (1 - haze) + BACKGROUND_RGB * haze
    in_picture = ((polygons.max(axis=1) > 0) & (polygons.min(axis=1) < (size[1], size[0]))).all(axis=1)
    order = np.argsort(-distance_m, kind="stable")
    order = order[in_picture[order]]
    fade_from, fade_to = _EDGED_FACE_PX
    edge = edged * np.clip((np.ptp(polygons, axis=1).min(axis=1) - fade_from) / (fade_to - fade_from), 0, 1)
    edge_colors = colors * (1 - _EDGE_DARKENING * edge)[:, None]
    fixed = np.round(polygons * (1 << _SUBPIXEL_BITS)).astype(np.int32)
    for face in order:
        cv2.fillConvexPoly(canvas, fixed[face], colors[face].tolist(), cv2.LINE_8, _SUBPIXEL_BITS)
        if edge[face] > 0:
            cv2.polylines(canvas, [fixed[face]], True, edge_colors[face].tolist(), 1, cv2.LINE_8, _SUBPIXEL_BITS)
    return cv2.resize(canvas, (view.width_px, view.height_px), interpolation=cv2.INTER_AREA)


def legend(labels: np.ndarray, width_px: int, columns: int = 1) -> np.ndarray:
    """Colour, name and voxel count of every class that occurs, most frequent first.

    Args:
        labels: uint8 of any shape.
        width_px: the picture's width.
        columns: how many entries stand side by side.

    Returns:
        uint8 RGB [H, width, 3].
    """
    counts = np.bincount(labels.ravel(), minlength=len(CLASS_NAMES))[:FREE]
    present = [int(c) for c in np.argsort(-counts, kind="stable") if counts[c]]
    rows = -(-len(present) // columns)
    row_px, swatch_px = 30, 18
    image = Image.new("RGB", (width_px, max(rows, 1) * row_px + 4), tuple(int(v) for v in BACKGROUND_RGB))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(17)
    column_px = width_px / columns
    for position, label in enumerate(present):
        left, top = (position // rows) * column_px + 8, (position % rows) * row_px + 6
        draw.rounded_rectangle(
            (left, top, left + swatch_px, top + swatch_px), 4, fill=tuple(COLORS_RGB[label].tolist())
        )
        draw.text((left + swatch_px + 9, top - 1), CLASS_NAMES[label].replace("_", " "), INK_RGB, font)
        draw.text((left + column_px - 28, top - 1), f"{counts[label]:,}", FAINT_INK_RGB, font, anchor="ra")
    return np.asarray(image)


def mosaic(images: Mapping[str, np.ndarray], width_px: int, columns: int = 3, gap_px: int = 6) -> np.ndarray:
    """Named camera images (uint8 RGB, one shape) side by side, each with its name; uint8 RGB [H, width, 3]."""
    tile_px = (width_px - gap_px * (columns - 1)) // columns
    tiles = [_named(_scaled(image, tile_px), name) for name, image in images.items()]
    tile_height_px = max(tile.shape[0] for tile in tiles)
    rows = -(-len(tiles) // columns)
    canvas = np.empty((rows * (tile_height_px + gap_px) - gap_px, width_px, 3), dtype=np.uint8)
    canvas[:] = BACKGROUND_RGB
    for position, tile in enumerate(tiles):
        top = position // columns * (tile_height_px + gap_px)
        left = position % columns * (tile_px + gap_px)
        canvas[top : top + tile.shape[0], left : left + tile_px] = tile
    return canvas


def titled(image: np.ndarray, title: str, note: str = "", size_px: int = 22) -> np.ndarray:
    """The picture with a line of text above it, and a fainter note at that line's end."""
    band = Image.new("RGB", (image.shape[1], size_px + 16), tuple(int(v) for v in BACKGROUND_RGB))
    draw = ImageDraw.Draw(band)
    draw.text((8, 6), title, INK_RGB, ImageFont.load_default(size_px))
    draw.text((image.shape[1] - 8, 10), note, FAINT_INK_RGB, ImageFont.load_default(round(size_px * 0.75)), anchor="ra")
    return np.concatenate([np.asarray(band), image])


def stacked(images: Sequence[np.ndarray], gap_px: int = 10) -> np.ndarray:
    """Pictures below each other, left-aligned on the background colour."""
    width_px = max(image.shape[1] for image in images)
    height_px = sum(image.shape[0] for image in images) + gap_px * (len(images) - 1)
    canvas = np.empty((height_px, width_px, 3), dtype=np.uint8)
    canvas[:] = BACKGROUND_RGB
    top = 0
    for image in images:
        canvas[top : top + image.shape[0], : image.shape[1]] = image
        top += image.shape[0] + gap_px
    return canvas


def side_by_side(images: Sequence[np.ndarray], gap_px: int = 14) -> np.ndarray:
    """Pictures beside each other, top-aligned on the background colour."""
    return stacked([image.transpose(1, 0, 2) for image in images], gap_px).transpose(1, 0, 2)


def save_png(path: str, image_rgb: np.ndarray) -> None:
    """Write uint8 RGB [H, W, 3] as an optimised PNG."""
    Image.fromarray(image_rgb).save(path, optimize=True)


def _scaled(image: np.ndarray, width_px: int) -> np.ndarray:
    height_px = round(image.shape[0] * width_px / image.shape[1])
    shrinks = width_px <= image.shape[1]
    return cv2.resize(image, (width_px, height_px), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def _named(image: np.ndarray, name: str) -> np.ndarray:
    picture = Image.fromarray(image)
    draw, font = ImageDraw.Draw(picture, "RGBA"), ImageFont.load_default(14)
    right = 12 + draw.textlength(name, font)
    draw.rounded_rectangle((4, 4, right + 4, 24), 5, fill=(0, 0, 0, 120))
    draw.text((10, 5), name, (255, 255, 255, 235), font)
    return np.asarray(picture)
