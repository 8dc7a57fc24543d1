# SPDX-License-Identifier: Apache-2.0
"""Training: data sets, fitting, evaluation and export (needs torch; no ROS)."""
