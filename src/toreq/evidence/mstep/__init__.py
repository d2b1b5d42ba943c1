"""The claims of MS-TEP, M1 to M8."""

from toreq.evidence.claim import Claim

CLAIMS: tuple[Claim, ...] = ()

__all__ = ["CLAIMS"]
