"""Evidence: the claims about this library, the protocols that settle them, and the page that shows the results."""

from toreq.evidence.budgets import BUDGETS, Budget
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial, Tuning
from toreq.evidence.registry import claim, claims
from toreq.evidence.runner import run
from toreq.evidence.statistics import Interval, interval, paired, standing
from toreq.evidence.verdicts import judge

__all__ = [
    "BUDGETS",
    "Budget",
    "Claim",
    "Cost",
    "Criterion",
    "Interval",
    "Outcome",
    "Picture",
    "Quantity",
    "Trial",
    "Tuning",
    "claim",
    "claims",
    "interval",
    "judge",
    "paired",
    "run",
    "standing",
]
