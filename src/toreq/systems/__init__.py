"""Systems: energies composed with a solver and an estimator, ready to train."""

from toreq.systems.base import System
from toreq.systems.deep_hopfield import ConvHopfield, DeepHopfield
from toreq.systems.difftoreqprop import DiffTorEqProp
from toreq.systems.difftoreqprop_nets import DiffConv, DiffMLP
from toreq.systems.difftoreqprop_parts import Seen
from toreq.systems.difftoreqprop_sampling import Anneal, Known
from toreq.systems.htsep import HTSEP, HTSEPConv, HTSEPDense
from toreq.systems.looped_transformer import LoopedTransformer
from toreq.systems.mstep import MultiScaleConv, MultiScaleDense, MultiScaleSequence
from toreq.systems.registry import architectures, create, from_config, names, options
from toreq.systems.tepssr import TEPSSR
from toreq.systems.tepssr_nets import CausalStateSpace, StateSpaceClassifier, StateSpaceTagger
from toreq.systems.toroidal_mlp import ToroidalMLP
from toreq.systems.tpeqprop import TPEqProp
from toreq.systems.tpeqprop_nets import PredictiveConv, PredictiveMLP, PredictiveResidual, PredictiveTransformer

__all__ = [
    "HTSEP",
    "TEPSSR",
    "Anneal",
    "CausalStateSpace",
    "ConvHopfield",
    "DeepHopfield",
    "DiffConv",
    "DiffMLP",
    "DiffTorEqProp",
    "HTSEPConv",
    "HTSEPDense",
    "Known",
    "LoopedTransformer",
    "MultiScaleConv",
    "MultiScaleDense",
    "MultiScaleSequence",
    "PredictiveConv",
    "PredictiveMLP",
    "PredictiveResidual",
    "PredictiveTransformer",
    "Seen",
    "StateSpaceClassifier",
    "StateSpaceTagger",
    "System",
    "TPEqProp",
    "ToroidalMLP",
    "architectures",
    "create",
    "from_config",
    "names",
    "options",
]
