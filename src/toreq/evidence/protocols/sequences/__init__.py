"""Sequences: tasks from copying to text, six sides with the same parameters and samples, one trainer."""

from toreq.evidence.protocols.sequences.models import BACKPROP, SIDES, build
from toreq.evidence.protocols.sequences.plans import held_out, plan, tasks
from toreq.evidence.protocols.sequences.protocol import SPACE, rate_of, side
from toreq.evidence.protocols.sequences.scores import evaluate
from toreq.evidence.protocols.sequences.training import Recipe, flops_per_sample, train

__all__ = [
    "BACKPROP",
    "SIDES",
    "SPACE",
    "Recipe",
    "build",
    "evaluate",
    "flops_per_sample",
    "held_out",
    "plan",
    "rate_of",
    "side",
    "tasks",
    "train",
]
