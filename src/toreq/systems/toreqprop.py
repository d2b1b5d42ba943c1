"""The base TorEqProp: one name, four architectures."""

from __future__ import annotations

from toreq.systems.base import System
from toreq.systems.deep_hopfield import ConvHopfield, DeepHopfield
from toreq.systems.looped_transformer import LoopedTransformer
from toreq.systems.toroidal_mlp import ToroidalMLP

ARCHITECTURES: dict[str, type[System]] = {
    "mlp": ToroidalMLP,
    "hopfield": DeepHopfield,
    "conv": ConvHopfield,
    "transformer": LoopedTransformer,
}
"""``arch=`` of ``create("toreqprop", ...)``; the first is the default."""
