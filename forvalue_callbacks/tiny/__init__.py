"""The tiny model that comes with the package, and the made-up world that it knows."""

from .world import TINY_MODEL, instructions, pretraining_text

__all__ = ["TINY_MODEL", "instructions", "pretraining_text"]
