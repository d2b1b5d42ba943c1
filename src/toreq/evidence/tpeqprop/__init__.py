"""The claims of TPEqProp, T1 to T9."""

from toreq.evidence.tpeqprop import accuracy, depth, phases, rule, sequences

CLAIMS = (phases.CLAIM, depth.CLAIM, rule.CLAIM, accuracy.CLAIM, sequences.CLAIM)

__all__ = ["CLAIMS"]
