"""Streams of the continual-learning protocol: what comes, in which order, against brute force and other libraries."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from continual_data import images
from toreq.data.dataset import to_unit
from toreq.errors import ConfigError, DataError
from toreq.evidence.protocols.continual import (
    DriftingStream,
    Mixed,
    PermutedMNIST,
    SplitMNIST,
    Stream,
    held_out,
    rotated,
)

KINDS: dict[str, Any] = {
    "permuted": lambda seed=0: PermutedMNIST(3, seed, batch_size=7, data=images()),
    "split": lambda seed=0: SplitMNIST(seed, batch_size=3, data=images()),
    "rotation": lambda seed=0: DriftingStream(seed, phases=4, batch_size=7, data=images()),
    "permutation": lambda seed=0: DriftingStream(seed, phases=4, kind="permutation", batch_size=7, data=images()),
    "mixed": lambda seed=0: Mixed(PermutedMNIST(3, seed, batch_size=7, data=images())),
}
EVERY = pytest.mark.parametrize("kind", KINDS)


def rows(x: torch.Tensor) -> list[tuple[int, ...]]:
    """Images as sortable tuples of their pixels."""
    return sorted(tuple(row) for row in (255 * x).round().int().flatten(1).tolist())


def whole(stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
    found = [stream.batch(i) for i in range(len(stream))]
    return torch.cat([b.x for b in found]), torch.cat([b.y for b in found])


@EVERY
def test_a_stream_is_a_function_of_its_seed_in_whatever_order_it_is_asked(kind: str) -> None:
    one, same, other = KINDS[kind](), KINDS[kind](), KINDS[kind](1)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    late = same.batch(len(same) - 1)
    assert torch.equal(late.x, one.batch(len(one) - 1).x)
    assert torch.equal(one.batch(0).x, same.batch(0).x)
    assert not torch.equal(whole(one)[0], whole(other)[0])


@EVERY
def test_batches_hold_every_example_and_never_span_two_phases(kind: str) -> None:
    stream = KINDS[kind]()
    batches = [stream.batch(i) for i in range(len(stream))]
    assert sum(len(b.y) for b in batches) == stream.samples
    assert [b.phase for b in batches] == sorted(b.phase for b in batches)
    ends = [b.phase for b in batches if b.last]
    assert ends == list(range(stream.phases))
    assert all(b.x.dtype == torch.float32 and 0 <= float(b.x.min()) <= float(b.x.max()) <= 1 for b in batches)
    with pytest.raises(ConfigError, match="has ended"):
        stream.batch(len(stream))


def test_permuted_tasks_are_the_images_with_their_pixels_moved() -> None:
    stream, data = KINDS["permuted"](), images()
    for task in range(3):
        moved = torch.stack([x.flatten()[stream.permutations[task]].view_as(x) for x in data.train_x])
        own = torch.cat([b.x for i in range(len(stream)) if (b := stream.batch(i)).phase == task])
        assert rows(own) == rows(to_unit(moved))
        tested, y = stream.test(task)
        assert torch.equal(tested[5].flatten(), to_unit(data.test_x)[5].flatten()[stream.permutations[task]])
        assert torch.equal(y, data.test_y)
        assert sorted(stream.permutations[task].tolist()) == list(range(36))
    assert torch.equal(stream.permutations[0], torch.arange(36))
    assert not torch.equal(stream.permutations[1], stream.permutations[2])


def test_labels_stay_with_their_images() -> None:
    data = images()
    label = {tuple(x.flatten().tolist()): int(y) for x, y in zip(data.train_x, data.train_y, strict=True)}
    x, y = whole(KINDS["split"]())
    found = [label[tuple(row)] for row in (255 * x).round().int().flatten(1).tolist()]
    assert found == y.tolist()


@pytest.mark.parametrize("shuffle", [False, True])
def test_split_tasks_have_two_classes_each_and_the_test_sets_are_a_partition(shuffle: bool) -> None:
    stream = SplitMNIST(3, shuffle_classes=shuffle, batch_size=3, data=images())
    assert rows(whole(stream)[0]) == rows(to_unit(images().train_x))
    met: list[int] = []
    for task in range(5):
        own = {int(y) for i in range(len(stream)) if (b := stream.batch(i)).phase == task for y in b.y}
        assert own == set(stream.test(task)[1].tolist())
        met += sorted(own)
    assert sorted(met) == list(range(10))
    assert (met == list(range(10))) == (not shuffle)
    assert sum(len(stream.test(k)[1]) for k in range(5)) == 20


def test_passes_repeat_a_task_in_another_order_while_it_lasts() -> None:
    twice = SplitMNIST(0, batch_size=8, passes=2, data=images())
    assert twice.samples == 80
    first, second = twice.batch(0), twice.batch(1)
    assert (first.phase, second.phase, first.last, second.last) == (0, 0, False, True)
    assert rows(first.x) == rows(second.x)
    assert not torch.equal(first.x, second.x)


@pytest.mark.parametrize(("degrees", "turns"), [(0.0, 0), (90.0, 1), (180.0, 2)])
def test_right_angles_are_exact(degrees: float, turns: int) -> None:
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rotated(x, torch.full((2,), degrees)), torch.rot90(x, turns, (2, 3)), atol=1e-5)


def test_other_angles_are_those_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(1, 1, 15, 15, dtype=torch.float64)
    x[..., 4:11, 4:11] = torch.rand(7, 7, generator=generator, dtype=torch.float64)
    for degrees in (17.0, 133.0):
        wanted = ndimage.rotate(x[0, 0].numpy(), degrees, reshape=False, order=1)
        assert np.allclose(rotated(x, torch.tensor([degrees])).numpy()[0, 0], wanted, atol=1e-9)


def test_the_drift_is_slow_and_its_test_sets_lie_in_the_middle_of_the_phases() -> None:
    stream, data = KINDS["rotation"](), images()
    assert stream.phases == stream.tests == 4
    assert not stream.boundaries
    upright = to_unit(data.test_x)
    for phase in range(4):
        wanted = rotated(upright, torch.full((20,), 180 * (phase + 0.5) / 4))
        assert torch.allclose(stream.test(phase)[0], wanted)
    # the t-th of 40 images is turned by 180 t / 40 degrees: turned back, all of them are there once
    x, y = whole(stream)
    first = rotated(x[20:21], torch.tensor([-90.0]))
    assert min(float((first - to_unit(image[None])).abs().max()) for image in data.train_x) < 1e-4
    assert torch.bincount(y).tolist() == [4] * 10


def test_drifting_pixels_are_swapped_one_pair_after_another() -> None:
    stream = KINDS["permutation"]()
    table = stream._swapped.long()
    assert torch.equal(table[0], torch.arange(36))
    assert all(sorted(row.tolist()) == list(range(36)) for row in table)
    assert max(int((a != b).sum()) for a, b in pairwise(table)) == 2
    assert int((table[-1] != table[0]).sum()) > 30
    x = images().test_x[:1]
    half = stream.render(x, torch.tensor([0.5], dtype=torch.float64))
    assert torch.equal(half.flatten(), to_unit(x).flatten()[table[17]])


def test_mixing_keeps_the_examples_and_the_test_sets() -> None:
    stream, mixed = KINDS["permuted"](), KINDS["mixed"]()
    assert rows(whole(mixed)[0]) == rows(whole(stream)[0])
    assert mixed.phases == 1
    assert torch.equal(mixed.test(2)[0], stream.test(2)[0])
    # all three tasks are met before a third is over
    early = torch.cat([mixed.batch(i).x for i in range(5)])
    for task in range(3):
        own = set(rows(torch.cat([b.x for i in range(len(stream)) if (b := stream.batch(i)).phase == task])))
        assert own & set(rows(early))


def test_what_is_held_out_is_balanced_and_not_trained_on() -> None:
    data = images()
    held = held_out(data, 10)
    assert torch.bincount(held.test_y).tolist() == [1] * 10
    assert sorted(rows(to_unit(held.train_x)) + rows(to_unit(held.test_x))) == rows(to_unit(data.train_x))
    assert not set(rows(to_unit(held.train_x))) & set(rows(to_unit(held.test_x)))
    with pytest.raises(DataError, match="fewer than all"):
        held_out(data, 40)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PermutedMNIST(0, data=images()), "at least one task"),
        (lambda: SplitMNIST(classes_per_task=3, data=images()), "divisor of 10"),
        (lambda: SplitMNIST(passes=0, data=images()), "at least one pass"),
        (lambda: DriftingStream(phases=41, data=images()), "1 to 40 phases"),
        (lambda: PermutedMNIST(2, batch_size=0, data=images()), "batch_size >= 1"),
    ],
)
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
