"""The claims of MS-TEP, M1 to M8."""

from toreq.evidence.mstep import gradients

CLAIMS = (gradients.CLAIM,)

__all__ = ["CLAIMS"]
