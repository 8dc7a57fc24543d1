# SPDX-License-Identifier: Apache-2.0
"""What a replay evaluation writes: the JSON report, and a page with a voxel viewer that opens without a network."""
