"""D1 and D2: trained on clean digits, tested under Gaussian noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from toreq import systems
from toreq.data import Dataset, gaussian_noise
from toreq.diagnostics.relaxation import predictions
from toreq.estimators import Thermal
from toreq.evidence.base import nets as shared
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.difftoreqprop import nets
from toreq.evidence.protocols.robustness import baselines
from toreq.evidence.protocols.robustness.corruptions import CLIPS, SIGMAS, noise_curve
from toreq.evidence.tpeqprop.fitting import Plan
from toreq.layer import equilibria
from toreq.solvers import Langevin
from toreq.systems.difftoreqprop_parts import own_generator

VISIBLE = ("v",)
"""The node that is sampled, while the others settle."""
EQUAL: dict[str, Any] = {"lift": 1.0, "gain": 1.0, "label_gain": 16.0}
"""Slopes where all nodes are sampled: at a temperature tau no unit has more than 1/(3 tau)."""
TEMPERATURE, HOT, STEP = 0.05, 0.5, 0.7
"""Temperatures, at which a visible node of slope 1/2 has deviations of 0.16 and 0.5 (a quarter more by the bias of the
step); and the chain's step, in units of the slopes."""
NOISE = 0.5
CLEAN, UNCLIPPED, CLIPPED = "clean accuracy", "accuracy, sigma 0.5 unclipped", "accuracy, sigma 0.5 clipped"


@dataclass(frozen=True)
class Size:
    """What a budget buys.

    Attributes:
        train, test: images.
        width, channels: of the hidden layers.
        epochs: of dense and of convolutional networks.
        batch: images in a step.
        chain: steps of burn-in and samples of a chain.
        sigmas: of the test images' noise.
    """

    train: int
    test: int
    width: int
    channels: tuple[int, int]
    epochs: dict[str, float]
    batch: int
    chain: tuple[int, int]
    sigmas: tuple[float, ...]


SIZES = {
    # two steps: a norm that grew in the last one is held from the next on
    "smoke": Size(20, 10, 8, (2, 2), {"mlp": 1.0, "conv": 1.0}, 10, (2, 2), (0.5,)),
    "quick": Size(5000, 1000, 256, (16, 32), {"mlp": 2.0, "conv": 1.0}, 64, (8, 8), (0.0, 0.5, 1.0)),
    "full": Size(60_000, 5000, 512, (16, 32), {"mlp": 2.0, "conv": 1.0}, 128, (8, 12), SIGMAS),
}
CURVES = {
    "smoke": SIZES["smoke"],
    "quick": replace(SIZES["quick"], sigmas=tuple(round(0.25 * i, 2) for i in range(5))),
    "full": replace(SIZES["full"], train=20_000, test=2000, epochs={"mlp": 2.0}),
}
"""Sizes of D2: dense networks alone, on fewer images and more levels of noise."""
BOUNDED, RATE = 1e-2, 2e-3
"""Rates of energies, whose couplings are bounded in norm, and of the others."""


class NoiseTrained(nn.Module):
    """A network that sees Gaussian noise on its training images.

    Args:
        inner: the network.
        sigma: standard deviation, not clipped.
    """

    def __init__(self, inner: nn.Module, sigma: float) -> None:
        super().__init__()
        self.inner, self.sigma, self.generator = inner, sigma, own_generator()

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        if self.training:
            x = gaussian_noise(x, self.sigma, None, generator=self.generator)
        return self.inner(x)


def _thermal(
    temperature: float, noisy: tuple[str, ...] | None = VISIBLE, **options: Any
) -> Callable[[str, Size, Trial], nn.Module]:
    def make(arch: str, size: Size, trial: Trial) -> nn.Module:
        burn_in, samples = size.chain
        chain = Langevin(
            temperature=temperature, step_size=STEP, preconditioned=True, noisy=noisy, burn_in=burn_in,
            samples=samples, seed=trial.seed, max_steps=burn_in + samples,
        )  # fmt: skip
        estimator = Thermal(burn_in=burn_in // 2)
        return _own(arch, size, trial, solver=chain, estimator=estimator, **{"direct": False, **options})

    return make


def _settled(**options: Any) -> Callable[[str, Size, Trial], nn.Module]:
    return lambda arch, size, trial: _own(arch, size, trial, settings="fast", **options)


def _own(arch: str, size: Size, trial: Trial, **options: Any) -> nn.Module:
    widths: dict[str, Any] = {"hidden": (size.width,)} if arch == "mlp" else {"channels": size.channels}
    return nets.build(trial.seed, arch=arch, **widths, **options)


def _base(arch: str, size: Size, trial: Trial) -> nn.Module:
    widths: dict[str, Any] = {"hidden": (size.width,)} if arch == "mlp" else {"channels": size.channels}
    torch.manual_seed(trial.seed)
    return systems.create("toreqprop", nets.SHAPE, nets.CLASSES, arch=arch, settings="fast", **widths)


def _plain(arch: str, size: Size, trial: Trial) -> nn.Module:
    torch.manual_seed(trial.seed)
    return baselines.mlp(width=size.width) if arch == "mlp" else baselines.cnn(size.channels)


def _noise_trained(arch: str, size: Size, trial: Trial) -> nn.Module:
    return NoiseTrained(_plain(arch, size, trial), NOISE)


MAKERS: dict[str, tuple[str, Callable[[str, Size, Trial], nn.Module]]] = {
    "langevin": (
        f"Langevin noise in the visible node at temperature {TEMPERATURE}, by the thermal contrast",
        _thermal(TEMPERATURE),
    ),
    "langevin hot": (f"the same at {HOT}, at which the visible node's noise is that of the test", _thermal(HOT)),
    "langevin all": (
        f"noise in all nodes at {TEMPERATURE}, slopes that noise allows, couplings up to a norm of 1",
        _thermal(TEMPERATURE, None, norm_bound=1.0, **EQUAL),
    ),
    "langevin direct": (
        f"the same at {TEMPERATURE}, its hidden layers driven by the input as well",
        _thermal(TEMPERATURE, direct=True),
    ),
    "frozen": (
        "one draw of noise on the clamp for each relaxation, of a deviation that is learned, begun at 0.5: this is "
        "noise on the training images by another name, and so a row of its own",
        _settled(direct=False, noise=NOISE),
    ),
    "denoiser": ("trained as a denoiser of all levels too, a row of its own", _settled(denoising=1.0)),
    "settled": ("the same network without noise (ablation)", _settled(direct=False)),
    "cep": ("the base: toreqprop by centered EqProp", _base),
    "bp": ("backprop, ReLUs", _plain),
    "bp noise-trained": (f"backprop on images with noise of {NOISE}", _noise_trained),
    "wiener + bp": ("the same after a Wiener filter that is told sigma", _plain),
}  # fmt: skip
"""Kind of a side -> what it is, and its untrained network."""
ONLY_DENSE = ("langevin hot", "langevin all", "langevin direct")
SIDES = {
    f"{kind} {arch}": f"{words}, {'one dense hidden layer' if arch == 'mlp' else 'two convolutions'}"
    for arch in ("mlp", "conv")
    for kind, (words, _) in MAKERS.items()
    if arch == "mlp" or kind not in ONLY_DENSE
} | {"gaussians": "a Gaussian for each class (QDA) that is told sigma"}


def trained(side: str, trial: Trial, size: Size) -> tuple[nn.Module, Dataset, Cost, tuple[str, ...]]:
    """The classifier of a side, trained on clean images, with the data and what it was given."""
    data = shared.mnist(size.train, size.test)
    if side == "gaussians":
        found = baselines.Gaussians(data.inputs("train", slice(None)), data.train_y, nets.CLASSES)
        return found.to(trial.device).eval(), data, Cost(None, None, len(data.train_y)), ()
    kind, arch = side.rsplit(" ", 1)
    net = MAKERS[kind][1](arch, size, trial).to(trial.device)
    rate = BOUNDED if equilibria(net) else RATE
    plan = Plan(size.epochs[arch], rate, size.batch, tests=1, tested=min(500, size.test), clip=5.0)
    done = nets.fit(net, data, plan, trial.seed, trial.scratch)
    if kind == "wiener + bp":
        net = baselines.Wiener(net, data.inputs("train", slice(None))).to(trial.device).eval()
    return net, data, done.cost, done.notes


def measured(side: str, trial: Trial, size: Size) -> Outcome:
    """Train a side and classify clean and noisy test images."""
    net, data, cost, notes = trained(side, trial, size)
    x, y = nets.shown(data, trial.device)
    with torch.no_grad():
        clean = 100 * float((predictions(net, x) == y).double().mean())
    metrics = {CLEAN: Quantity(clean, "%")}
    curves = {}
    for clip in CLIPS:
        points = noise_curve(net, x, y, clip, trial.seed, size.sigmas)
        curves[clip] = points
        metrics[f"accuracy, sigma 0.5 {clip}"] = Quantity(dict(points)[0.5], "%")
    if not side.startswith(("langevin", "wiener", "gaussians")):
        metrics |= nets.coupled(net, x, y)
    if isinstance(net, systems.System):
        with torch.no_grad():
            net(x[:100])
        free = nets.layer(net).last.free
        assert free is not None
        metrics["relaxations settled"] = Quantity(100 * float(free.converged.double().mean()), "%")
    return Outcome(metrics, curves, cost, notes)


def run(trial: Trial) -> Outcome:
    """D1: train one side and test it."""
    return measured(trial.side, trial, SIZES[trial.budget.name])


def run_curves(trial: Trial) -> Outcome:
    """D2: the same for dense networks, at more levels of noise."""
    found = measured(trial.side, trial, CURVES[trial.budget.name])
    held = {}
    for clip, points in found.curves.items():
        for bound in (90, 80):
            # up to the first level that falls below, not the last one above
            good = [sigma for sigma, accuracy in points if accuracy is not None and accuracy >= bound]
            bad = [sigma for sigma, accuracy in points if accuracy is None or accuracy < bound]
            last = max((s for s in good if not bad or s < min(bad)), default=0.0)
            held[f"largest sigma with {bound}%, {clip}"] = Quantity(last, "")
    return replace(found, metrics={**found.metrics, **held})


def _of(name: str, metric: str, side: str, **more: Any) -> Criterion:
    return Criterion(name, metric, more.pop("unit", "%"), more.pop("direction", "at_least"), side, **more)


WORDS = "95%+ accuracy vs. 92% for base EqProp"
MLP, CONV = "langevin mlp", "langevin conv"
DIRECT = "langevin direct mlp"  # D2 has it
D1_SIDES = {side: words for side, words in SIDES.items() if side != DIRECT}
MLP_ROWS = tuple(s for s in D1_SIDES if not s.endswith("conv") and s != MLP)
CONV_ROWS = tuple(s for s in SIDES if s.endswith("conv") and s != CONV)
CLAIM_D1 = Claim(
    id="D1",
    system="difftoreqprop",
    seed_file=nets.SEED_FILE,
    sentence="Trained on clean digits, it classifies digits under Gaussian noise of 0.5 better than EqProp does.",
    criteria=(
        _of("dense: sigma 0.5, unclipped", UNCLIPPED, MLP, target=95.0, words=WORDS, aim=95.0, beside=MLP_ROWS),
        _of("dense: above the base", UNCLIPPED, MLP, unit="points", versus=("cep mlp",), words="95%+ vs. 92%"),
        _of("dense: clean accuracy beside the base", CLEAN, MLP, unit="points", target=-0.5, versus=("cep mlp",)),
        _of("conv: sigma 0.5, unclipped", UNCLIPPED, CONV, target=95.0, words=WORDS, aim=97.0, beside=CONV_ROWS,
            seeds=1),
        _of("conv: sigma 0.5, clipped", CLIPPED, CONV, aim=90.0, beside=CONV_ROWS, seeds=1),
        _of("conv: clean accuracy beside the base", CLEAN, CONV, unit="points", target=-0.5, versus=("cep conv",),
            seeds=1),
    ),
    protocol=f"""
    MNIST, pixels in [0, 1]; one dense hidden layer of {SIZES["full"].width} units ({SIZES["quick"].width} in a quick
    run), or two 5 x 5 convolutions of stride 2. Adam at {BOUNDED:g} (energies, whose couplings are bounded) and
    {RATE:g} (backprop), a half cosine after a rise over 5% of the steps, gradients clipped at norm 5, as many epochs
    for every side of one architecture (full: {SIZES["full"].epochs["mlp"]:g} and {SIZES["full"].epochs["conv"]:g} of
    60,000 images; quick: 5,000 images). Test noise is the same draw for every side, unclipped and clipped to [0, 1].
    The method: in training and at test the visible node is sampled by Langevin dynamics (step {STEP} in units of its
    slope, {SIZES["full"].chain[0]} steps and then {SIZES["full"].chain[1]} samples, quick: {SIZES["quick"].chain[0]}
    and {SIZES["quick"].chain[1]}) under the energy that the other nodes leave where they settle; the input reaches the
    hidden layers by the visible node alone, and the thermal contrast gives the gradient; no noise is added to the
    images. At a temperature tau the visible node's noise has deviation sqrt(tau/2), a quarter more by the bias of the
    step. Rows that are not the method: noise frozen for each relaxation (which is noise on the training images), a
    network trained as a denoiser too, backprop on noisy images. Rates, temperature and slopes are from short trials on
    5,000 images; every side has one recipe. One seed for convolutions, judged on its value.
    """,
    sides=D1_SIDES,
    run=run,
    picture=Picture("Accuracy under noise, unclipped", x_label="sigma", y_label="accuracy (%)", curves=("unclipped",)),
    printed=(CLEAN,),
)  # fmt: skip

D2_SIDES = {side: SIDES[side] for side in SIDES if not side.endswith("conv")}
CLAIM_D2 = Claim(
    id="D2",
    system="difftoreqprop",
    seed_file=nets.SEED_FILE,
    sentence="Under noise at which the base falls below 80%, it stays above 90%.",
    criteria=(
        _of("above 90% at sigma 0.5", UNCLIPPED, MLP, target=90.0, words=">90% accuracy at high noise levels",
            beside=(*MLP_ROWS, DIRECT)),
        _of("the base below 80% there", UNCLIPPED, "cep mlp", direction="at_most", target=80.0,
            words="where base drops to <80%"),
        _of("noise held at 90%, against the base", "largest sigma with 90%, unclipped", MLP, unit="",
            versus=("cep mlp",), beside=MLP_ROWS),
        _of("noise held at 90%, clipped, against the base", "largest sigma with 90%, clipped", MLP, unit="",
            versus=("cep mlp",), beside=MLP_ROWS),
    ),
    protocol=f"""
    The dense networks of D1, trained in the same way on clean images (full: {CURVES["full"].train:,}, two epochs;
    quick: {CURVES["quick"].train:,}), over sigma from 0 to 1 (steps of 0.1, quick: 0.25), unclipped and clipped to
    [0, 1]; the largest sigma up to which the accuracy stays at 90% and at 80%. The seed
    names no level: sigma {NOISE} is taken, at which D1 is measured. Every side has one recipe.
    """,
    sides=D2_SIDES,
    run=run_curves,
    picture=Picture("Accuracy under noise, clipped", x_label="sigma", y_label="accuracy (%)", curves=("clipped",)),
    printed=(CLEAN,),
)  # fmt: skip
