"""Tag every token of sequences of different lengths: which ones stand between the two marks?

python examples/tagging.py [--steps 150] [--length 24]

A state-space potential lets every token hear every other one by two scans, in time linear in their number. What marks
the beginning comes before a token and what marks the end after it: the tagger is trained by Equilibrium Propagation on
short sequences, filled up with padding, and then used on longer ones.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn

from toreq.diagnostics.gradients import gradients
from toreq.estimators import Implicit
from toreq.systems.tepssr_nets import StateSpaceTagger

PADDING, OPEN, CLOSE, LETTERS, NONE = 0, 1, 2, 8, -100


def sequences(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Letters with an opening and a closing mark, of half to the whole length; 1 for tokens from mark to mark."""
    x = torch.randint(3, 3 + LETTERS, (count, length), generator=generator)
    own = torch.randint(length // 2, length + 1, (count, 1), generator=generator)
    share = torch.rand(count, 2, generator=generator).sort(1).values
    first = (share[:, :1] * (own - 1)).long()
    last = torch.minimum(first + 1 + (share[:, 1:] * (own - first - 1)).long(), own - 1)
    x.scatter_(1, first, OPEN).scatter_(1, last, CLOSE)
    place = torch.arange(length)
    inside = ((place >= first) & (place <= last)).long()
    real = place < own
    return torch.where(real, x, PADDING), torch.where(real, inside, NONE)


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the tokens that are no padding whose tag is right."""
    with torch.no_grad():
        right = net(x).argmax(-1) == y
    return float(right[y != NONE].float().mean())


def main(steps: int = 150, batch: int = 32, length: int = 24, seed: int = 0) -> tuple[float, float, float]:
    """Train; return the cosine of the first gradient with the implicit one, and the test accuracies at the trained
    length and at four times that length, in [0, 1]."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    # --8<-- [start:net]
    net = StateSpaceTagger(
        (length,), 2, features=24, hidden=32, vocabulary=3 + LETTERS, padding=PADDING, attention="none"
    )
    # --8<-- [end:net]
    exact = copy.deepcopy(net)
    exact.equilibrium.estimator = Implicit()
    found, wanted = (
        torch.cat(
            [t.flatten() for t in gradients(one, *sequences(8, length, torch.Generator().manual_seed(1))).values()]
        )
        for one in (net, exact)
    )
    cosine = float(nn.functional.cosine_similarity(found, wanted, dim=0))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-2)
    for _ in range(steps):
        x, y = sequences(batch, length, g)
        optimizer.zero_grad()
        net.criterion(net(x), y).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    net.eval()
    short, long = (accuracy(net, *sequences(200, n, g)) for n in (length, 4 * length))
    return cosine, short, long


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="training batches")
    parser.add_argument("--length", type=int, default=24, help="longest training sequence")
    args = parser.parse_args()
    cosine, short, long = main(args.steps, length=args.length)
    print(f"cosine with the implicit gradient {cosine:.6f}")
    print(f"test accuracy {100 * short:.1f}%, at four times the length {100 * long:.1f}%")
