# SPDX-License-Identifier: Apache-2.0
"""From camera images to a volume of features around the vehicle (METHOD: BEVStereo's way, without its stereo yet)."""
