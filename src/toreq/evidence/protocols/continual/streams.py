"""Streams: what comes in which order, and the test sets, as pure functions of a seed; nothing comes twice in a pass."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from toreq.data import Dataset, balanced_subset, load, seeded
from toreq.data.dataset import to_unit
from toreq.errors import ConfigError, DataError

KEPT = 2**26
"""Bytes of rendered test images that a stream may keep: turning them again after every phase costs more than learning
does."""
ORDER, TRANSFORM, MIX = range(3)
"""Keys of the random draws, so that none depends on how many another one takes."""


@dataclass(frozen=True)
class Batch:
    """The next examples of a stream.

    Attributes:
        x: float32 ``(B, C, H, W)`` in [0, 1].
        y: int64 ``(B,)``.
        phase: which part of the stream they belong to; no learner sees it.
        last: whether the phase ends with this batch.
    """

    x: Tensor
    y: Tensor
    phase: int
    last: bool


@functools.lru_cache(maxsize=1)
def mnist() -> Dataset:
    """The bundled MNIST, unpacked once in a process."""
    return load("mnist")


def held_out(data: Dataset, count: int) -> Dataset:
    """Training data alone: its last ``count`` examples, balanced over the classes, in the place of the test set.

    Raises:
        DataError: fewer than one or not fewer than all examples are held out.
    """
    total = len(data.train_y)
    if not 1 <= count < total:
        raise DataError(f"held_out: expected 1 to {total - 1} examples, got {count}; hold out fewer than all")
    chosen = balanced_subset(data.train_y.flip(0), count)
    mask = torch.zeros(total, dtype=torch.bool)
    mask[total - 1 - chosen] = True
    return dataclasses.replace(
        data,
        train_x=data.train_x[~mask],
        train_y=data.train_y[~mask],
        test_x=data.train_x[mask],
        test_y=data.train_y[mask],
    )


class Stream(ABC):
    """Batches in order, in phases, with one or more test sets; images are kept as uint8 and rendered batch by batch.

    The t-th example of the stream is the image ``index[t]`` of the training set, changed as ``place[t]`` says. A batch
    never spans two phases. Everything follows from the arguments: `batch(i)` can be asked for in any order.

    Args:
        data: where images come from.
        seed: non-negative, of order and changes.
        batch_size: examples in a batch, at least 1.
        index: int64 ``(T,)``.
        phase: int64 ``(T,)``, non-decreasing from 0 in steps of at most 1.
        place: ``(T,)``, what `render` takes.

    Raises:
        ConfigError: a batch size below 1 or a negative seed.
    """

    name: str
    boundaries: bool
    """Whether phases are tasks whose ends a learner may be told."""
    tests: int
    """Number of test sets."""

    def __init__(self, data: Dataset, seed: int, batch_size: int, index: Tensor, phase: Tensor, place: Tensor) -> None:
        if batch_size < 1 or seed < 0:
            raise ConfigError(
                f"{type(self).__name__}: expected batch_size >= 1 and seed >= 0, got {batch_size} and {seed}; "
                "use positive ones"
            )
        self.data, self.seed, self.batch_size = data, seed, batch_size
        self._index, self._phase, self._place = index, phase, place
        self.phases = int(phase[-1]) + 1
        self._spans: list[tuple[int, int, int, bool]] = []
        start = 0
        for number, size in enumerate(torch.bincount(phase, minlength=self.phases).tolist()):
            for at in range(start, start + size, batch_size):
                stop = min(at + batch_size, start + size)
                self._spans.append((at, stop, number, stop == start + size))
            start += size

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._spans)

    @property
    def samples(self) -> int:
        """Number of examples, T."""
        return len(self._index)

    def batch(self, number: int) -> Batch:
        """The batch of that number; raises `ConfigError` outside of [0, len)."""
        if not 0 <= number < len(self):
            raise ConfigError(f"{self.name}: expected a batch in [0, {len(self)}), got {number}; the stream has ended")
        start, stop, phase, last = self._spans[number]
        index = self._index[start:stop]
        x = self.render(self.data.train_x[index], self._place[start:stop])
        return Batch(x, self.data.train_y[index], phase, last)

    @abstractmethod
    def render(self, x: Tensor, place: Tensor) -> Tensor:
        """Images uint8 ``(B, C, H, W)`` as floats in [0, 1], each changed as its ``place`` ``(B,)`` says."""

    @abstractmethod
    def test(self, number: int) -> tuple[Tensor, Tensor]:
        """The test set of that number, as `Batch.x` and `Batch.y`."""

    def describe(self) -> dict[str, Any]:
        """What the stream is, for a result."""
        return {
            "stream": self.name,
            "data": self.data.variant,
            "phases": self.phases,
            "tests": self.tests,
            "samples": self.samples,
            "batch_size": self.batch_size,
            "boundaries": self.boundaries,
        }

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that differ for streams of other examples, order or changes."""
        digest = hashlib.sha256(repr((self.describe(), self.seed)).encode())
        for part in (self._index, self._phase, self._place, self.data.train_y, self.data.test_y):
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()[:16]


def _orders(sizes: Sequence[int], passes: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """For each phase the order (passes * size,) of its examples, a new one in each pass; and the phase of each."""
    if passes < 1:
        raise ConfigError(f"Stream: expected at least one pass, got {passes}; use 1")
    orders = [
        torch.cat([torch.randperm(size, generator=seeded(seed, ORDER, number, turn)) for turn in range(passes)])
        for number, size in enumerate(sizes)
    ]
    phase = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor([len(order) for order in orders]))
    return orders, phase


class PermutedMNIST(Stream):
    r"""Tasks that differ by a fixed permutation of the pixels, :math:`x \mapsto x_{\pi_k}` (Goodfellow et al. 2013).

    Task 0 has the pixels as they are, each later one a permutation drawn uniformly. All tasks have all ten classes and
    share the head; no label says which task an image is of.

    Args:
        tasks: at least 1.
        seed: of permutations and order.
        train, test: images of each task (the same for all, balanced over the classes); None for all.
        batch_size: examples in a batch.
        passes: over each task's images while it lasts.
        data: MNIST when None.
    """

    name = "permuted"
    boundaries = True

    def __init__(
        self,
        tasks: int = 10,
        seed: int = 0,
        *,
        train: int | None = None,
        test: int | None = None,
        batch_size: int = 64,
        passes: int = 1,
        data: Dataset | None = None,
    ) -> None:
        if tasks < 1:
            raise ConfigError(f"PermutedMNIST: expected at least one task, got {tasks}; use 10")
        data = (mnist() if data is None else data).limit(train, test)
        size = data.train_x[0].numel()
        drawn = [torch.randperm(size, generator=seeded(seed, TRANSFORM, k)) for k in range(1, tasks)]
        self.permutations = torch.stack([torch.arange(size), *drawn])
        self.tests = tasks
        orders, phase = _orders([len(data.train_y)] * tasks, passes, seed)
        super().__init__(data, seed, batch_size, torch.cat(orders), phase, phase)

    def render(self, x: Tensor, place: Tensor) -> Tensor:
        """Images with the pixels of task ``place``, int64 ``(B,)``."""
        return to_unit(x.flatten(1).gather(1, self.permutations[place]).view_as(x))

    def test(self, number: int) -> tuple[Tensor, Tensor]:
        """All test images under the permutation of a task."""
        place = torch.full((len(self.data.test_y),), number)
        return self.render(self.data.test_x, place), self.data.test_y


class SplitMNIST(Stream):
    """Class-incremental split-MNIST: tasks of a few classes each, one head over all, no task label in training or test
    (van de Ven and Tolias 2019).

    Args:
        seed: of the order, and of the classes where these are shuffled.
        classes_per_task: a divisor of the number of classes.
        shuffle_classes: draw which classes share a task; otherwise 0 and 1 come first, then 2 and 3, and so on.
        train, test: images over all tasks, balanced over the classes; None for all.
        batch_size: examples in a batch.
        passes: over each task's images while it lasts.
        data: MNIST when None.
    """

    name = "split"
    boundaries = True

    def __init__(
        self,
        seed: int = 0,
        *,
        classes_per_task: int = 2,
        shuffle_classes: bool = False,
        train: int | None = None,
        test: int | None = None,
        batch_size: int = 64,
        passes: int = 1,
        data: Dataset | None = None,
    ) -> None:
        data = (mnist() if data is None else data).limit(train, test)
        total = data.num_classes
        if classes_per_task < 1 or total % classes_per_task:
            raise ConfigError(
                f"SplitMNIST: expected a divisor of {total} classes in a task, got {classes_per_task}; use 2"
            )
        draw = seeded(seed, TRANSFORM)
        classes = torch.randperm(total, generator=draw) if shuffle_classes else torch.arange(total)
        self.task_of = torch.empty(total, dtype=torch.int64)
        self.task_of[classes] = torch.arange(total) // classes_per_task
        self.tests = total // classes_per_task
        own = [torch.nonzero(self.task_of[data.train_y] == k).flatten() for k in range(self.tests)]
        orders, phase = _orders([len(chosen) for chosen in own], passes, seed)
        index = torch.cat([chosen[order] for chosen, order in zip(own, orders, strict=True)])
        super().__init__(data, seed, batch_size, index, phase, phase)

    def render(self, x: Tensor, place: Tensor) -> Tensor:
        """Images as they are."""
        return to_unit(x)

    def test(self, number: int) -> tuple[Tensor, Tensor]:
        """The test images of a task's classes."""
        mine = self.task_of[self.data.test_y] == number
        return to_unit(self.data.test_x[mine]), self.data.test_y[mine]


class DriftingStream(Stream):
    r"""One pass in random order over images whose distribution moves slowly and without a mark.

    With :math:`p = t/T` for the t-th of T examples, ``"rotation"`` turns the image about its centre by
    :math:`180^\circ p` (bilinear, zeros from outside); ``"permutation"`` applies the first
    :math:`\lfloor (n-1) p\rfloor` of the n - 1 swaps of pixels by which Fisher and Yates draw a uniform permutation of
    all n. The label stays; a 6 that is turned becomes a 9, so no learner can be right everywhere.

    The stream is cut into ``phases`` equal parts for evaluation alone: test set j holds all test images at
    :math:`p = (j + 1/2)/\text{phases}`.

    Args:
        seed: of order and swaps.
        phases: parts, at least 1.
        kind: how images move.
        train, test: images of the pass, and of each test set; None for all.
        batch_size: examples in a batch.
        data: MNIST when None.
    """

    name = "drifting"
    boundaries = False

    def __init__(
        self,
        seed: int = 0,
        *,
        phases: int = 10,
        kind: Literal["rotation", "permutation"] = "rotation",
        train: int | None = None,
        test: int | None = None,
        batch_size: int = 64,
        data: Dataset | None = None,
    ) -> None:
        if kind not in ("rotation", "permutation"):
            raise ConfigError(f"DriftingStream: expected 'rotation' or 'permutation', got {kind!r}; choose one of them")
        data = (mnist() if data is None else data).limit(train, test)
        total = len(data.train_y)
        if not 1 <= phases <= total:
            raise ConfigError(f"DriftingStream: expected 1 to {total} phases, got {phases}; use 10")
        self.kind, self.tests = kind, phases
        self._rendered: dict[int, Tensor] = {}
        self._swapped = _prefixes(data.train_x[0].numel(), seeded(seed, TRANSFORM)) if kind == "permutation" else None
        index = torch.randperm(total, generator=seeded(seed, ORDER))
        place = torch.arange(total, dtype=torch.float64) / total
        phase = torch.arange(total) * phases // total
        super().__init__(data, seed, batch_size, index, phase, place)

    def render(self, x: Tensor, place: Tensor) -> Tensor:
        """Images as they are at the shares ``place`` ``(B,)`` in [0, 1] of the way."""
        if self._swapped is None:
            return rotated(to_unit(x), 180 * place)
        rows = (place * (len(self._swapped) - 1)).floor().long()
        return to_unit(x.flatten(1).gather(1, self._swapped[rows].long()).view_as(x))

    def test(self, number: int) -> tuple[Tensor, Tensor]:
        """All test images as they are in the middle of a phase."""
        if number not in self._rendered:
            place = torch.full((len(self.data.test_y),), (number + 0.5) / self.tests, dtype=torch.float64)
            x = self.render(self.data.test_x, place)
            if self.tests * x.numel() * x.element_size() > KEPT:
                return x, self.data.test_y
            self._rendered[number] = x
        return self._rendered[number], self.data.test_y

    def describe(self) -> dict[str, Any]:
        """What the stream is, for a result."""
        return {**super().describe(), "kind": self.kind}


class Mixed(Stream):
    """All examples of a stream in one random order: what joint training sees, for an upper bound.

    Args:
        stream: whose examples and test sets these are.
    """

    boundaries = False

    def __init__(self, stream: Stream) -> None:
        self.inner, self.name, self.tests = stream, f"{stream.name}, mixed", stream.tests
        order = torch.randperm(stream.samples, generator=seeded(stream.seed, MIX))
        index, place = stream._index[order], stream._place[order]
        super().__init__(stream.data, stream.seed, stream.batch_size, index, torch.zeros_like(order), place)

    def render(self, x: Tensor, place: Tensor) -> Tensor:
        """As the stream does."""
        return self.inner.render(x, place)

    def test(self, number: int) -> tuple[Tensor, Tensor]:
        """As the stream's."""
        return self.inner.test(number)


def rotated(x: Tensor, degrees: Tensor) -> Tensor:
    """Square images ``(B, C, H, H)`` turned counter-clockwise about their centres, each by its angle ``(B,)``.

    Bilinear; what comes from outside is 0.
    """
    angle = torch.deg2rad(degrees.double())
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # an output pixel looks up where it came from; the second coordinate points down
    inverse = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1).to(x.dtype)
    grid = torch.nn.functional.affine_grid(inverse, list(x.shape), align_corners=False)
    return torch.nn.functional.grid_sample(x, grid, mode="bilinear", align_corners=False).clamp_(0, 1)


def _prefixes(size: int, generator: torch.Generator) -> Tensor:
    """The permutations after 0 .. size - 1 swaps of a Fisher-Yates shuffle, int16 ``(size, size)``."""
    current = torch.arange(size, dtype=torch.int16)
    rows = [current]
    for last in range(size - 1, 0, -1):
        other = int(torch.randint(last + 1, (), generator=generator))
        current = current.clone()
        current[[last, other]] = current[[other, last]]
        rows.append(current)
    return torch.stack(rows)
