"""Nodes, operators, couplings and energies: what settles."""

from toreq.core.attention import Attention, LinearAttention
from toreq.core.convolution import Conv
from toreq.core.couplings import Bilinear, Coupling, Drive, Lateral, Potential
from toreq.core.energy import Dynamics, Energy
from toreq.core.gating import GatedBilinear
from toreq.core.inputs import Standardize
from toreq.core.nodes import (
    Activation,
    HardSigmoid,
    Identity,
    LayerNorm,
    Node,
    ReLU,
    Softmax,
    Tanh,
    activation,
)
from toreq.core.norm_control import NormControl, control_norm
from toreq.core.operators import Circulant, Dense, IdentityOperator, Operator, Resample
from toreq.core.quadratic import SelfCoupling, Spring
from toreq.core.resampling import Adjoint, Replicate
from toreq.core.residual import Residual
from toreq.core.ssm import SSM
from toreq.core.state import Bindings, Bound, State
from toreq.core.vector_field import VectorField

__all__ = [
    "SSM",
    "Activation",
    "Adjoint",
    "Attention",
    "Bilinear",
    "Bindings",
    "Bound",
    "Circulant",
    "Conv",
    "Coupling",
    "Dense",
    "Drive",
    "Dynamics",
    "Energy",
    "GatedBilinear",
    "HardSigmoid",
    "Identity",
    "IdentityOperator",
    "Lateral",
    "LayerNorm",
    "LinearAttention",
    "Node",
    "NormControl",
    "Operator",
    "Potential",
    "ReLU",
    "Replicate",
    "Resample",
    "Residual",
    "SelfCoupling",
    "Softmax",
    "Spring",
    "Standardize",
    "State",
    "Tanh",
    "VectorField",
    "activation",
    "control_norm",
]
