"""A ring of past tensors with a moving head and a fading sum in O(1) a step."""

from __future__ import annotations

from torch import Tensor

from toreq.core.state import rows
from toreq.errors import ConfigError


class Ring:
    r"""The last R tensors, newest first, and :math:`S = \sum_{r=1}^{R}\rho^{\,r-1} m_r`.

    Slots hold references, so a push copies nothing; the sum is updated from the tensor that enters and the one that
    leaves: :math:`S \leftarrow m + \rho\,(S - \rho^{R-1} m_R)`.

    Args:
        first: what all R slots hold at the start, ``(B, ...)``.
        length: R, at least 1.
        decay: :math:`\rho` in (0, 1].

    Raises:
        ConfigError: for a length or decay out of range.
    """

    def __init__(self, first: Tensor, length: int, decay: float = 1.0) -> None:
        if length < 1 or not 0 < decay <= 1:
            raise ConfigError(
                f"Ring: expected length >= 1 and decay in (0, 1], got {length} and {decay}; e.g. length=4, decay=0.9"
            )
        self.length, self.decay = length, decay
        self._slots = [first] * length
        self._head = 0
        weight = float(length) if decay == 1 else (1 - decay**length) / (1 - decay)
        self._sum = first * weight
        self._last = decay ** (length - 1)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, age: int) -> Tensor:
        """The tensor pushed ``age`` pushes ago (0: the newest), modulo R."""
        return self._slots[(self._head - age) % self.length]

    @property
    def fading_sum(self) -> Tensor:
        """The decayed sum over the slots."""
        return self._sum

    def selected(self, index: Tensor) -> Ring:
        """The same ring for the examples ``index``."""
        part = object.__new__(Ring)
        part.__dict__.update(self.__dict__)
        part._slots = [rows(slot, index) for slot in self._slots]
        part._sum = rows(self._sum, index)
        return part

    def push(self, new: Tensor) -> None:
        """Move the head and overwrite the oldest slot."""
        self._head = (self._head + 1) % self.length
        oldest = self._slots[self._head]
        self._slots[self._head] = new
        if self.length == 1:
            self._sum = new  # exact, where subtracting would leave rounding noise
        else:
            self._sum = new + self.decay * (self._sum - self._last * oldest)
