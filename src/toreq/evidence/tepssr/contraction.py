"""S7: the maps' decays stay inside the unit disk, and the relaxation contracts throughout training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toreq.core.spectral import field_products, relaxation_radius
from toreq.core.state import detached, norm, scaled
from toreq.evidence import counting
from toreq.evidence.base import nets as shared
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.tepssr import nets
from toreq.evidence.tpeqprop import fitting
from toreq.evidence.tpeqprop.fitting import Plan
from toreq.layer import equilibria
from toreq.systems.tepssr import TEPSSR
from toreq.systems.tepssr_nets import StateSpaceClassifier

VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"layers": 2, "gain": 4.0, "attention": "none"}, "two tanh layers, no attention"),
    "linear": ({"attention": "linear"}, "one tanh layer, linear attention among the tokens"),
    "softmax": ({"attention": "softmax"}, "one tanh layer, softmax attention among the tokens"),
    "potential": ({"layers": 0, "attention": "linear", "pool": 7}, "the potential over the tokens, linear attention"),
    "free": (
        {"attention": "linear", "norm_bound": None},
        "as linear, with norms that nothing bounds (ablation)",
    ),
}
SIDES = {name: words for name, (_, words) in VARIANTS.items()}
BOUNDED = ("layers", "linear", "softmax", "potential")
DECAY, RADIUS, NORM = "largest decay", "largest radius in training", "largest norm in training"
RATE, BATCH, LARGEST = 3e-3, 64, 16
"""LARGEST: examples that the largest radius is taken over."""
SMALL: dict[str, Any] = {"features": 8, "hidden": 8, "heads": 2}


@dataclass(frozen=True)
class Size:
    """Images for training and test, epochs, and looks at the relaxation in an epoch."""

    train: int
    test: int
    epochs: float
    looks: int


SIZES = {"smoke": Size(32, 20, 1, 1), "quick": Size(5000, 1000, 1, 6), "full": Size(20_000, 2000, 3, 8)}


def plain_norm(net: TEPSSR, x: Tensor, iterations: int = 30) -> float:
    r"""Largest singular value of the relaxation's Jacobian :math:`J\sigma'`, :math:`J = \partial f/\partial h`, at the
    equilibria of ``x``, the largest over examples, by power iteration.

    In pre-activations as they are. Of an energy the radius is the norm in the coordinates :math:`\sigma'^{1/2} a`, in
    which that Jacobian is symmetric; of a causal field it says nothing, since what earlier tokens do to later ones is
    off the diagonal.

    Args:
        net: the network.
        x: a batch.
        iterations: of the power method.
    """
    layer = net.equilibrium
    with torch.no_grad():
        bindings = detached(layer.dynamics.bind(x))
        a = layer.free_phase(bindings).state
        h = layer.dynamics.activate(a, bindings)
    transpose, forward = field_products(layer.dynamics, h, bindings, both=True)
    generator = torch.Generator(device=x.device).manual_seed(0)
    v = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device) for n, t in a.items()}
    size = norm(v)
    with torch.no_grad():
        for _ in range(iterations):
            u = forward(layer.dynamics.derivative(a, h, scaled(v, 1 / norm(v).clamp_min(1e-30)), bindings))
            size = norm(u)
            v = layer.dynamics.derivative(a, h, transpose(u), bindings)
    return float(size.max())


@torch.no_grad()
def radius(net: TEPSSR, x: Tensor) -> float:
    """Spectral radius of the relaxation's Jacobian, the largest over examples."""
    layer = net.equilibrium
    bindings = detached(layer.dynamics.bind(x))
    return float(relaxation_radius(layer.dynamics, bindings, layer.free_phase(bindings).state, 100).max())


def run(trial: Trial) -> Outcome:
    """Train one network on rows of digits and look at its relaxation all the way."""
    size = SIZES[trial.budget.name]
    small = not trial.budget.conclusive
    data = shared.mnist(size.train, size.test)
    torch.manual_seed(trial.seed)
    options = {**VARIANTS[trial.side][0], **(SMALL if small else {})}
    net = StateSpaceClassifier((1, 28, 28), 10, **options).to(trial.device)
    for layer in equilibria(net):
        layer.hasten()
        layer.warn = False
    x = data.inputs("test", slice(0, 2 if small else LARGEST)).to(trial.device)
    iterations = 2 if small else 30
    decays, norms, settled = [_decay(net)], [plain_norm(net, x, iterations)], []

    def watch(_: nn.Module) -> float:
        decays.append(_decay(net))
        norms.append(plain_norm(net, x, iterations))
        free = net.equilibrium.last.free
        assert free is not None
        settled.append(100 * float(free.converged.double().mean()))
        return radius(net, x)

    start = radius(net, x)
    plan = Plan(size.epochs, RATE, 16 if small else BATCH, tests=size.looks)
    at = fitting.fit(net, data, plan, seed=trial.seed, scratch=trial.scratch, watch=watch)
    curve = [(0.0, start), *at.marks]
    test, labels = data.inputs("test", slice(None)).to(trial.device), data.test_y.to(trial.device)
    metrics = {
        DECAY: Quantity(max(decays), ""),
        RADIUS: Quantity(max(value for _, value in curve), ""),
        NORM: Quantity(max(norms), ""),
        "radius, trained": Quantity(curve[-1][1], ""),
        "accuracy": Quantity(fitting.accuracy(net, test, labels), "%"),
        "relaxations settled": Quantity(min(settled), "%"),
    }
    with net.equilibrium.couplings_off():
        metrics["accuracy, couplings off"] = Quantity(fitting.accuracy(net, test, labels), "%")
    cost = Cost(counting.parameters(net), None, at.samples)
    return Outcome(metrics, {"radius": curve}, cost, tuple(n for n in [at.diverged] if n))


def _decay(net: TEPSSR) -> float:
    return max(float(values.abs().max()) for values in net.eigenvalues())


def _protocol() -> str:
    said = "; ".join(
        f"{name}: {s.train:,} images, {s.epochs:g} epochs, looked at {s.looks} times an epoch"
        for name, s in SIZES.items()
        if name != "smoke"
    )
    return f"""
    Two statements. (a) The decays of the state-space maps lie inside the unit disk: by construction, and checked at
    every look. (b) The relaxation contracts: the spectral radius of its Jacobian at the free equilibria of {LARGEST}
    test images, the largest over them, before training and throughout it. For an energy that radius is the Jacobian's
    norm in the coordinates in which the energy's curvature is measured; the norm in plain pre-activations is printed
    too, and may exceed 1 where one node is steeper than another. Networks as shipped (64 features and channels, fast
    settings, selective maps) on the rows of MNIST digits, Adam at {RATE:g}, batch {BATCH}, centered EqProp
    ({said}). Weak couplings make this easy, so that the trained radius and the accuracy with couplings off are printed.
    The bounds hold the couplings' linear part; what the layer norm and softmax add to it is measured, not bounded.
    """


CLAIM = Claim(
    id="S7",
    system="tepssr",
    seed_file=nets.SEED_FILE,
    sentence="The dynamics contract: spectral radius below 1.",
    criteria=(
        *(
            Criterion(f"{side}: {DECAY}", DECAY, "", "at_most", side, words="contractivity (spectral radius <1)",
                      target=1.0, beside=("free",))
            for side in BOUNDED
        ),
        *(
            Criterion(f"{side}: {RADIUS}", RADIUS, "", "at_most", side, words="contractivity (spectral radius <1)",
                      target=1.0, beside=("free",))
            for side in BOUNDED
        ),
        *(
            Criterion(f"{side}: {NORM}", NORM, "", "at_most", side, words="contractivity", aim=1.0, beside=("free",))
            for side in BOUNDED
        ),
    ),
    protocol=_protocol(),
    sides=SIDES,
    run=run,
    picture=Picture(
        "Spectral radius of the relaxation during training", x_label="epochs", y_label="radius", curves=("radius",)
    ),
    printed=("radius, trained", "accuracy, couplings off"),
)  # fmt: skip
