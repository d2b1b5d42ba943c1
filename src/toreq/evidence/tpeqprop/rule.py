"""T3: the local rule: errors times what the blocks read, and not the seed's two terms."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from toreq.core import Energy
from toreq.core.blocks import Linear
from toreq.core.residual import Residual
from toreq.core.state import Bindings, State, norm
from toreq.diagnostics.gradients import gradients, with_estimator
from toreq.estimators import Implicit, Predictive
from toreq.evidence import counting
from toreq.evidence.base import nets as shared
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.tpeqprop import nets
from toreq.layer import Equilibrium
from toreq.solvers import Anderson, FixedPoint
from toreq.systems.tpeqprop import chain

BOUNDS = {"float32": (torch.float32, 1e-6), "float64": (torch.float64, 1e-12)}
ENERGY_BOUND, AIMED = 1e-12, (0.5e-2, 2e-2)
"""Of the update against the gradient of the energy; and between what sizes of the errors beside the state that is
measured: beta is a power of two for each example."""
LARGE = Predictive(beta=0.0141, tolerance=1e-15, max_steps=100)
SETTLED, MOST_LEFT_OUT = 5e-15, 50.0
"""Residual up to which an example counts as settled there, and the percent of examples that may not be."""
NEGLIGIBLE = 1e-6
"""Share of the largest parameter's gradient below which an error is measured beside that share."""
LITERAL = "the seed's rule, "
SMOOTH = {"nonlinearity": "tanh"}
"""A nudge of a hundredth moves states across the kinks of a ReLU, where the two equations have no solution."""
NETS: dict[str, tuple[str, dict[str, Any], str]] = {
    "mlp": ("mlp", {"hidden": (96, 96, 96), **SMOOTH}, "dense levels, each with a matrix of its own"),
    "residual": ("residual", {"width": 96, "levels": 6, **SMOOTH}, "residual levels, each with a matrix of its own"),
    "residual, tied": ("residual", {"width": 96, "levels": 6, "tied": True, **SMOOTH}, "levels that share one matrix"),
    "conv": ("conv", {"channels": (8, 16), **SMOOTH}, "convolutional levels"),
    "transformer": ("transformer", {"features": 32, "hidden": 64}, "untied transformer blocks"),
    "transformer, tied": ("transformer", {"features": 32, "hidden": 64, "tied": True}, "one block, twice"),
    "plain PyTorch": ("", {}, "nn.TransformerEncoderLayer as levels, by vector-Jacobian products"),
    "residual, loop": ("residual", {"width": 96, "topology": "loop", **SMOOTH}, "one level that predicts itself"),
}
SIDES = {name: words for name, (_, _, words) in NETS.items()} | {
    f"{LITERAL}{name}": f"eps_l h_(l-1)^T - eps_(l+1) h_l^T on {NETS[name][2]}" for name in ("mlp", "residual, tied")
}
RATE, BATCH = 2e-3, 100


class Positions(nn.Module):
    """Adds a learned vector to each token: where there is no ink a token would be so short that any nudge turns it."""

    def __init__(self, count: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, features))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


class Plain(nn.Module):
    """A classifier of plain PyTorch blocks around a chain of levels."""

    def __init__(self, example: Tensor, features: int = 32, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True, "activation": "gelu"}
        embed = nn.Sequential(
            nn.Flatten(1), nn.Unflatten(1, (16, 49)), nn.Linear(49, features), Positions(16, features)
        )
        made = [nn.TransformerEncoderLayer(features, heads, 2 * features, **options) for _ in range(blocks)]
        self.equilibrium = chain(embed, *made, example=example)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16 * features, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, 10)``."""
        return self.head(self.equilibrium(x))


def network(name: str, trial: Trial) -> nn.Module:
    """The network of a side, freshly drawn; small for a smoke run."""
    arch, options, _ = NETS[name.removeprefix(LITERAL)]
    if not arch:
        torch.manual_seed(trial.seed)
        features = trial.budget.pick(8, 32, 32)
        return Plain(torch.zeros(1, 1, 28, 28), features).to(trial.device)
    small = dict(nets.SMALL[arch]) if trial.budget.name == "smoke" else {}
    if options.get("topology") == "loop":
        small.pop("levels", None)
    return nets.build(arch, trial.seed, **{**options, **small}).to(trial.device)


@dataclass(frozen=True)
class Phase:
    """A nudged phase and what was learned from it.

    Attributes:
        bindings: of the input, with a graph to the parameters.
        h, eps: states and errors by level.
        beta: ``(B,)``.
        shipped: parameter -> the update that the library makes.
    """

    bindings: Bindings
    h: State
    eps: State
    beta: Tensor
    shipped: dict[str, Tensor]


def nudged(net: nn.Module, x: Tensor, y: Tensor) -> Phase:
    """Run the layer's own estimator on a batch, once for its gradient and once for its states."""
    layer = nets.layer(net)
    head, loss = getattr(net, "head"), getattr(net, "criterion", nn.functional.cross_entropy)  # noqa: B009
    with torch.no_grad():
        out = layer(x)
    out.requires_grad_()
    with torch.enable_grad():
        (v,) = torch.autograd.grad(loss(head(out), y) * len(y), out)
        parameters = dict(layer.named_parameters())
        found = torch.autograd.grad(layer(x), list(parameters.values()), v, materialize_grads=True)
    joint = layer.solve_nudged(x, v).h
    statistics = layer.last.nudged
    assert statistics is not None
    assert statistics.beta is not None
    h, eps = ({n: joint[f"{kind}_{n}"] for n in layer.dynamics.names} for kind in ("h", "eps"))
    shipped = dict(zip(parameters, found, strict=True))
    with torch.enable_grad():
        return Phase(layer.dynamics.bind(x), h, eps, statistics.beta, shipped)


def settled(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Which examples' nudged states and errors meet both of their equations, bool ``(B,)``."""
    nudged(net, x, y)
    statistics = nets.layer(net).last.nudged
    assert statistics is not None
    return statistics.residual <= SETTLED


def of_errors(layer: Equilibrium, phase: Phase) -> dict[str, Tensor]:
    r"""Autograd of :math:`-\tfrac1\beta\sum_l\langle\epsilon_l, f_l(h_{l-1})\rangle`, errors and states held."""
    with torch.enable_grad():
        total = torch.zeros((), dtype=phase.beta.dtype, device=phase.beta.device)
        for name, term in residuals(layer):
            predicted = term.prediction(phase.h, phase.bindings[name])
            total = total - ((phase.eps[term.node] * predicted).flatten(1).sum(1) / phase.beta).sum()
        return _in_parameters(layer, total)


def of_energy(layer: Equilibrium, phase: Phase) -> dict[str, Tensor]:
    r"""Autograd of the energy at the nudged states, over :math:`\beta`."""
    assert isinstance(layer.dynamics, Energy)
    with torch.enable_grad():
        return _in_parameters(layer, (layer.dynamics(phase.h, phase.bindings) / phase.beta).sum())


def residuals(layer: Equilibrium) -> list[tuple[str, Residual]]:
    """The predictions of a layer by the name of their bindings, in the order of the levels."""
    assert isinstance(layer.dynamics, Energy)
    terms = {c.node: (name, c) for name, c in layer.dynamics.terms() if isinstance(c, Residual)}
    return [terms[n] for n in layer.dynamics.names]


def _in_parameters(layer: Equilibrium, total: Tensor) -> dict[str, Tensor]:
    parameters = dict(layer.named_parameters())
    # the graph of the bindings is used again
    found = torch.autograd.grad(
        total, list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, found, strict=True))


def largest_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest error of a parameter's gradient relative to its length, at least a millionth of the longest."""
    floor = max(NEGLIGIBLE * max(float(t.norm()) for t in wanted.values()), sys.float_info.min)
    return max(float((found[n] - t).norm()) / max(float(t.norm()), floor) for n, t in wanted.items())


def literal(layer: Equilibrium, phase: Phase) -> dict[str, Tensor]:
    r"""The seed's update of every matrix, :math:`\epsilon_l h_{l-1}^\top - \epsilon_{l+1}h_l^\top`, as a gradient.

    What a matrix reads, :math:`\sigma(h)`, stands for h; where levels share a matrix the terms of all add up. The first
    level, which no level precedes, and biases have no such rule and are left out.
    """
    terms = [term for _, term in residuals(layer)]
    found: dict[str, Tensor] = {}
    names = {id(m): n for n, m in layer.named_modules()}
    for at, term in enumerate(terms):
        if term.source is None:
            continue
        (linear,) = (m for m in term.block.modules() if isinstance(m, Linear))
        eps = phase.eps[term.node] / phase.beta[:, None]
        update = eps.T @ torch.tanh(phase.h[term.source])
        if at + 1 < len(terms):
            above = phase.eps[terms[at + 1].node] / phase.beta[:, None]
            update = update - above.T @ torch.tanh(phase.h[term.node])
        key = f"{names[id(linear)]}.weight"
        found[key] = found.get(key, torch.zeros_like(update)) - update
    return found


def cosine(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The smallest cosine over the parameters of ``found`` whose wanted gradient is not negligible."""
    floor = NEGLIGIBLE * max(float(t.norm()) for t in wanted.values())
    pairs = [(t.double().flatten(), wanted[n].double().flatten()) for n, t in found.items()]
    return min(float(torch.dot(a, b) / (a.norm() * b.norm())) for a, b in pairs if float(b.norm()) > floor)


def _compared(net: nn.Module, x: Tensor, y: Tensor, metrics: dict[str, Quantity], when: str) -> None:
    for name, (dtype, _) in BOUNDS.items():
        net.to(dtype)
        phase = nudged(net, x.to(dtype), y)
        error = largest_error(phase.shipped, of_errors(nets.layer(net), phase))
        metrics[f"error of the rule, {name}, {when}"] = Quantity(error, "relative")
    net.to(torch.float64)
    large = with_estimator(net, LARGE)
    if isinstance(nets.layer(net).solver, Anderson):
        # at a residual of rounding errors alone its small systems are singular
        nets.layer(large).solver = FixedPoint()
    kept = settled(large, x.double(), y)
    metrics[f"examples left out, {when}"] = Quantity(100 * float((~kept).double().mean()), "%")
    if bool(kept.any()):
        phase = nudged(large, x[kept].double(), y[kept])
        error = largest_error(phase.shipped, of_energy(nets.layer(large), phase))
        metrics[f"error against the energy, {when}"] = Quantity(error, "relative")
        size = norm(phase.eps) / norm(phase.h)
        metrics[f"errors beside the state, {when}"] = Quantity(float(size.log().mean().exp()), "")
    implicit = gradients(with_estimator(net, Implicit(tolerance=1e-12)), x.double(), y)
    own = gradients(net, x.double(), y)
    metrics[f"cosine with backprop, {when}"] = Quantity(cosine(own, implicit), "")
    net.to(torch.float32)


def _literal(net: nn.Module, x: Tensor, y: Tensor, metrics: dict[str, Quantity], when: str) -> None:
    net.to(torch.float64)
    phase = nudged(net, x.double(), y)
    found = literal(nets.layer(net), phase)
    wanted = of_errors(nets.layer(net), phase)
    metrics[f"cosine with backprop, {when}"] = Quantity(cosine(found, wanted), "")
    error = largest_error(found, {n: wanted[n] for n in found})
    metrics[f"error of the rule, float64, {when}"] = Quantity(error, "relative")
    net.to(torch.float32)


def run(trial: Trial) -> Outcome:
    """The shipped update of one network against both derivations of it, before and after training."""
    steps, batch = trial.budget.pick(2, 60, 300), trial.budget.pick(4, 16, 16)
    size = trial.budget.pick(8, BATCH, BATCH)
    data = shared.mnist(max(batch, min(steps * size, 30_000)), trial.budget.pick(20, 1000, 2000))
    x, y = data.inputs("train", slice(0, batch)).to(trial.device), data.train_y[:batch].to(trial.device)
    net = network(trial.side, trial).eval()  # in training a bounded norm is estimated anew at every step
    measure = _literal if trial.side.startswith(LITERAL) else _compared
    metrics: dict[str, Quantity] = {}
    measure(net, x, y, metrics, "untrained")
    samples = shared.fit(net, data, steps, batch=size, rate=RATE, seed=trial.seed)
    measure(net, x, y, metrics, "trained")
    for name in {key.rsplit(",", 1)[0] for key in metrics}:
        both = [q for key, q in metrics.items() if key.startswith(f"{name}, ")]
        values = [q.value for q in both if q.value is not None]
        worst = min if name.startswith("cosine") else max
        metrics[name] = Quantity(worst(values), both[0].unit)
    metrics["accuracy"] = Quantity(shared.accuracy(net, data), "%")
    metrics["radius"] = Quantity(nets.layer(net).radius(x), "")
    return Outcome(metrics, cost=Cost(counting.parameters(net), None, samples))


def _criteria() -> tuple[Criterion, ...]:
    found: list[Criterion] = []
    seed = "eps_l h_{l-1}^T - eps_{l+1} h_l^T"
    for name in NETS:
        for precision, (_, bound) in BOUNDS.items():
            metric = f"error of the rule, {precision}"
            found.append(Criterion(f"{name}: {metric}", metric, "relative", "at_most", name, words=seed, aim=bound))
        metric = "error against the energy"
        found.append(Criterion(f"{name}: {metric}", metric, "relative", "at_most", name, words=seed, aim=ENERGY_BOUND))
        found.append(
            Criterion(
                f"{name}: errors beside the state", "errors beside the state", "", "between", name, target=AIMED,
                condition=True,
            )
        )  # fmt: skip
        found.append(
            Criterion(
                f"{name}: examples left out", "examples left out", "%", "at_most", name, target=MOST_LEFT_OUT,
                condition=True,
            )
        )  # fmt: skip
    first = found[1]
    rows = tuple(side for side in SIDES if side.startswith(LITERAL))
    return (found[0], replace(first, beside=rows), *found[2:])


CLAIM = Claim(
    id="T3",
    system="tpeqprop",
    seed_file=nets.SEED_FILE,
    sentence="The update of every block is a local rule, the gradient of the energy.",
    criteria=_criteria(),
    protocol=f"""
    The rule that is claimed is the derived one: for tied and untied levels the update of a block is the error of the
    level that it predicts, pulled back through the block alone at the state of the level that it reads. On
    networks of all block types (chains untied and tied, plain PyTorch blocks, one loop; MNIST, drawn and
    after 60 (quick) or 300 (full) steps of Adam at {RATE:g}, batch {BATCH}) and 16 images the shipped update of every
    parameter below the read-out is compared with autograd of -1/beta sum_l <eps_l, f_l(h_(l-1))>, errors and states
    held, at the shipped nudge: 1e-6 in float32, 1e-12 in float64. With errors of a hundredth of the state (beta is a
    power of two for each example, so that the mean ratio is asked to be between {AIMED[0]:g} and {AIMED[1]:g}), settled
    in at most {LARGE.max_steps} turns, it is compared with autograd of the energy itself at the nudged states: 1e-12 in
    float64. Examples that do not settle under so large a nudge (a residual above {SETTLED:g}) are left out there, and
    counted: at most {MOST_LEFT_OUT:g}%. Autograd runs in the same precision. Nonlinearities are smooth (tanh, gelu),
    since a nudge of that size moves states across the kinks of a ReLU, where the two equations have no solution. The
    loss is the sum over examples. Each number is the largest over parameters and both phases; a parameter whose
    gradient is shorter than {NEGLIGIBLE:g} of the longest counts by its error beside that length. The seed's rule, word
    for word on the two networks of square matrices, stands beside it: its smallest cosine with the gradient over
    matrices and phases. A chain's relaxation has radius 0 whatever its weights, so that no radius is asked for; that of
    the loop is printed.
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "Shipped update against the derived rule and the energy",
        x_label="largest relative error over parameters",
        metrics=("error of the rule, float32", "error of the rule, float64", "error against the energy"),
        log_x=True,
    ),
    printed=("radius", "cosine with backprop"),
)
