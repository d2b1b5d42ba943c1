"""The claims of MS-TEP, M1 to M8."""

from toreq.evidence.mstep import control, exits, gradients, sequences, work

CLAIMS = (work.CLAIM, sequences.CLAIM, exits.CLAIM, gradients.CLAIM, control.CLAIM)

__all__ = ["CLAIMS"]
