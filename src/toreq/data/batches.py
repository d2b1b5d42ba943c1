"""Index batches from memory whose order is a pure function of (seed, epoch): a run resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from toreq.data.dataset import to_unit
from toreq.errors import ConfigError, DataError


def seeded(seed: int, *keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose stream depends on all of (seed, *keys), non-negative integers.

    The numbers are hashed rather than added, so that (0, 1) and (1, 0) have nothing in common.
    """
    if any(value < 0 for value in (seed, *keys)):
        raise ConfigError(f"seeded: expected non-negative integers, got {(seed, *keys)}; use a seed of 0 or more")
    state = np.random.SeedSequence([seed, *keys]).generate_state(1, np.uint64)
    # CPU generators of torch keep 32 bits of a seed; the mask makes that explicit and alike everywhere.
    return torch.Generator(device=device).manual_seed(int(state[0]) & 0xFFFFFFFF)


class Batches:
    """Batches of (x, y) taken from memory by index, without workers.

    The order of an epoch depends on (seed, epoch) only: `epoch(e, start=b)` yields exactly what an unbroken
    run would yield from batch b on. uint8 pixels come out as floats in [0, 1], any other dtype as stored.

    Args:
        x: (N, ...).
        y: (N,).
        batch_size: examples in a batch, at least 1.
        seed: non-negative.
        shuffle: a new permutation in each epoch; otherwise the stored order.
        drop_last: leave out a last batch that is not full.
        dtype: of the pixels that come out.
        device: where batches come out.

    Raises:
        DataError: x and y differ in length, or there is no batch.
        ConfigError: batch_size below 1 or a negative seed.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"Batches: expected batch_size >= 1, got {batch_size}; use a positive size")
        if seed < 0:
            raise ConfigError(f"Batches: expected a seed >= 0, got {seed}; use a non-negative one")
        if len(x) != len(y):
            raise DataError(f"Batches: expected as many labels as examples, got {len(y)} for {len(x)}; pair them up")
        self.x, self.y = x, y
        self.batch_size, self.seed = batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.dtype, self.device = dtype, device
        if len(self) == 0:
            raise DataError(
                f"Batches: expected at least one batch, got {len(x)} examples for batches of {batch_size}; "
                "use a smaller batch_size or drop_last=False"
            )

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        full, rest = divmod(len(self.x), self.batch_size)
        return full if self.drop_last or rest == 0 else full + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over epoch 0; meant for evaluation, where the order does not matter."""
        return self.epoch(0)

    def order(self, epoch: int) -> Tensor:
        """Return the order (N,) in which an epoch visits the examples."""
        if not self.shuffle:
            return torch.arange(len(self.x))
        return torch.randperm(len(self.x), generator=seeded(self.seed, epoch))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from number `start` on; `ConfigError` outside [0, len(self)]."""
        if epoch < 0 or not 0 <= start <= len(self):
            raise ConfigError(
                f"Batches.epoch: expected epoch >= 0 and start in [0, {len(self)}], got {epoch} and {start}; "
                "resume with the numbers that the interrupted run stored"
            )
        return self._generate(epoch, start)

    def _generate(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.order(epoch)
        for batch in range(start, len(self)):
            index = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            x, y = self.x[index], self.y[index]
            if self.device is not None:
                x, y = x.to(self.device), y.to(self.device)
            yield (to_unit(x, self.dtype) if x.dtype == torch.uint8 else x), y
