# SPDX-License-Identifier: Apache-2.0
"""Messages of a bag as objects, and their stamps; whatever a damaged one holds, the answer is one sentence."""

from __future__ import annotations

import struct

from occflownet_core.errors import BagError
from occflownet_ros.bag import BagMessage
from occflownet_ros.cdr import header_stamp_ns
from occflownet_ros.nuscenes_messages import typestore


def decode(message: BagMessage) -> object:
    """The message as an object of rosbags' types.

    Raises:
        BagError: its bytes are not what its type says.
    """
    try:
        return typestore().deserialize_cdr(message.data, message.msgtype)
    except Exception as error:  # a damaged message makes rosbags raise nearly anything
        raise BagError(
            f"the message of {message.topic} at {message.time_ns} ns is no readable {message.msgtype} "
            f"({type(error).__name__}); leave its topic out, or record it again"
        ) from None


def stamp_of(message: BagMessage) -> int:
    """Nanoseconds of a serialised message that begins with a std_msgs/Header; the rest is not read.

    Raises:
        BagError: the message is too short for one.
    """
    try:
        return header_stamp_ns(message.data)
    except (struct.error, IndexError):
        raise BagError(
            f"the message of {message.topic} at {message.time_ns} ns has {len(message.data)} bytes, too few for a "
            "header; leave its topic out, or record it again"
        ) from None
