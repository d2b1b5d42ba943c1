"""A data set as tensors on the device, converted and checked once so that no step has to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from toreq import data as datasets
from toreq.errors import DataError
from toreq.training.config import TrainConfig


@dataclass(frozen=True)
class Prepared:
    """Inputs (N, *input_shape), pixels as floats in [0, 1] or int64 symbols, and labels (N,), on one device."""

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

    Raises `DataError` for data that are missing, not finite or with labels out of range.
    """
    source = datasets.load(config.data).limit(config.limit_train, config.limit_test)
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
