# SPDX-License-Identifier: Apache-2.0
"""ROS 2 in and out: the lifecycle node, its parameters, the frame assembler, bags and replay."""
