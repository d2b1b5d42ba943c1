"""The claims of MS-TEP, M1 to M8."""

from toreq.evidence.mstep import accuracy, control, exits, gradients, overhead, sequences, work

CLAIMS = (
    work.CLAIM,
    accuracy.M2,
    accuracy.M3,
    sequences.CLAIM,
    exits.CLAIM,
    gradients.CLAIM,
    control.CLAIM,
    overhead.CLAIM,
)

__all__ = ["CLAIMS"]
