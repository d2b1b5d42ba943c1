"""S6: the quality of gradients, on sequences of up to 4,096 tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from toreq.data import seeded
from toreq.diagnostics.check import CheckResult, check
from toreq.estimators import Centered, Estimator, NonConservative, OneSided
from toreq.evidence import counting
from toreq.evidence.base import gradients as base
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.tepssr import nets
from toreq.evidence.tepssr.contraction import plain_norm
from toreq.layer import equilibria
from toreq.systems.tepssr_nets import CausalStateSpace, StateSpaceClassifier

SYMBOLS, CLASSES, EXAMPLES, BATCH, RATE = 8, 2, 4, 16, 3e-3
FEATURES, HIDDEN = 32, 32
COUPLING = 2.0
"""Initial scale, at which the norms begin at their bounds: a few steps would not make couplings strong."""
LENGTHS = (64, 512, 4096)
STEPS = {64: 100, 512: 60, 4096: 12}
"""Training steps between the two comparisons, by length."""
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"layers": 2, "attention": "none", "gain": 4.0}, "two tanh layers, selective maps, no attention"),
    "potential": ({"layers": 0, "attention": "linear"}, "the potential over the tokens, selective, linear attention"),
    "invariant": ({"layers": 1, "selective": False, "attention": "none"}, "one layer, time-invariant map"),
    "causal": ({}, "the causal network, which has no energy: its shipped estimator is NonConservative"),
}
SIDES = {f"{name}, {n} tokens": words for name, (_, words) in VARIANTS.items() for n in LENGTHS}
SMALLEST, RADIUS, NORM = "smallest cosine", "radius, trained", "norm, trained"


def first_mark(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random symbols with two marks, 0 and 1, anywhere; the class says which comes first.

    Args:
        count: sequences.
        length: at least 2.
        generator: of symbols and places.
    """
    x = torch.randint(2, SYMBOLS, (count, length), generator=generator)
    y = torch.randint(2, (count,), generator=generator)
    places = torch.rand(count, length, generator=generator).argsort(1)[:, :2].sort(1).values
    x.scatter_(1, places, torch.stack([y, 1 - y], 1))
    return x, y


class LastToken(nn.Module):
    """A causal network as a classifier: what it says at the last token."""

    def __init__(self, net: CausalStateSpace) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, C)``."""
        return self.net(x)[:, -1]


def build(variant: str, length: int, seed: int, small: bool) -> nn.Module:
    """One network, freshly drawn."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"features": 8, "hidden": 8} if small else {"features": FEATURES, "hidden": HIDDEN}
    options |= {"vocabulary": SYMBOLS, "coupling_scale": COUPLING, **VARIANTS[variant][0]}
    if variant == "causal":
        return LastToken(CausalStateSpace((length,), CLASSES, **options))
    return StateSpaceClassifier((length,), CLASSES, **options)


def train(net: nn.Module, length: int, steps: int, seed: int) -> int:
    """A few steps of Adam; returns the number of sequences seen."""
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    generator = seeded(seed, length)
    device = next(net.parameters()).device
    for _ in range(steps):
        x, y = (t.to(device) for t in first_mark(BATCH, length, generator))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return steps * BATCH


def candidates(variant: str) -> list[tuple[str, Estimator]]:
    """The estimators compared: the shipped one, and the cheaper one of energies."""
    if variant == "causal":
        return [(NonConservative.name, NonConservative())]
    return [(Centered.name, Centered()), (OneSided.name, OneSided())]


def compared(net: nn.Module, length: int, seed: int, variant: str, differences: bool) -> CheckResult:
    """Gradients on a few sequences against the implicit one of a tight float64 copy."""
    x, y = first_mark(EXAMPLES, length, seeded(seed, length, 1))
    device = next(net.parameters()).device
    return check(
        net, x.to(device), y.to(device), candidates=candidates(variant), finite_differences=differences, steps=()
    )  # fmt: skip


def run(trial: Trial) -> Outcome:
    """Compare the estimators on one network, before and after a little training."""
    variant, rest = trial.side.split(", ")
    length = int(rest.split()[0])
    small = not trial.budget.conclusive
    size, steps = (12, 1) if small else (length, STEPS[length])
    net = build(variant, size, trial.seed, small).to(trial.device)
    for layer in equilibria(net):
        layer.warn = False
    metrics: dict[str, Quantity] = {}
    worst, negligible, samples, differences = 1.0, 0.0, 0, 0.0
    for phase in base.PHASES:
        if phase == "trained":
            samples = train(net, size, steps, trial.seed)
            net.eval()
        # finite differences of long sequences would take longer than all else; the length changes no formula
        also = not small and length == LENGTHS[0] and phase == "trained"
        result = compared(net, size, trial.seed, variant, also)
        for row in result.gradients:
            if row.cosine is None:
                negligible = max(negligible, row.absolute_error)
                continue
            name = f"smallest cosine, {row.estimator}, {phase}"
            earlier = metrics[name].value if name in metrics else None
            metrics[name] = Quantity(min(1.0 if earlier is None else earlier, row.cosine), "")
            worst = min(worst, row.cosine)
        rows = [r.relative_error for r in result.differences if r.estimator == "implicit"]
        differences = max([differences, *rows])
        metrics[f"radius, {phase}"] = Quantity(result.radius, "")
        metrics[f"residual of the reference, {phase}"] = Quantity(result.reference_residual, "")
    if isinstance(net, LastToken):
        x, _ = first_mark(EXAMPLES, size, seeded(trial.seed, size, 1))
        metrics[NORM] = Quantity(plain_norm(net.net, x.to(trial.device), 3 if small else 30), "")
    metrics[SMALLEST] = Quantity(worst, "")
    metrics["error of negligible gradients"] = Quantity(negligible, "of the largest")
    if length == LENGTHS[0] and not small:
        metrics["reference against finite differences"] = Quantity(differences, "relative error")
    return Outcome(metrics, cost=Cost(counting.parameters(net), None, samples))


def _criteria() -> tuple[Criterion, ...]:
    found = [
        Criterion(f"{side}: {SMALLEST}", SMALLEST, "", "at_least", side, target=0.99, words=">0.99 cosine similarity",
                  aim=base.AIM)
        for side in SIDES
    ]  # fmt: skip
    found += [
        Criterion(f"{side}: {what}", what, "", "at_least", side, aim=base.RADIUS, condition=True, scale="log")
        for side in SIDES
        for what in [NORM if side.startswith("causal") else RADIUS]
    ]
    found += [
        Criterion(
            f"{name}: reference against finite differences", "reference against finite differences", "relative error",
            "at_most", f"{name}, {LENGTHS[0]} tokens", aim=base.MAX_DIFFERENCE_ERROR, condition=True,
        )
        for name in VARIANTS
    ]  # fmt: skip
    return tuple(found)


def _protocol() -> str:
    steps = ", ".join(f"{s} at {n:,} tokens" for n, s in STEPS.items())
    return f"""
    As B1, by sequence length: estimators at their shipped settings in float32 with the shipped solver on {EXAMPLES}
    sequences, before training and after a little of it (Adam at {RATE:g}, batch {BATCH}, steps: {steps}). Sequences
    are random symbols of {SYMBOLS}, two of which are marks at random places; the class is which of them comes first.
    Networks of {FEATURES} features and {HIDDEN} channels, whose couplings begin at the bounds of their norms. The
    reference is the implicit gradient of a float64 copy settled to a relative residual of 1e-12, on the shortest
    sequences itself compared with central finite differences of the loss after training. Judged is the smallest cosine
    over estimators (centered and one-sided for energies, the nonconservative one for the causal field), parameters and
    both phases; parameters whose reference gradient is below 1e-6 of the largest count by their absolute error.
    Couplings must be strong for this to mean anything: the trained relaxation's radius is asked to be at least
    {base.RADIUS:g}. Of the causal field it is the Jacobian's norm: what earlier tokens do to later ones is off the
    diagonal, where no radius sees it.
    """


CLAIM = Claim(
    id="S6",
    system="tepssr",
    seed_file=nets.SEED_FILE,
    sentence="Gradients are those of backprop, at any length.",
    criteria=_criteria(),
    protocol=_protocol(),
    sides=SIDES,
    run=run,
    picture=Picture(
        "1 - smallest cosine, trained networks", x_label="1 - cosine (smaller is better)",
        metrics=tuple(f"smallest cosine, {n}, trained" for n in (Centered.name, OneSided.name, NonConservative.name)),
        log_x=True, complement=True,
    ),
    printed=(RADIUS,),
)  # fmt: skip
