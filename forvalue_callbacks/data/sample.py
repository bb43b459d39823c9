"""What is run, and what is predicted there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Segment:
    inputs: Mapping[str, Any]
    at: np.ndarray
    target: np.ndarray
    weight: float = 1.0
    n_prompt: int = 0
