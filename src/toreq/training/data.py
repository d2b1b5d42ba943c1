"""A data set as tensors on the device, converted and checked once so that no step has to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from toreq import data as datasets
from toreq.data import Dataset
from toreq.errors import DataError
from toreq.training.config import TrainConfig

_HOLDOUT_SEED = 0  # apart from the seed of a run, so that runs of any seed are held against the same examples


@dataclass(frozen=True)
class Prepared:
    """Inputs (N, *input_shape), pixels as floats in [0, 1] or int64 symbols, and labels (N,), on one device.

    With a holdout `test_x` and `test_y` are the training examples held out, and `variant` says so.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int
    input_shape: tuple[int, ...]
    name: str
    variant: str

    def to(self, dtype: torch.dtype) -> Prepared:
        """Return the data with pixels of `dtype`; symbols stay as they are."""
        if not self.train_x.is_floating_point() or self.train_x.dtype == dtype:
            return self
        return dataclasses.replace(self, train_x=self.train_x.to(dtype), test_x=self.test_x.to(dtype))


def prepare(config: TrainConfig, device: torch.device | str) -> Prepared:
    """Load the data of `config`, limited as it says.

    Raises `DataError` for data that are missing, not finite or with labels out of range, and for a holdout that leaves
    nothing to train on.
    """
    source = datasets.load(config.data)
    if config.holdout is not None:
        source = hold_out(source, config.holdout)
    source = source.limit(config.limit_train, config.limit_test)
    tensors = {}
    for split in ("train", "test"):
        x, y = source.inputs(split, slice(None)), source.split(split)[1]
        try:
            datasets.check_batch(x, y, source.input_shape, source.num_classes)
        except DataError as error:
            raise DataError(f"{config.data} ({split}): {error}") from error
        tensors[f"{split}_x"], tensors[f"{split}_y"] = x.to(device), y.to(device)
    return Prepared(
        **tensors,
        num_classes=source.num_classes,
        input_shape=tuple(source.input_shape),
        name=config.data,
        variant=source.variant,
    )


def hold_out(source: Dataset, count: int) -> Dataset:
    """Return `source` with `count` training examples in the place of its test data, and the others to train on.

    They are a random choice, balanced over the classes, that is the same in every call. Raises `DataError` where
    nothing would be left to train on.
    """
    if not 1 <= count < len(source.train_y):
        raise DataError(
            f"holdout: expected 1 to {len(source.train_y) - 1} of the {len(source.train_y)} training examples, got "
            f"{count}; hold out fewer"
        )
    held = datasets.balanced_subset(source.train_y, count, datasets.seeded(_HOLDOUT_SEED))
    kept = torch.ones(len(source.train_y), dtype=torch.bool)
    kept[held] = False
    return dataclasses.replace(
        source,
        variant=f"{source.variant}, {count} training examples held out as test data",
        train_x=source.train_x[kept],
        train_y=source.train_y[kept],
        test_x=source.train_x[held],
        test_y=source.train_y[held],
    )
