"""What scores are made of, compared in people's words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# What scores are made of, for people.
PARTS = {"weights": "weights", "validation": "validation rows", "data": "training rows", "config": "settings"}


def as_json(value: Any) -> Any:
    """What comes back when it has been kept as JSON: a tuple is a list then."""
    return json.loads(json.dumps(value))


def differing(provenance: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Names, for people, of the parts in `expected` that are others in `provenance`."""
    return [PARTS.get(part, part) for part, value in as_json(dict(expected)).items() if provenance.get(part) != value]
