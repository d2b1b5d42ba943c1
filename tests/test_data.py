"""Data sets: the bundled MNIST, balanced subsets, exact resumption of batches, batch checks, generated data."""

from __future__ import annotations

import dataclasses
import hashlib

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toreq import data
from toreq.data.batches import seeded
from toreq.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def mnist() -> data.Dataset:
    return data.load("mnist")


@pytest.fixture
def small() -> data.Dataset:
    return data.blob_dataset(train=50, test=20, input_shape=(1, 4, 4), num_classes=3)


# --- the bundled MNIST


def test_mnist_is_the_published_set(mnist: data.Dataset):
    assert mnist.train_x.shape == (60_000, 1, 28, 28)
    assert mnist.test_x.shape == (10_000, 1, 28, 28)
    assert mnist.input_shape == (1, 28, 28)
    assert (mnist.num_classes, mnist.variant) == (10, "mnist")
    assert mnist.train_y.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.test_y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert "CC BY-SA" in mnist.licence
    # The published MD5 of the uncompressed originals covers header and pixels.
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (60_000, 28, 28))
    digest = hashlib.md5(header + mnist.train_x.numpy().tobytes(), usedforsecurity=False)
    assert digest.hexdigest() == "6bbc9ace898e44ae57da46a324031adb"


def test_mnist_statistics(mnist: data.Dataset):
    pixels = mnist.images("train", slice(None))
    assert float(pixels.mean()) == pytest.approx(0.13066, abs=2e-5)
    assert float(pixels.std()) == pytest.approx(0.30811, abs=2e-5)
    assert pixels.dtype == torch.float32
    assert (float(pixels.min()), float(pixels.max())) == (0.0, 1.0)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'mnist'"):
        data.load("mnits")
    assert data.names()[0] == "mnist"


# --- Dataset


def test_images_by_slice_list_and_tensor(small: data.Dataset):
    expected = small.train_x[[3, 1]].double() / 255
    torch.testing.assert_close(small.images("train", [3, 1], torch.float64), expected)
    torch.testing.assert_close(small.images("train", torch.tensor([3, 1]), torch.float64), expected)
    assert small.images("test", slice(2, 5)).shape == (3, 1, 4, 4)
    assert small.train_x.dtype == torch.uint8
    with pytest.raises(DataError, match="expected pixels, got the symbols"):
        dataclasses.replace(small, train_x=small.train_x.long(), test_x=small.test_x.long(), num_symbols=256).images(
            "train", [0]
        )


def test_symbols_come_out_as_they_are(small: data.Dataset):
    symbols = dataclasses.replace(small, train_x=small.train_x.long(), test_x=small.test_x.long(), num_symbols=256)
    torch.testing.assert_close(symbols.inputs("train", [1]), small.train_x[[1]].long())


@pytest.mark.parametrize(
    "changes",
    [
        {"train_x": torch.zeros(50, 1, 4, 4)},
        {"train_x": torch.zeros(50, 4, 4, dtype=torch.uint8)},
        {"train_y": torch.zeros(49, dtype=torch.int64)},
        {"train_y": torch.zeros(50)},
        {"test_y": torch.full((20,), 3)},
        {"test_y": torch.full((20,), -1)},
    ],
)
def test_an_inconsistent_set_is_refused(small: data.Dataset, changes: dict[str, torch.Tensor]):
    with pytest.raises(DataError, match="Dataset 'blobs'"):
        dataclasses.replace(small, **changes)


def test_a_split_that_does_not_exist(small: data.Dataset):
    with pytest.raises((DataError, jaxtyping.TypeCheckError), match="validation"):
        small.split("validation")  # type: ignore[arg-type]


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), share=st.floats(0, 1), shuffle=st.booleans())
def test_subsets_are_balanced_prefixes(labels: list[int], share: float, shuffle: bool):
    y = torch.tensor(labels)
    count = max(1, int(share * len(labels)))
    generator = torch.Generator().manual_seed(1) if shuffle else None
    index = data.balanced_subset(y, count, generator)
    assert len(set(index.tolist())) == count
    available = y.bincount(minlength=5)
    for length in range(1, count + 1):
        taken = y[index[:length]].bincount(minlength=5)
        # A class may only fall behind the fullest by more than one when it is used up.
        behind = taken < taken.max() - 1
        assert bool((taken[behind] == available[behind]).all())


def test_limit_is_deterministic_and_keeps_pairs(mnist: data.Dataset):
    limited = mnist.limit(train=25, test=10)
    assert limited.train_y.bincount().tolist() == [3] * 5 + [2] * 5
    assert limited.test_y.tolist() == list(range(10))
    assert limited.variant == "mnist"
    first_three = (mnist.train_y == 3).nonzero()[0].item()
    assert torch.equal(limited.train_x[3], mnist.train_x[first_three])
    draws = [mnist.limit(train=100, generator=seeded(seed)).train_x for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert len(mnist.limit(test=10).train_y) == 60_000


@pytest.mark.parametrize("count", [0, -1, 51])
def test_a_limit_out_of_range_is_refused(small: data.Dataset, count: int):
    with pytest.raises(DataError, match="expected 1 to 50"):
        small.limit(train=count)


# --- Batches


def numbered(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(count, dtype=torch.float32), torch.arange(count)


@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
    shuffle=st.booleans(),
)
def test_an_epoch_visits_every_example_once(count: int, batch_size: int, seed: int, epoch: int, shuffle: bool):
    batches = data.Batches(*numbered(count), batch_size, seed=seed, shuffle=shuffle)
    seen = [batch for batch in batches.epoch(epoch)]
    assert len(seen) == len(batches)
    assert all(torch.equal(x.long(), y) for x, y in seen)
    assert sorted(torch.cat([y for _, y in seen]).tolist()) == list(range(count))
    for start in range(len(batches) + 1):
        rest = list(batches.epoch(epoch, start=start))
        assert len(rest) == len(seen) - start
        assert all(torch.equal(a[1], b[1]) for a, b in zip(rest, seen[start:], strict=True))


def test_orders_depend_on_seed_and_epoch_only():
    def order(seed: int, epoch: int) -> list[int]:
        return data.Batches(*numbered(100), 7, seed=seed).order(epoch).tolist()

    torch.manual_seed(1)
    first = order(0, 1)
    torch.manual_seed(2)
    assert order(0, 1) == first
    orders = {tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16  # in particular (0, 1) is not (1, 0)


def test_drop_last_and_stored_order():
    batches = data.Batches(*numbered(10), 4, shuffle=False, drop_last=True)
    assert [y.tolist() for _, y in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(batches) == 2


def test_pixels_are_scaled_and_nothing_else(small: data.Dataset):
    x, _ = next(data.Batches(*small.split("train"), 5, shuffle=False, dtype=torch.float64).epoch(0))
    torch.testing.assert_close(x, small.train_x[:5].double() / 255)
    symbols, _ = next(data.Batches(small.train_x.long(), small.train_y, 5, shuffle=False).epoch(0))
    assert torch.equal(symbols, small.train_x[:5].long())


def test_a_batch_is_a_copy():
    x, y = numbered(6)
    batch, _ = next(data.Batches(x, y, 3, shuffle=False).epoch(0))
    batch.zero_()
    assert x.tolist() == [0, 1, 2, 3, 4, 5]


def test_batches_refuse_bad_arguments():
    x, y = numbered(10)
    with pytest.raises(ConfigError, match="batch_size >= 1"):
        data.Batches(x, y, 0)
    with pytest.raises(ConfigError, match="seed >= 0"):
        data.Batches(x, y, 2, seed=-1)
    with pytest.raises(DataError, match="as many labels"):
        data.Batches(x, y[:-1], 2)
    with pytest.raises(DataError, match="at least one batch"):
        data.Batches(x, y, 11, drop_last=True)
    with pytest.raises(DataError, match="at least one batch"):
        data.Batches(x[:0], y[:0], 1)
    # Refused at the call, not at the first batch.
    with pytest.raises(ConfigError, match="start in"):
        data.Batches(x, y, 3).epoch(0, start=5)
    with pytest.raises(ConfigError, match="epoch >= 0"):
        data.Batches(x, y, 3).epoch(-1)
    with pytest.raises(ConfigError, match="non-negative"):
        seeded(0, -1)


# --- check_batch

GOOD_X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
GOOD_Y = torch.tensor([0, 1, 2, 9])


def test_good_batches_pass():
    data.check_batch(GOOD_X, GOOD_Y, (1, 8, 8), 10)
    data.check_batch(GOOD_X.bfloat16(), None, (1, 8, 8), 10)
    data.check_batch(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 1]), (5,), 2)


def _poisoned(value: float) -> torch.Tensor:
    x = GOOD_X.clone()
    x[1, 0, 2, 2] = value
    return x


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (_poisoned(float("nan")), GOOD_Y, "NaN or infinity in 1 of 4"),
        (_poisoned(float("inf")), GOOD_Y, "NaN or infinity"),
        (_poisoned(float("nan")), None, "NaN or infinity"),
        (GOOD_X[:, :, :7], GOOD_Y, r"shape \(B, 1, 8, 8\), got \(4, 1, 7, 8\)"),
        (GOOD_X.flatten(1), GOOD_Y, "shape"),
        (torch.tensor(1.0), GOOD_Y, "shape"),
        (GOOD_X[:0], GOOD_Y[:0], "empty batch"),
        ((GOOD_X * 255).to(torch.uint8), GOOD_Y, "floating dtype"),
        (GOOD_X, GOOD_Y[:3], "int64 of shape"),
        (GOOD_X, GOOD_Y.float(), "int64 of shape"),
        (GOOD_X, GOOD_Y.int(), "int64 of shape"),
        (GOOD_X, torch.tensor([0, 1, 2, 10]), r"labels in \[0, 10\), got 0 to 10"),
        (GOOD_X, torch.tensor([0, 1, 2, -1]), "got -1 to 2"),
        (GOOD_X, GOOD_Y.to("meta"), "got meta"),
    ],
)
def test_bad_batches_are_refused(x: torch.Tensor, y: torch.Tensor | None, words: str):
    with pytest.raises(DataError, match=words):
        data.check_batch(x, y, (1, 8, 8), 10)


# --- generated data


def test_blobs_are_separable_and_seeded():
    x, y = data.blobs(200, (1, 6, 6), 4, noise=0.05, generator=seeded(3))
    again, _ = data.blobs(200, (1, 6, 6), 4, noise=0.05, generator=seeded(3))
    assert torch.equal(x, again)
    centres = torch.stack([x[:100][y[:100] == label].flatten(1).mean(0) for label in range(4)])
    guess = torch.cdist(x[100:].flatten(1), centres).argmin(1)
    assert torch.equal(guess, y[100:])


def test_two_moons_are_not_linearly_separable_but_nearly_so():
    x, y = data.two_moons(400, noise=0.05, generator=seeded(0))
    features = torch.cat([x, torch.ones(400, 1)], 1)
    linear = torch.linalg.lstsq(features, 2.0 * y[:, None] - 1).solution
    accuracy = ((features @ linear).squeeze(1) > 0).eq(y == 1).float().mean().item()
    assert 0.75 < accuracy < 0.98
    nearest_other = torch.cdist(x, x).fill_diagonal_(9).argmin(1)
    assert (y[nearest_other] == y).float().mean() > 0.99


def test_blob_dataset_splits_share_their_classes():
    made = data.blob_dataset(train=40, test=12, num_classes=4, noise=0.02)
    assert made.train_y.bincount().tolist() == [10] * 4
    assert torch.equal(made.train_x, data.blob_dataset(train=40, test=12, num_classes=4, noise=0.02).train_x)
    difference = made.images("train", slice(0, 4)) - made.images("test", slice(0, 4))
    assert float(difference.abs().mean()) < 0.05
