"""The claims of MS-TEP, M1 to M8."""

from toreq.evidence.mstep import control, gradients, sequences

CLAIMS = (sequences.CLAIM, gradients.CLAIM, control.CLAIM)

__all__ = ["CLAIMS"]
