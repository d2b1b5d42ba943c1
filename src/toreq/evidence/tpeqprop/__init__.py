"""The claims of TPEqProp, T1 to T9."""

from toreq.evidence.tpeqprop import accuracy, depth, phases, rule

CLAIMS = (phases.CLAIM, depth.CLAIM, rule.CLAIM, accuracy.CLAIM)

__all__ = ["CLAIMS"]
