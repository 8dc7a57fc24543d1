# SPDX-License-Identifier: Apache-2.0
"""The errors a user may meet: each carries one sentence with what is wrong, which value, and what to do."""

from __future__ import annotations


class OccflownetError(Exception):
    """Base of every error that this project raises on bad input."""


class GeometryError(OccflownetError):
    """A grid, pose or camera is not what it claims to be (singular, not rigid, zero focal length)."""


class ImageError(OccflownetError):
    """An image cannot be decoded, or has another size than its calibration says."""


class CalibrationError(OccflownetError):
    """A camera's intrinsics or extrinsics are missing, inconsistent, or for another number of cameras."""


class BundleError(OccflownetError):
    """A model bundle is missing a file, was altered, or is of a format this version cannot read."""


class EngineError(OccflownetError):
    """An inference engine cannot be made, or failed while running."""


class ConfigError(OccflownetError):
    """A configuration file has an unknown key, a wrong value, or describes a network that cannot be built."""


class ExportError(OccflownetError):
    """A model cannot be exported: its weights do not fit, or the graph does not do what the model does."""


class DatasetError(OccflownetError):
    """A data root lacks a table, a file or a label that the work at hand needs."""


class BagError(OccflownetError):
    """A bag cannot be read, lacks a topic, or cannot be written."""


class TrainingError(OccflownetError):
    """Training cannot start or go on: a checkpoint does not fit or cannot be written, or a loss is not a number."""
