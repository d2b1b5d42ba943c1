"""Time the forms of the state-space scan, and the field of its potential beside the tied perceptron and attention.

python scripts/ssm_forms.py [--tokens 784] [--features 128] [--batch 64] [--repeats 5]

Prints the median milliseconds of a forward and an adjoint pass of each form on this machine, with one line per chunk:
the recurrence token by token (once, it is slow), the chunked forms of the time-invariant and the selective map, and for
the time-invariant one the product of spectra. Then those of whole fields, and of fields over growing lengths with the
exponent fitted to them. Run it alone.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from toreq.core import SSM, Attention, Coupling, Dense, LinearAttention, Potential
from toreq.core.scan import by_fft, sequential


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median over the repeats, after one that does not count."""
    run()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return 1000 * statistics.median(taken)


def operator(features: int, selective: bool, chunk: int) -> SSM:
    """From D to D channels, one state each."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    gates = nn.Linear(features, 3 * features) if selective else None
    return SSM(features, features, gates=gates, chunk=chunk, generator=g)


def forms(u: Tensor, repeats: int, chunks: tuple[int, ...]) -> None:
    """One line for each form."""
    tokens, features = u.shape[1:]
    for selective in (False, True):
        kind = "selective" if selective else "time-invariant"
        for chunk in chunks:
            op = operator(features, selective, chunk)
            t = {**op.tensors(), **op.inputs(u)}
            forward, back = (milliseconds(lambda f=f, t=t: f(u, t), repeats) for f in (op.forward, op.adjoint))
            print(f"{kind:15} chunks of {chunk:4}: forward {forward:8.1f} ms, adjoint {back:8.1f} ms", flush=True)
    op = operator(features, False, 32)
    decay, one = op.eigenvalues()[None, None], torch.ones((), dtype=torch.complex64)
    took = milliseconds(lambda: sequential(u, decay, one[None, None, None, None], one[None, None, None, None]), 1)
    print(f"token by token: forward {took:8.1f} ms")
    kernel, v = torch.randn(features, tokens), u.permute(2, 0, 1).contiguous()
    print(f"spectra: forward {milliseconds(lambda: by_fft(v, kernel), repeats):8.1f} ms")


def couplings(features: int, chunk: int) -> dict[str, Coupling]:
    """What is compared, by name."""
    return {
        "state-space potential": Potential(operator(features, False, chunk), "h"),
        "selective potential": Potential(operator(features, True, chunk), "h"),
        "tied perceptron of 4 D": Potential(Dense(features, 4 * features), "h"),
        "attention energy": Attention("h", features),
        "linear attention energy": LinearAttention("h", features),
    }


def fields(u: Tensor, repeats: int, chunk: int) -> None:
    """One line for each coupling's field, and the exponent of its time in the number of tokens."""
    tokens = u.shape[1]
    for name, coupling in couplings(u.shape[2], chunk).items():
        sizes, taken = [], []
        for n in (tokens // 4, tokens // 2, tokens):
            part = u[:, :n].contiguous()
            bound = coupling.bind(part)
            sizes.append(math.log(n))
            taken.append(milliseconds(lambda c=coupling, p=part, b=bound: c.field({"h": p}, b), repeats))
        x, y = torch.tensor(sizes), torch.tensor(taken).log()
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
        print(f"field of {name:24} {taken[-1]:8.1f} ms, exponent {slope:.2f}", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=784)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 28, 56, 112])
    args = parser.parse_args()
    u = torch.randn(args.batch, args.tokens, args.features, generator=torch.Generator().manual_seed(1))
    forms(u, args.repeats, tuple(args.chunks))
    fields(u, args.repeats, args.chunks[len(args.chunks) // 2])


if __name__ == "__main__":
    main()
