"""TEP-SSR on sequences that come in segments: the states of its maps go round a torus from one segment to the next."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from toreq.core.ssm_state import advance
from toreq.errors import ConfigError
from toreq.layer import Equilibrium
from toreq.memory.torus import MemoryState, TorusMemory
from toreq.systems.tepssr import TEPSSR
from toreq.systems.tepssr_parts import Segment

Memory = tuple[MemoryState, ...]
"""One ring for each state-space map, from the tokens upwards."""


class Recirculated(nn.Module):
    r"""A network of TEP-SSR that reads a long sequence segment by segment.

    Each segment settles by itself, in the presence of the states with which its maps begin. These come from a ring of
    the last T border states (:class:`~toreq.memory.TorusMemory`, one axis),

    .. math:: s_0 = \frac{1 - \rho}{1 - \rho^T}\sum_{r=0}^{T-1}\rho^r\,q_r

    :math:`q_r` the state in which the segment r + 1 before this one ended: a weighted mean, so that no state grows by
    going round, and for small :math:`\rho` the last one. The ring is clamped in both phases of a segment, and written
    after it; nothing is learned across a border, and a segment of padding alone leaves no trace. For a causal network
    and :math:`\rho \to 0` the segments give what the whole sequence gives; otherwise a token hears the segments
    before, and none after, its own.

    Args:
        net: takes any number of symbols or numbers.
        slots: T, at least 2.
        decay: :math:`\rho` in (0, 1).

    Raises:
        ConfigError: for a network of images, of one length, or with a read-out of every token's own.
    """

    def __init__(self, net: TEPSSR, slots: int = 4, decay: float = 0.1) -> None:
        super().__init__()
        if not net.elastic or len(net.input_shape) > 2:
            raise ConfigError(
                f"Recirculated: expected a network for symbols or numbers of any length, got input_shape="
                f"{net.input_shape}, positions={net.positions}, pool={net.pool!r}; give images as rows of numbers"
            )
        self.net = net
        self.rings = tuple(TorusMemory((slots,), 2 * op.log_rate.numel(), decay) for op in net.maps())

    def empty(self, batch: int) -> Memory:
        """Rings in which nothing was written."""
        like = self.net.maps()[0].log_rate
        return tuple(ring.empty(batch, like.dtype, like.device) for ring in self.rings)

    def recall(self, memory: Memory) -> tuple[Tensor, ...]:
        """The states with which the next segment begins, complex ``(B, M, S)`` for each map."""
        found = []
        for ring, held, op in zip(self.rings, memory, self.net.maps(), strict=True):
            (slots,), (rho,) = ring.shape, ring.decay
            mean = ring.read(held) * ((1 - rho) / (1 - rho**slots))
            found.append(torch.view_as_complex(mean.unflatten(1, (*op.log_rate.shape, 2))))
        return tuple(found)

    def forward(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """One segment.

        Args:
            x: as the network takes it, of any length.
            memory: what :meth:`empty` or the segment before returned.

        Returns:
            what the network says, and the memory after it, detached.
        """
        self.net.check_input(x)
        segment = Segment(x, self.recall(memory))
        own, names = self.net.equilibrium, self.net.equilibrium.dynamics.names
        layer = Equilibrium(own.dynamics, own.solver, own.estimator, readout=names, warn=own.warn)
        layer.report_to(own)
        h = layer(segment)
        logits = self.net.head(h[names[-1]], None if self.net.mask is None else self.net.mask(x))
        return logits, self._written(h, own.dynamics.prepared(segment), memory)

    def real(self, x: Tensor) -> Tensor | None:
        """Which examples have any token in a segment that is no padding, ``(B,)``; None where there is none."""
        return None if self.net.mask is None else self.net.mask(x).any(1)

    @torch.no_grad()
    def _written(self, h: dict[str, Tensor], segment: Segment, memory: Memory) -> Memory:
        out, real = [], self.real(segment.x)
        sources = [*self.net.equilibrium.dynamics.names][: len(memory)]
        for op, name, state, ring, held in zip(
            self.net.maps(), sources, segment.states, self.rings, memory, strict=True
        ):
            border = torch.view_as_real(advance(op, h[name].detach(), state, segment)).flatten(1)
            new = ring.write(ring.advance(held), border)
            out.append(new if real is None else _moved(real, new, held))
        return tuple(out)

    def over(self, x: Tensor, size: int) -> Tensor:
        """A whole sequence in segments of ``size`` tokens, the last one possibly shorter.

        Returns:
            the logits ``(B, C)`` of each sequence's last segment with a token in it where a sequence has one label,
            otherwise those of all tokens.
        """
        if size < 1:
            raise ConfigError(f"Recirculated.over: expected segments of at least 1 token, got {size}; e.g. 64")
        memory, found = self.empty(len(x)), []
        for part in x.split(size, dim=1):
            logits, memory = self(part, memory)
            real = self.real(part)
            if found and logits.dim() == 2:
                last = found.pop()
                logits = logits if real is None else torch.where(real[:, None], logits, last)
            found.append(logits)
        return torch.cat(found, 1)


def _moved(which: Tensor, new: MemoryState, old: MemoryState) -> MemoryState:
    """The new ring of the examples ``which``, and for the others what the old one held at every age."""
    which, count = which[:, None], len(new.rows)
    rows = [torch.where(which, new.row(age), old.row(age)) for age in range(count)]
    return replace(
        new,
        rows=tuple(rows[(new.head - place) % count] for place in range(count)),
        fading=torch.where(which, new.fading, old.fading),
    )


__all__ = ["Memory", "Recirculated"]
