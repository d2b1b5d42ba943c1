"""Circular memory of past states."""

from toreq.memory.ring import Ring

__all__ = ["Ring"]
