"""Running sums of a training or test pass, kept on the device so that no step waits for the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from toreq.layer import Equilibrium

NAMES = (
    "examples",
    "loss",
    "correct",
    "free",
    "free_steps",
    "free_converged",
    "nudged",
    "nudged_steps",
    "nudged_converged",
    "asym",
    "asym_defined",
    "halvings",
    "diverged",
)


class Totals:
    """Sums over the examples seen: `sums` is one vector (len(NAMES),) on `device`.

    A relaxation counts once per example and equilibrium layer; `diverged` counts those whose residual is not finite.
    """

    def __init__(self, device: torch.device) -> None:
        # MPS has no float64; elsewhere float64 keeps counts exact for any run.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(len(NAMES), dtype=dtype, device=device)

    @torch.no_grad()
    def add(self, layers: Sequence[Equilibrium], loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add one batch: its mean `loss`, its `logits` (B, classes) and the settle statistics of `layers`."""
        count = labels.shape[0]
        values: dict[str, Tensor | float] = {
            "examples": float(count),
            "loss": loss.detach() * count,
            "correct": (logits.detach().argmax(dim=-1) == labels).sum(),
        }
        for layer in layers:
            self._settling(layer, values)
        self._accumulate(values)

    @staticmethod
    def _settling(layer: Equilibrium, values: dict[str, Tensor | float]) -> None:
        def accumulate(name: str, value: Tensor | float) -> None:
            values[name] = values.get(name, 0.0) + value

        for phase, statistics in (("free", layer.last.free), ("nudged", layer.last.nudged)):
            if statistics is None:
                continue
            accumulate(phase, float(statistics.steps.numel()))
            accumulate(f"{phase}_steps", statistics.steps.sum())
            accumulate(f"{phase}_converged", statistics.converged.sum())
            accumulate("diverged", (~torch.isfinite(statistics.residual)).sum())
        nudged = layer.last.nudged
        if nudged is not None and nudged.asym is not None:
            # Where both nudged states coincide asym is 0/0: such an example says nothing about the contrast.
            defined = torch.isfinite(nudged.asym)
            accumulate("asym", torch.where(defined, nudged.asym, 0.0).sum())
            accumulate("asym_defined", defined.sum())
            accumulate("halvings", float(nudged.halvings))

    def _accumulate(self, values: Mapping[str, Tensor | float]) -> None:
        device, dtype = self.sums.device, self.sums.dtype
        row = [torch.as_tensor(values.get(name, 0.0), dtype=dtype, device=device) for name in NAMES]
        self.sums += torch.stack(row)

    def write(self, sums: Mapping[str, float]) -> None:
        """Set the sums to what `read` returned."""
        self.sums.copy_(torch.tensor([sums[name] for name in NAMES], dtype=self.sums.dtype))

    def read(self) -> dict[str, float]:
        """Return the sums as numbers (this waits for the device)."""
        return dict(zip(NAMES, self.sums.tolist(), strict=True))


def difference(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """Return the sums gathered between two readings."""
    return {name: now[name] - before.get(name, 0.0) for name in NAMES}


def ratio(part: float, whole: float) -> float | None:
    """Return `part / whole`, or None where there is nothing to divide by."""
    return part / whole if whole else None


def means(sums: Mapping[str, float]) -> dict[str, float | None]:
    """Return the means that results are reported as; None where a phase did not run.

    `converged_fraction` is over all relaxations, free and nudged.
    """
    relaxations = sums["free"] + sums["nudged"]
    return {
        "loss": ratio(sums["loss"], sums["examples"]),
        "accuracy": ratio(sums["correct"], sums["examples"]),
        "free_steps_mean": ratio(sums["free_steps"], sums["free"]),
        "nudged_steps_mean": ratio(sums["nudged_steps"], sums["nudged"]),
        "free_converged_fraction": ratio(sums["free_converged"], sums["free"]),
        "nudged_converged_fraction": ratio(sums["nudged_converged"], sums["nudged"]),
        "converged_fraction": ratio(sums["free_converged"] + sums["nudged_converged"], relaxations),
        "asym_mean": ratio(sums["asym"], sums["asym_defined"]),
        "halvings": sums["halvings"],
    }
