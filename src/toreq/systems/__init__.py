"""Systems: energies composed with a solver and an estimator, ready to train."""

from toreq.systems.base import System
from toreq.systems.deep_hopfield import ConvHopfield, DeepHopfield
from toreq.systems.looped_transformer import LoopedTransformer
from toreq.systems.mstep import MultiScaleConv, MultiScaleDense, MultiScaleSequence
from toreq.systems.registry import architectures, create, from_config, names, options
from toreq.systems.toroidal_mlp import ToroidalMLP

__all__ = [
    "ConvHopfield",
    "DeepHopfield",
    "LoopedTransformer",
    "MultiScaleConv",
    "MultiScaleDense",
    "MultiScaleSequence",
    "System",
    "ToroidalMLP",
    "architectures",
    "create",
    "from_config",
    "names",
    "options",
]
