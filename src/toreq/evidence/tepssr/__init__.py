"""The claims of TEP-SSR, S1 to S9."""

from toreq.evidence.tepssr import (
    accuracy,
    contraction,
    control,
    gradients,
    longrange,
    memory,
    perturbation,
    reasoning,
    timing,
)

CLAIMS = (
    timing.CLAIM,
    memory.CLAIM,
    accuracy.CLAIM,
    longrange.CLAIM,
    control.CLAIM,
    gradients.CLAIM,
    contraction.CLAIM,
    reasoning.CLAIM,
    perturbation.CLAIM,
)

__all__ = ["CLAIMS"]
