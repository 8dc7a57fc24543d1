# SPDX-License-Identifier: Apache-2.0
"""``report.html``: one file with voxels, images, numbers and the viewer that shows them; it opens without a network."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import cv2
import numpy as np

from occflownet_core.evaluation import DIFFERENCE_RGB, difference
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import BOXED_CLASSES, CLASS_NAMES, COLORS_RGB, FREE
from occflownet_core.occupancy_frame import surface_voxels
from occflownet_ros.report.content import ReplayReport

IMAGE_WIDTH_PX = 480
_JPEG_QUALITY = 72
_STYLES = ("uPlot.min.css", "page.css")
_SCRIPTS = ("three.min.js", "uPlot.iife.min.js", "voxels.js", "viewer.js", "charts.js", "page.js")
_DIFFERENCE_NAMES = ("right", "wrong class", "missed", "invented")


@dataclass(frozen=True, eq=False)
class PageFrame:
    """What the viewer shows of one frame.

    Attributes:
        record: its place in the report's ``frames``.
        prediction: uint8 [X, Y, Z], None where the node did not answer.
        truth, camera_mask: [X, Y, Z], None where there is no ground truth.
        images: camera -> uint8 RGB [h, w, 3].
    """

    record: int
    prediction: np.ndarray | None
    truth: np.ndarray | None
    camera_mask: np.ndarray | None
    images: Mapping[str, np.ndarray]


def build_page(report: ReplayReport, grid: VoxelGrid, cameras: Sequence[str], frames: Sequence[PageFrame]) -> str:
    """The whole page as HTML.

    Args:
        report: its numbers.
        grid: of all voxels.
        cameras: in the order in which the page shows them.
        frames: those that the slider reaches, in order of time.
    """
    content = {
        "report": report.to_dict(),
        "grid": {**grid.to_dict(), "shape": list(grid.shape)},
        "cameras": list(cameras),
        "classes": [
            {"name": CLASS_NAMES[c].replace("_", " "), "rgb": COLORS_RGB[c].tolist(), "moves": c in BOXED_CLASSES}
            for c in range(FREE)
        ],
        "differences": [
            {"name": name, "rgb": rgb} for name, rgb in zip(_DIFFERENCE_NAMES, DIFFERENCE_RGB.tolist(), strict=True)
        ],
        "frames": [_frame(frame) for frame in frames],
    }
    page = _asset("page.html")
    page = page.replace("/*STYLES*/", "\n".join(_asset(name) for name in _STYLES))
    page = page.replace("/*SCRIPTS*/", "</script>\n<script>\n".join(_inline(_asset(name)) for name in _SCRIPTS))
    page = page.replace("/*LICENCES*/", _asset("THIRD_PARTY_LICENCES.txt"))
    # "</script>" inside the data would end its element.
    return page.replace("/*CONTENT*/", json.dumps(content, separators=(",", ":")).replace("</", "<\\/"))


def thumbnail(image_rgb: np.ndarray) -> np.ndarray:
    """The image, uint8 RGB [h, w, 3], at the width in which the page shows it."""
    height_px = round(image_rgb.shape[0] * IMAGE_WIDTH_PX / image_rgb.shape[1])
    return cv2.resize(image_rgb, (IMAGE_WIDTH_PX, height_px), interpolation=cv2.INTER_AREA)


def pack_voxels(labels: np.ndarray) -> str:
    """Surface voxels of uint8 [X, Y, Z] as base64 of zlib of: all x, all y, all z, all labels, one byte each.

    The viewer's ``unpackVoxels`` reads it. Grids of more than 256 cells on an axis take two bytes (little-endian) for
    each number.
    """
    index = np.argwhere(surface_voxels(labels))  # [n, 3]
    columns = np.concatenate([index.T, labels[tuple(index.T)][None]])  # [4, n]
    width = np.uint8 if max(labels.shape) <= 256 else np.dtype("<u2")
    return base64.b64encode(zlib.compress(columns.astype(width).tobytes(), 9)).decode()


def _frame(frame: PageFrame) -> dict:
    nothing = np.full_like(frame.truth, FREE) if frame.truth is not None else None
    prediction = frame.prediction if frame.prediction is not None else nothing
    wrong = None
    if frame.truth is not None:
        wrong = pack_voxels(difference(prediction, frame.truth, frame.camera_mask))
    return {
        "record": frame.record,
        "prediction": None if prediction is None else pack_voxels(prediction),
        "truth": None if frame.truth is None else pack_voxels(frame.truth),
        "difference": wrong,
        "images": {camera: _data_uri(image) for camera, image in frame.images.items()},
    }


def _data_uri(image_rgb: np.ndarray) -> str:
    image = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR)
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1]
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()


def _inline(script: str) -> str:
    return script.replace("</script", "<\\/script")


def _asset(name: str) -> str:
    return resources.files("occflownet_ros.report").joinpath("assets", name).read_text(encoding="utf-8")
