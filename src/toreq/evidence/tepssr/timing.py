"""S1: inference time against sequence length, beside fused softmax attention and an LSTM."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from toreq.data import seeded
from toreq.evidence import counting
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.tepssr import nets
from toreq.layer import equilibria, wrap
from toreq.solvers import Anderson
from toreq.systems.looped_transformer import LoopedTransformer
from toreq.systems.tepssr_nets import StateSpaceClassifier

SIDES = {
    "tepssr": "tokens and one layer joined by a time-invariant state-space map, no attention",
    "tepssr, selective": "the same with step sizes and gates that depend on the input",
    "tepssr, attention": "the same (time-invariant) with linear attention beside it",
    "looped, fused": "an ordinary block in a loop: softmax attention by PyTorch's fused kernel, and a perceptron",
    "looped, energy": "the looped transformer of the base: softmax attention energy, tied perceptron",
    "lstm": "LSTM, one pass",
}
QUADRATIC = ("looped, fused", "looped, energy")
FEATURES, HEADS, HIDDEN, INPUTS, CLASSES = 64, 4, 64, 8, 10
PERCEPTRON, TIED, RECURRENT = 32, 64, 48
"""Widths of the perceptrons of the looped transformers and of the LSTM, with which each has as many weights as the
network, to a tenth; the learned positions of the looped transformer of the base are not among them."""
TOKENS, REPEATS, TOLERANCE = 16_384, 3, 3e-3
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16_384)
LONGEST_QUADRATIC = 4096
SEEDS = 5  # timings scatter: of three seeds the interval of the exponent lay across its bound
EXPONENT, MOST = "exponent", 1.1
FASTER = {1024: (2.0, "2-5x speedup"), 4096: (5.0, "2-5x speedup")}


class Pooled(nn.Module):
    """A loop over embedded tokens, read out by their mean.

    Args:
        inputs: numbers at each position.
        inner: from ``(B, N, D)`` to ``(B, N, width)``.
        width: of what it gives.
    """

    def __init__(self, inputs: int, inner: nn.Module, width: int = FEATURES) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(inputs, FEATURES), nn.LayerNorm(FEATURES))
        self.inner, self.head = inner, nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, C)``."""
        h = self.inner(self.embed(x))
        return self.head((h[0] if isinstance(h, tuple) else h).mean(1))


class Imaged(nn.Module):
    """The looped transformer on numbers, given as the rows of an image."""

    def __init__(self, net: LoopedTransformer) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, C)``."""
        return self.net(x[:, None])


def build(side: str, length: int, seed: int) -> nn.Module:
    """A side's network for sequences of one length."""
    torch.manual_seed(seed)
    if side == "lstm":
        return Pooled(INPUTS, nn.LSTM(FEATURES, RECURRENT, batch_first=True), RECURRENT)
    if side == "looped, fused":
        block = nets.Block(FEATURES, PERCEPTRON, HEADS, length, ("attention", "mlp"))
        net: nn.Module = Pooled(INPUTS, wrap(block, (length, FEATURES), solver=Anderson(length=3)))
    elif side == "looped, energy":
        shape = (1, length, INPUTS)
        net = Imaged(
            LoopedTransformer(
                shape, CLASSES, features=FEATURES, heads=HEADS, hidden=TIED, patch="rows", pool="mean"
            )
        )  # fmt: skip
    else:
        net = StateSpaceClassifier(
            (length, INPUTS), CLASSES, features=FEATURES, hidden=HIDDEN, selective=side.endswith("selective"),
            attention="linear" if side.endswith("attention") else "none",
        )  # fmt: skip
    for layer in equilibria(net):
        layer.hasten()
        layer.solver = Anderson(length=3, tolerance=TOLERANCE)
        layer.warn = False
    return net


def processor_seconds(function: Callable[[], object], repeats: int) -> float:
    """The least processor time of some calls, after one that is not timed."""
    function()
    found = []
    for _ in range(repeats):
        started = time.process_time()
        function()
        found.append(time.process_time() - started)
    return max(min(found), 1e-9)


def slope(points: list[tuple[float, float]]) -> float:
    """Least-squares slope of the second number's logarithm against the first one's."""
    x, y = np.log(np.array(points, dtype=np.float64)).T
    return float(np.polyfit(x, y, 1)[0])


@torch.no_grad()
def run(trial: Trial) -> Outcome:
    """Time one side over all lengths."""
    lengths = trial.budget.pick((32, 64), LENGTHS, LENGTHS)
    if trial.side in QUADRATIC:
        lengths = tuple(n for n in lengths if n <= LONGEST_QUADRATIC)
    tokens, repeats = trial.budget.pick(64, TOKENS, TOKENS), trial.budget.pick(1, REPEATS, REPEATS)
    points: list[tuple[float, float]] = []
    steps: list[tuple[float, float]] = []
    metrics: dict[str, Quantity] = {}
    parameters = 0
    for length in lengths:
        net = build(trial.side, length, trial.seed).to(trial.device).eval()
        size = max(1, tokens // length)
        x = torch.randn(size, length, INPUTS, generator=seeded(trial.seed, length)).to(trial.device)
        seconds = processor_seconds(lambda net=net, x=x: net(x), repeats) / size
        points.append((float(length), 1e3 * seconds))
        parameters = counting.parameters(net)
        for layer in equilibria(net):
            assert layer.last.free is not None
            steps.append((float(length), float(layer.last.free.steps.double().mean())))
        if length in FASTER or not trial.budget.conclusive:
            metrics[f"time, {length:,} tokens"] = Quantity(1e3 * seconds, "ms")
    for place, length in enumerate(FASTER):
        at = length if trial.budget.conclusive else lengths[place]
        metrics[f"log time, {length:,} tokens"] = Quantity(math.log(dict(points)[float(at)]), "ln ms")
    metrics[EXPONENT] = Quantity(slope(points), "")
    metrics["relaxation steps at the longest"] = Quantity(steps[-1][1] if steps else None, "steps")
    return Outcome(metrics, {"time": points, **({"steps": steps} if steps else {})}, Cost(parameters))


def _criteria() -> tuple[Criterion, ...]:
    found = [
        Criterion(
            "exponent of time in length", EXPONENT, "", "at_most", "tepssr", words="O(N) inference", target=MOST,
            aim=MOST, beside=tuple(s for s in SIDES if s != "tepssr"), seeds=SEEDS,
        )
    ]  # fmt: skip
    for length, (times, words) in FASTER.items():
        found.append(
            Criterion(
                f"log of time at {length:,} tokens, against fused attention", f"log time, {length:,} tokens", "ln ms",
                "at_most", "tepssr", words=words, target=-math.log(2.0), aim=-math.log(times),
                versus=("looped, fused",), beside=("tepssr, selective", "tepssr, attention", "looped, energy", "lstm"),
                seeds=SEEDS,
            )
        )  # fmt: skip
    return tuple(found)


CLAIM = Claim(
    id="S1",
    system="tepssr",
    seed_file=nets.SEED_FILE,
    sentence="Inference takes time linear in the sequence length, and less than a looped transformer.",
    criteria=_criteria(),
    protocol=f"""
    Freshly drawn networks of {FEATURES} features on random sequences of {INPUTS} numbers a position, {LENGTHS[0]} to
    {LENGTHS[-1]:,} positions (softmax attention up to {LONGEST_QUADRATIC:,}), in batches of {TOKENS:,} tokens in all.
    Timed is what answers a sequence: embedding, relaxation to a relative residual of {TOLERANCE:g} by Anderson
    acceleration over three iterates, read-out; one pass for the LSTM. Processor time, the least of {REPEATS} calls
    after one that is not timed, per sequence. The exponent is the least-squares slope of its logarithm over that of the
    length. The opponent is the fastest kernel of PyTorch on this device, scaled_dot_product_attention, in an ordinary
    block with free queries, keys and values ({HEADS} heads, a perceptron of {PERCEPTRON}), which has no energy; the
    attention energy of the base, whose keys have a field too (a tied perceptron of {TIED}), is beside it. Widths are
    such that all have about as many weights as the network, whose two variants have more; learned positions are not
    counted. Differences of logarithms are paired by
    seed: -0.693 is half the time, -1.609 a fifth. The number of steps is each network's own.
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "Inference time against length", x_label="tokens", y_label="processor time a sequence (ms)", curves=("time",),
        log_x=True, log_y=True,
    ),
    exclusive=True,
    printed=("relaxation steps at the longest",),
)  # fmt: skip
