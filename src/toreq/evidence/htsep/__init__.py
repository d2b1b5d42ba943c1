"""The claims of HTSEP, H1 to H13."""

from toreq.evidence.htsep import (
    control,
    descent,
    energy,
    growth,
    hardware,
    layers,
    modalities,
    navigation,
    recall,
    retention,
    sampling,
    sequential,
    steps,
)

CLAIMS = (
    retention.CLAIM,
    control.CLAIM,
    energy.CLAIM,
    steps.CLAIM,
    modalities.CLAIM,
    sequential.CLAIM,
    sampling.CLAIM,
    layers.CLAIM,
    navigation.CLAIM,
    hardware.CLAIM,
    growth.CLAIM,
    descent.CLAIM,
    recall.CLAIM,
)

__all__ = ["CLAIMS"]
