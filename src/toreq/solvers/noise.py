"""Where solvers under noise get their random numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Noise:
    """Random numbers of chains: each chain takes one seed from a generator, whose state training captures.

    Args:
        seed: what the generator was seeded with.
        generator: on the CPU, whatever the device of the chains.
    """

    seed: int
    generator: torch.Generator

    @staticmethod
    def of(seed: int) -> Noise:
        """A new source."""
        return Noise(seed, torch.Generator().manual_seed(seed))

    def chain(self, device: torch.device) -> torch.Generator:
        """The generator of the next chain, on its device."""
        drawn = int(torch.randint(2**62, (), generator=self.generator))
        return torch.Generator(device).manual_seed(drawn)
