"""A new energy in fifteen lines: a memory of learned patterns on one tanh node, trained like any layer.

python examples/new_energy.py

E(a) = <a, h> - sum log cosh a - <h, U x + c> - (1/b) log sum_m exp(b <xi_m, h>),    h = tanh a

The last term is the energy of a modern Hopfield network (Ramsauer et al. 2021). A coupling needs its value alone:
its field, its learning rule and the estimators that can train it follow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import toreq

# --8<-- [start:energy]
from toreq.core import Bound, Coupling, Drive, Energy, Node, State, Tanh


class Memory(Coupling):
    analytic = False  # torch's logsumexp is real

    def __init__(self, node: str, count: int, features: int) -> None:
        super().__init__([node])
        self.patterns = nn.Parameter(torch.randn(count, features) / features**0.5)

    def bind(self, x: Tensor) -> Bound:
        return Bound(shared={"patterns": self.patterns})

    def value(self, h: State, bound: Bound) -> Tensor:
        return (h[self.nodes[0]] @ bound["patterns"].T).logsumexp(-1)


drive = nn.Sequential(nn.Flatten(), nn.Linear(784, 64))
layer = toreq.Equilibrium(Energy([Node("h", 64, Tanh())], [Drive("h", drive), Memory("h", 32, 64)]))
net = nn.Sequential(layer, nn.Linear(64, 10))
# --8<-- [end:energy]


def main(steps: int = 60, batch: int = 64) -> tuple[float, float]:
    """Train on random images; return the cosine of the gradient with the implicit one, and the last loss."""
    torch.manual_seed(0)
    x, y = torch.rand(batch, 1, 28, 28), torch.randint(0, 10, (batch,))

    def gradient(estimator: toreq.estimators.Estimator) -> Tensor:
        layer.estimator = estimator
        net.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        return torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])

    pair = gradient(toreq.estimators.Centered()), gradient(toreq.estimators.Implicit())
    cosine = float(nn.functional.cosine_similarity(*pair, dim=0))
    print(f"cosine of Centered with Implicit: {cosine:.6f}; radius {layer.radius(x):.2f}")

    layer.estimator = toreq.estimators.Centered()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    last = float("inf")
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        last = float(loss.detach())
    print(f"loss on one batch after {steps} steps: {last:.3f}")
    return cosine, last


if __name__ == "__main__":
    main()
