"""A classification data set in memory, class-balanced subsets of it, and the check of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from toreq.errors import DataError

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Dataset:
    """A classification data set held in memory.

    Attributes:
        name: the name it was asked for by.
        variant: what exactly was loaded; results record it (`"cifar10-jpeg-recompressed"` is not CIFAR-10).
        train_x, test_x: uint8 (N, C, H, W) pixels, or int64 (N, L) symbols when `num_symbols` is set.
        train_y, test_y: int64 (N,), labels in [0, num_classes).
        input_shape: the shape of one example.
        licence: the terms, in a line.
        num_symbols: size of the alphabet of a symbolic input, None for pixels.
    """

    name: str
    variant: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int
    input_shape: tuple[int, ...]
    licence: str
    num_symbols: int | None = None

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            x, y = self.split(split)
            where = f"Dataset {self.name!r} ({split})"
            kind = torch.uint8 if self.num_symbols is None else torch.int64
            if x.dtype != kind or tuple(x.shape[1:]) != self.input_shape:
                raise DataError(
                    f"{where}: expected {kind} examples of shape {self.input_shape}, "
                    f"got {x.dtype} of shape {tuple(x.shape[1:])}; convert them before"
                )
            if y.dtype != torch.int64 or y.shape != (len(x),):
                raise DataError(
                    f"{where}: expected {len(x)} int64 labels, got {y.dtype} of shape {tuple(y.shape)}; "
                    "give one label for each example"
                )
            if len(y) and (int(y.min()) < 0 or int(y.max()) >= self.num_classes):
                raise DataError(
                    f"{where}: expected labels in [0, {self.num_classes}), got {int(y.min())} to "
                    f"{int(y.max())}; check num_classes"
                )

    def split(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return (x, y) of `"train"` or `"test"` as stored; raises `DataError` for another name."""
        if split == "train":
            return self.train_x, self.train_y
        if split == "test":
            return self.test_x, self.test_y
        raise DataError(f"Dataset.split: expected 'train' or 'test', got {split!r}; choose one of the two")

    def images(self, split: Split, index: Tensor | Sequence[int] | slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the examples at `index` as floats in [0, 1], shape (len(index), *input_shape).

        Raises:
            DataError: the inputs are symbols, which have no place on [0, 1]; use `inputs`.
        """
        if self.num_symbols is not None:
            raise DataError(f"Dataset.images: expected pixels, got the symbols of {self.name!r}; use Dataset.inputs")
        return self.inputs(split, index, dtype)

    def inputs(self, split: Split, index: Tensor | Sequence[int] | slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the examples at `index`: pixels as `dtype` in [0, 1], symbols as int64."""
        x, _ = self.split(split)
        if not isinstance(index, slice):
            index = torch.as_tensor(index, dtype=torch.int64)
        chosen = x[index]
        return to_unit(chosen, dtype) if self.num_symbols is None else chosen

    def limit(
        self, train: int | None = None, test: int | None = None, generator: torch.Generator | None = None
    ) -> Dataset:
        """Return a class-balanced subset with `train` and `test` examples (None keeps all).

        The classes take turns, so that the counts differ by at most one while every class lasts, and every
        prefix is balanced too. Without a generator the first examples of each class are taken, with one a
        random choice.

        Raises:
            DataError: more examples are asked for than there are, or fewer than one.
        """
        changes: dict[str, Tensor] = {}
        limits: tuple[tuple[Split, int | None], ...] = (("train", train), ("test", test))
        for split, count in limits:
            if count is None:
                continue
            x, y = self.split(split)
            index = balanced_subset(y, count, generator)
            changes |= {f"{split}_x": x[index], f"{split}_y": y[index]}
        return dataclasses.replace(self, **changes)


def to_unit(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return uint8 values 0..255 as floats in [0, 1]."""
    return x.to(dtype).div_(255)


def balanced_subset(y: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Return `count` indices into the labels `y` (N,), the classes taking turns; see `Dataset.limit`."""
    if not 1 <= count <= len(y):
        raise DataError(
            f"balanced_subset: expected 1 to {len(y)} examples, got {count}; ask for fewer, or for no limit"
        )
    order = torch.arange(len(y)) if generator is None else torch.randperm(len(y), generator=generator)
    by_class = order[torch.argsort(y[order], stable=True)]
    sizes = torch.bincount(y)
    # The turn of an example is its rank within its class; equal turns are served in the order of the classes.
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    turn = torch.arange(len(y)) - starts
    return by_class[torch.argsort(turn, stable=True)[:count]]


def check_batch(x: Tensor, y: Tensor | None, input_shape: Sequence[int], num_classes: int) -> None:
    """Refuse a batch that no network could learn from.

    Args:
        x: (B, *input_shape), floating point and finite, or int64 symbols.
        y: int64 (B,), labels in [0, num_classes); None for inference.

    Raises:
        DataError: empty batch, wrong shape, dtype or device, NaN or infinity, or a label out of range.
    """
    shape = tuple(input_shape)
    if tuple(x.shape[1:]) != shape or x.ndim == 0:
        raise DataError(
            f"check_batch: expected x of shape (B, {', '.join(map(str, shape))}), got {tuple(x.shape)}; "
            "reshape it, or create the system with another input_shape"
        )
    if len(x) == 0:
        raise DataError("check_batch: expected at least one example, got an empty batch; skip empty batches")
    if not (x.is_floating_point() or x.dtype == torch.int64):
        raise DataError(f"check_batch: expected x of a floating dtype (or int64 symbols), got {x.dtype}; use x.float()")
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
        raise DataError(
            f"check_batch: expected finite x, got NaN or infinity in {bad} of {len(x)} examples; clean the data"
        )
    if y is None:
        return
    if y.shape != (len(x),) or y.dtype != torch.int64:
        raise DataError(
            f"check_batch: expected y int64 of shape ({len(x)},), got {y.dtype} of shape {tuple(y.shape)}; "
            "give class indices, one for each example"
        )
    if y.device != x.device:
        raise DataError(f"check_batch: expected y on {x.device} like x, got {y.device}; move both to one device")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= num_classes:
        raise DataError(
            f"check_batch: expected labels in [0, {num_classes}), got {low} to {high}; check the labels or num_classes"
        )
