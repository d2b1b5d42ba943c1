"""The base claims, B1 to B6: gradients, accuracy, memory, settling, the nudge's size, locality."""

from toreq.evidence.base import accuracy, gradients, locality, memory, nudges, settling

CLAIMS = (gradients.CLAIM, accuracy.CLAIM, memory.CLAIM, settling.CLAIM, nudges.CLAIM, locality.CLAIM)

__all__ = ["CLAIMS"]
