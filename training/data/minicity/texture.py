# SPDX-License-Identifier: Apache-2.0
"""Band-limited patterns: smooth noise, and pulse trains averaged over the width of a pixel."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

_SIZE = 256


@lru_cache(maxsize=1)
def _noise_table() -> np.ndarray:
    white = np.random.default_rng(20240217).normal(size=(_SIZE, _SIZE))
    spectrum = np.fft.fft2(white)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(_SIZE), np.fft.fftfreq(_SIZE)))
    smooth = np.real(np.fft.ifft2(spectrum * np.exp(-((frequency / 0.13) ** 2))))
    table = (smooth / smooth.std()).astype(np.float32)
    return np.pad(table, ((0, 1), (0, 1)), mode="wrap")


@lru_cache(maxsize=1)
def _hash_table() -> np.ndarray:
    return np.random.default_rng(7).uniform(-1, 1, 1024).astype(np.float32)


def noise(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Smooth noise [N] of unit variance and a wavelength of about 1, at coordinates [N]; repeats after 32."""
    scale = _SIZE / 32
    x = np.mod(u * scale, _SIZE).astype(np.float32)
    y = np.mod(v * scale, _SIZE).astype(np.float32)
    n = len(x)
    rows = max(1, -(-n // 1024))
    padded = np.zeros((2, rows * 1024), dtype=np.float32)
    padded[0, :n], padded[1, :n] = x, y
    found = cv2.remap(_noise_table(), padded[0].reshape(rows, 1024), padded[1].reshape(rows, 1024), cv2.INTER_LINEAR)
    return found.ravel()[:n]


def fade(wavelength_m: np.ndarray, footprint_m: np.ndarray) -> np.ndarray:
    """How much of a pattern of the given wavelength survives pixels of the given width: 1 when fine, 0 when coarse."""
    return np.clip(1.5 - 2 * footprint_m / wavelength_m, 0, 1)


def pulse(x: np.ndarray, period: np.ndarray, fill: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Share [N] of a window of the given width around x that a pulse train covers.

    The train is 1 on [k * period, (k + fill) * period) for whole k, 0 elsewhere; a period of 0 means 1 everywhere.
    """
    safe = np.where(period > 0, period, 1.0)
    half = np.maximum(width / safe, 2e-3) / 2
    at = x / safe
    share = (_filled(at + half, fill) - _filled(at - half, fill)) / (2 * half)
    return np.where(period > 0, share, 1.0)


def _filled(at: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """Integral of the unit pulse train from 0."""
    whole = np.floor(at)
    return whole * fill + np.minimum(at - whole, fill)


def cell_hash(*index: np.ndarray) -> np.ndarray:
    """A number in -1..1 [N] for each tuple of whole numbers [N]."""
    mixed = np.zeros(len(index[0]), dtype=np.int64)
    for i, factor in zip(index, (73, 179, 283), strict=False):
        mixed = mixed * 31 + i.astype(np.int64) * factor
    return _hash_table()[(mixed ^ (mixed >> 7)) & 1023]
