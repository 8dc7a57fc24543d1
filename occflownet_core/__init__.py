# SPDX-License-Identifier: Apache-2.0
"""Camera-only semantic occupancy: geometry, field, renderer and engines, free of ROS and of data sets."""

__version__ = "0.1.0"
