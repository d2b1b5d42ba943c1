"""MS-TEP: multi-scale equilibrium propagation, for images, flat inputs and token sequences."""

from __future__ import annotations

from toreq.systems.base import System
from toreq.systems.mstep.conv import MultiScaleConv
from toreq.systems.mstep.dense import MultiScaleDense
from toreq.systems.mstep.pyramid import MultiScale, Prediction
from toreq.systems.mstep.sequence import MultiScaleSequence

ARCHITECTURES: dict[str, type[System]] = {
    "conv": MultiScaleConv,
    "dense": MultiScaleDense,
    "sequence": MultiScaleSequence,
}
"""``arch=`` of ``create("mstep", ...)``; the first is the default."""

__all__ = ["ARCHITECTURES", "MultiScale", "MultiScaleConv", "MultiScaleDense", "MultiScaleSequence", "Prediction"]
