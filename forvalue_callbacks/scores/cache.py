"""States of a method, kept between processes. Whatever is wrong with the file costs a warning and a computation."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from .files import whole_file

logger = logging.getLogger(__name__)

CHUNK = 2**20  # numbers that are looked at at once


def load_state(
    file: str | os.PathLike[str],
    shapes: Mapping[str, tuple[int, ...]],
    may_be_infinite: Collection[str] = (),
) -> dict[str, np.ndarray] | None:
    """The arrays that `save_state` kept, or None, with a warning where there is a file that cannot be used.

    Args:
        file: the safetensors file.
        shapes: which arrays there must be; others may be there too.
        may_be_infinite: arrays that may hold infinity. None may hold NaN.
    """
    try:
        if not Path(file).is_file():
            return None
        arrays = load_file(file)
        found = {name: array.shape for name, array in arrays.items()}
        if not shapes.items() <= found.items():
            raise ValueError(f"it holds {found}, not {dict(shapes)}")
        for name, array in arrays.items():
            if not _is_whole(array, name in may_be_infinite):
                raise ValueError(f"{name!r} holds numbers that are not finite")
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        logger.warning("%s cannot be used, what it kept is computed anew: %s", file, error)
        return None
    return arrays


def save_state(file: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Keeps arrays of float32 or float64, whole or not at all; where that cannot be, it warns."""
    path = Path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            # Not save_file, which puts a file of its own, readable by its owner only, in the place of this one.
            temporary.write_bytes(save({name: np.asarray(array, order="C") for name, array in arrays.items()}))
    except (OSError, SafetensorError) as error:
        logger.warning("%s cannot be written, what it would keep is computed again next time: %s", file, error)


def _is_whole(array: np.ndarray, may_be_infinite: bool) -> bool:
    """Whether no number is NaN, nor infinite where that may not be. Looks at some at a time: arrays may be huge."""
    if array.dtype.kind != "f":
        return True
    flat = array.reshape(-1)
    pieces = (flat[first : first + CHUNK] for first in range(0, len(flat), CHUNK))
    return not any((np.isnan(piece) if may_be_infinite else ~np.isfinite(piece)).any() for piece in pieces)
