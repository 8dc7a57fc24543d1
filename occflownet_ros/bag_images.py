# SPDX-License-Identifier: Apache-2.0
"""Small pictures of a bag's camera images at given moments, for people to look at."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from occflownet_core.errors import BagError, ImageError
from occflownet_core.preprocess import decoded, encoded_size_px
from occflownet_ros.bag import Bag, BagMessage
from occflownet_ros.bag_decoding import decode, stamp_of
from occflownet_ros.image_encodings import bgr_image
from occflownet_ros.report.page import thumbnail

_NEAR_NS = 60_000_000


def thumbnails(
    bag: Path, topics: Sequence[str], moments_ns: Sequence[int | Sequence[int | None]]
) -> list[list[np.ndarray | None]]:
    """One picture per moment and topic, uint8 RGB [h, w, 3]; None where the bag has none.

    Args:
        bag: rosbag2 folder or file.
        topics: of images, compressed or raw.
        moments_ns: stamps; either one for all cameras, whose nearest images within 60 ms are taken, or one per topic
            (None: no image), which must agree exactly.
    """
    pictures: list[list[np.ndarray | None]] = [[None] * len(topics) for _ in moments_ns]
    with Bag(bag) as opened:
        stamps_ns: dict[str, list[int]] = {topic: [] for topic in topics}
        for message in opened.messages(set(topics)):
            stamps_ns[message.topic].append(stamp_of(message))
        wanted: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for row, moment in enumerate(moments_ns):
            for column, topic in enumerate(topics):
                stamp_ns = _nearest(stamps_ns[topic], moment) if isinstance(moment, int) else moment[column]
                if stamp_ns is not None:
                    wanted.setdefault((topic, stamp_ns), []).append((row, column))
        for message in opened.messages(set(topics)):
            for row, column in wanted.get((message.topic, stamp_of(message)), ()):
                pictures[row][column] = _picture(message)
    return pictures


def _nearest(stamps_ns: Sequence[int], stamp_ns: int) -> int | None:
    near = [other for other in stamps_ns if abs(other - stamp_ns) <= _NEAR_NS]
    return min(near, key=lambda other: abs(other - stamp_ns), default=None)


def _picture(message: BagMessage) -> np.ndarray | None:
    """None of an image that the node could not read either, or that is damaged."""
    with contextlib.suppress(ImageError, BagError):
        return thumbnail(cv2.cvtColor(_image(decode(message)), cv2.COLOR_BGR2RGB))
    return None


def _image(message: object) -> np.ndarray:
    """uint8 BGR [H, W, 3] of a decoded image message."""
    data = np.asarray(message.data)
    if hasattr(message, "format"):
        encoded_size_px(data)  # refuses the absurd before anything is allocated
        return decoded(data)
    return bgr_image(data, message.encoding, message.width, message.height, message.step, bool(message.is_bigendian))
