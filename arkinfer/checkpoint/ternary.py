"""Recognise ternary weights released as ordinary dense tensors.

BitCPM4 checkpoints are fake-quantised: plain bfloat16 tensors whose values are -s, 0 or +s per group of inputs
(MiniCPM4 report, section 3.3). The group size is not stated anywhere and is recovered from the tensor itself.
"""

from __future__ import annotations

import numpy as np

from arkinfer.checkpoint.stored import StoredWeight

SMALLEST_GROUP = 16
_PROBES, _PROBE_ROWS = 8, 8  # places in a matrix that are looked at, rows at each


def detect(stored: StoredWeight) -> int | None:
    """Return the largest group (0: the whole row) for which the weight is exactly ternary, or None if it is not.

    Rows at several places are read, not the whole matrix: packing sees every row, and refuses what is not ternary.
    A constant zero tensor is not called ternary: it says nothing about how the model was trained.
    """
    rows, width = stored.layout.shape
    if width < SMALLEST_GROUP:
        return None
    last = max(0, rows - _PROBE_ROWS)
    places = []
    for start in sorted({last * probe // (_PROBES - 1) for probe in range(_PROBES)}):
        places.append(_magnitudes(stored, start, min(start + _PROBE_ROWS, rows)))
        # These few lie in one group whatever its size is: they tell what is not ternary before more is read.
        if not _one_magnitude(places[-1][:, :SMALLEST_GROUP], SMALLEST_GROUP):
            return None
    probe = np.concatenate(places)
    for extent in (size for size in range(width, SMALLEST_GROUP - 1, -1) if width % size == 0):
        if _one_magnitude(probe[:1], extent) and _one_magnitude(probe, extent):
            return None if not probe.any() else (0 if extent == width else extent)
    return None


def _magnitudes(stored: StoredWeight, start: int, stop: int) -> np.ndarray:
    """Return |w| of some rows; bfloat16 widens to float32, which keeps every value."""
    values = stored.rows(start, stop).weight
    if stored.layout.dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    magnitudes: np.ndarray = np.abs(values)
    return magnitudes


def _one_magnitude(magnitudes: np.ndarray, extent: int) -> bool:
    """Tell whether each ``extent`` inputs of a row hold one magnitude besides zero."""
    grouped = magnitudes.reshape(magnitudes.shape[0], -1, extent)
    scale = grouped.max(axis=2, keepdims=True)
    return bool(((grouped == scale) | (grouped == 0)).all())
