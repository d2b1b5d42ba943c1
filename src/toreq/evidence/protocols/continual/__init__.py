"""Continual learning: streams without replay or task labels, learners, baselines, and what is measured of them."""

from toreq.evidence.protocols.continual.closed_form import ClassMeans, RecursiveRidge
from toreq.evidence.protocols.continual.consolidation import EWC, OnlineEWC, fisher
from toreq.evidence.protocols.continual.learner import Learner, ModuleLearner
from toreq.evidence.protocols.continual.loop import run, summary
from toreq.evidence.protocols.continual.sides import SIDES, STREAMS, create, fits, learner, side, tuning
from toreq.evidence.protocols.continual.streams import (
    Batch,
    DriftingStream,
    Mixed,
    PermutedMNIST,
    SplitMNIST,
    Stream,
    held_out,
    rotated,
)

__all__ = [
    "EWC",
    "SIDES",
    "STREAMS",
    "Batch",
    "ClassMeans",
    "DriftingStream",
    "Learner",
    "Mixed",
    "ModuleLearner",
    "OnlineEWC",
    "PermutedMNIST",
    "RecursiveRidge",
    "SplitMNIST",
    "Stream",
    "create",
    "fisher",
    "fits",
    "held_out",
    "learner",
    "rotated",
    "run",
    "side",
    "summary",
    "tuning",
]
