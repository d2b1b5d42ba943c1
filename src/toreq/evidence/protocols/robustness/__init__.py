"""Robustness: attacks by foolbox, corruptions, checks for masked gradients, and the sides to compare with."""

from toreq.evidence.protocols.robustness.attacks import Attack, attackable, survivors, transferred
from toreq.evidence.protocols.robustness.corruptions import accuracy, corruption_curve, noise_curve
from toreq.evidence.protocols.robustness.fitting import Matching, Recipe, fit
from toreq.evidence.protocols.robustness.protocol import measure, own, side
from toreq.evidence.protocols.robustness.sides import SIDES

__all__ = [
    "SIDES",
    "Attack",
    "Matching",
    "Recipe",
    "accuracy",
    "attackable",
    "corruption_curve",
    "fit",
    "measure",
    "noise_curve",
    "own",
    "side",
    "survivors",
    "transferred",
]
