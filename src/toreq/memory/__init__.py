"""Circular memory: the ring of past states, and the torus for inputs that change in time, with its geometry."""

from toreq.memory.geometry import TorusGeometry
from toreq.memory.ring import Ring
from toreq.memory.torus import MemoryState, TorusMemory

__all__ = ["MemoryState", "Ring", "TorusGeometry", "TorusMemory"]
