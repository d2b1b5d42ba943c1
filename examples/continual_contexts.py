"""Three permutations of MNIST one after the other, in one pass, without labels of tasks: what is left of the first.

python examples/continual_contexts.py
"""

from __future__ import annotations

import torch

from toreq import systems
from toreq.data import load
from toreq.systems import HTSEP


def main(train: int = 3000, test: int = 500, tasks: int = 3, hidden: int = 256) -> dict[str, tuple[float, float, int]]:
    """Accuracy on the first task right after it and at the end, and contexts found, with gates and without."""
    data = load("mnist").limit(train, test)
    orders = [torch.randperm(784, generator=torch.Generator().manual_seed(k)) for k in range(tasks)]
    found = {}
    for gates in ("probabilistic", "off"):
        torch.manual_seed(0)
        net = systems.create("htsep", (1, 28, 28), 10, hidden=(hidden,), open_share=0.2, gates=gates, settings="fast")
        assert isinstance(net, HTSEP)
        # without momentum, which would go on moving units that have closed
        adam = torch.optim.Adam(net.parameters(), lr=3e-3, betas=(0.0, 0.999))
        first = []
        for order in orders:
            for part in torch.randperm(train, generator=torch.Generator().manual_seed(1)).split(16):
                adam.zero_grad()
                net.criterion(net(seen(data.inputs("train", part), order)), data.train_y[part]).backward()
                adam.step()
            net.eval()
            with torch.no_grad():
                guess = net(seen(data.inputs("test", slice(None)), orders[0])).argmax(1)
            first.append(float((guess == data.test_y).double().mean()))
            net.train()
        found[gates] = (first[0], first[-1], net.context.contexts)
    return found


def seen(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Images with their pixels in another order."""
    return x.flatten(1)[:, order].reshape(x.shape)


if __name__ == "__main__":
    for name, (before, after, contexts) in main().items():
        print(f"gates {name}: first task {before:.3f}, after the others {after:.3f}; {contexts} contexts found")
