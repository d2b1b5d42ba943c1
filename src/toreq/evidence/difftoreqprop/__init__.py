"""The claims of DiffTorEqProp, D1 to D7."""

from toreq.evidence.difftoreqprop import generation, lowdata, memory, noise, search, uncertainty

CLAIMS = (
    noise.CLAIM_D1,
    noise.CLAIM_D2,
    search.CLAIM,
    generation.CLAIM,
    memory.CLAIM,
    lowdata.CLAIM,
    uncertainty.CLAIM,
)

__all__ = ["CLAIMS"]
