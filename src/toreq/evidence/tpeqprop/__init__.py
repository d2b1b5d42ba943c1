"""The claims of TPEqProp, T1 to T9."""

from toreq.evidence.tpeqprop import (
    accuracy,
    continual,
    depth,
    feedback,
    phases,
    robustness,
    rule,
    sequences,
    thinking,
)

CLAIMS = (
    phases.CLAIM,
    depth.CLAIM,
    rule.CLAIM,
    accuracy.CLAIM,
    robustness.CLAIM,
    sequences.CLAIM,
    continual.CLAIM,
    thinking.CLAIM,
    feedback.CLAIM,
)

__all__ = ["CLAIMS"]
