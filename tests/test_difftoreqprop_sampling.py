"""Sampling by annealed Langevin dynamics, against data whose exact denoiser is known."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from toreq.errors import ConfigError
from toreq.systems.difftoreqprop_sampling import Anneal, Conveyor, Known, stream

MEAN, WIDTH = torch.tensor([0.5, -1.0]).double(), torch.tensor([0.3, 0.8]).double()


def gaussian(x: Tensor, level: Tensor, labels: Tensor | None) -> Tensor:
    """The posterior mean for independent Gaussian data; a class moves the mean."""
    mean = MEAN if labels is None else MEAN + labels.double()[:, None]
    trust = WIDTH.square() / (WIDTH.square() + level.square()[:, None])
    return mean + trust * (x - mean)


def conveyor(anneal: Anneal, batch: int = 500, **more: object) -> Conveyor:
    g = torch.Generator().manual_seed(0)
    return Conveyor(gaussian, (2,), batch, anneal, g, dtype=torch.float64, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("eta", "corrections"), [(0.0, 0), (0.5, 0), (1.0, 0), (1.0, 2)])
def test_samples_have_the_law_of_the_data(eta: float, corrections: int) -> None:
    # high enough that the start, which knows nothing of the data's mean, is forgotten without fresh noise too
    anneal = Anneal(levels=80, high=60.0, low=0.01, eta=eta, corrections=corrections)
    assert anneal.evaluations == 80 * (1 + corrections)
    x = torch.cat(list(itertools.islice(stream(conveyor(anneal)), 8)))
    assert x.shape == (4000, 2)
    # four standard errors, and the finite number of levels
    assert bool(((x.mean(0) - MEAN).abs() < 4 * WIDTH / 4000**0.5 + 0.02).all())
    assert bool((x.std(0) / WIDTH - 1).abs().max() < 0.08)
    assert abs(float(torch.corrcoef(x.T)[0, 1])) < 0.08


def test_a_batch_is_released_with_every_tick_once_the_ring_is_full() -> None:
    ring = conveyor(Anneal(levels=5, high=2.0, low=0.1), batch=3)
    found = [ring.tick() for _ in range(9)]
    assert [t is None for t in found] == [True] * 4 + [False] * 5
    assert ring.x.shape == (5, 3, 2)
    first, second = found[4], found[5]
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)


def test_a_ring_with_a_limit_starts_no_more_than_it_returns() -> None:
    ring = conveyor(Anneal(levels=4, high=2.0, low=0.1), batch=3, limit=6)
    sizes: list[int] = []
    plain = ring.denoiser

    def counted(x: Tensor, level: Tensor, labels: Tensor | None) -> Tensor:
        sizes.append(len(x) // 3)
        return plain(x, level, labels)

    ring.denoiser = counted
    assert len(list(stream(ring))) == 6
    assert sizes == [1, 2, 3, 4, 4, 4, 3, 2, 1]
    with pytest.raises(ConfigError, match="raise limit"):
        ring.tick()


def test_a_chain_does_not_depend_on_the_others_on_the_ring() -> None:
    """Without fresh noise a chain is a function of its start."""
    anneal = Anneal(levels=4, high=2.0, low=0.1, eta=0.0)
    ring = conveyor(anneal, batch=2)
    starts, ends = [], []
    for _ in range(8):
        out = ring.tick()
        if out is not None:
            ends.append(out)
    g = torch.Generator().manual_seed(0)
    table = anneal.table(torch.zeros(1).double())
    for _ in range(2):
        starts.append(anneal.high * torch.randn(2, 2, generator=g, dtype=torch.float64))
        torch.randn(len(starts), 2, 2, generator=g, dtype=torch.float64)  # what the step of that tick draws
    for start, end in zip(starts, ends, strict=False):
        x = start
        for s, t in itertools.pairwise(table):
            clean = gaussian(x, s.expand(2), None)
            x = clean + t * (x - clean) / s
        torch.testing.assert_close(x, end)


def test_classes_belong_to_their_batch() -> None:
    anneal = Anneal(levels=30, high=6.0, low=0.01)
    ring = conveyor(anneal, batch=400, labels=lambda i: torch.full((400,), 3 * i))
    for i, x in enumerate(itertools.islice(stream(ring), 3)):
        assert float((x.mean(0) - MEAN - 3 * i).abs().max()) < 0.2


def test_a_given_part_is_kept_and_the_rest_follows_it() -> None:
    """Correlated data: the free coordinate must follow the given one."""
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]]).double()

    def denoiser(x: Tensor, level: Tensor, labels: Tensor | None) -> Tensor:
        noisy = covariance + level.square()[:, None, None] * torch.eye(2).double()
        return torch.linalg.solve(noisy, x[:, :, None]).transpose(1, 2).matmul(covariance)[:, 0]

    known = Known(torch.tensor([2.0, 0.0]).double(), torch.tensor([True, False]))
    anneal = Anneal(levels=60, high=6.0, low=0.01, corrections=3)
    g = torch.Generator().manual_seed(0)
    ring = Conveyor(denoiser, (2,), 2000, anneal, g, dtype=torch.float64, known=known)
    x = next(stream(ring))
    assert bool((x[:, 0] == 2.0).all())
    # exactly 1.8 for the conditional law; replacing the given part at each level is an approximation of it
    assert 1.4 < float(x[:, 1].mean()) < 2.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"levels": 1}, "levels >= 2"),
        ({"low": 3.0}, "0 < low < high"),
        ({"eta": 1.5}, "eta in"),
        ({"corrections": -1}, "corrections >= 0"),
        ({"rate": 1.0}, "rate in"),
    ],
)
def test_refusals(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Anneal(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="batch >= 1"):
        conveyor(Anneal(), batch=0)
