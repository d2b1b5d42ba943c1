"""State-space maps over tokens as operators: linear in the tokens, with the reversed scan as adjoint."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toreq.core.operators import Dense, Operator, Tensors
from toreq.core.scan import factored, toeplitz
from toreq.errors import ConfigError

_REACH = {torch.float64: 640.0}
"""Logarithm of what a chunk's factors may span; they are centred, so that each is at most the root of that."""
_USUAL_REACH = 80.0
RESTING = math.log(math.e - 1)
"""Where softplus is 1: the step size of a gate that says nothing."""


def inflow(decay: Tensor) -> Tensor:
    r""":math:`\sqrt{1 - |a|}` of :math:`|a| = e^{-\mathrm{decay}}`, to all digits near 0, where it has no slope."""
    return (-torch.expm1(-decay)).clamp_min(torch.finfo(decay.dtype).tiny).sqrt()


class ShortenedChunkWarning(UserWarning):
    """A chunk was too long for its decay: the product of decays in it would overflow."""


class SSM(Operator):
    r"""A diagonal complex state-space map over tokens, ``(B, N, D) -> (B, N, M)``, any N (Gu et al. 2022, S4D).

    .. math:: v_t = W u_t, \quad y_t = g^{out}_t \sum_{k=1}^S \mathrm{Re}\left(c_k\sqrt{1 - |a_{tk}|}\,s_{t-1,k}\right)
              + d\,v_t, \quad s_t = a_t s_{t-1} + g^{in}_t\sqrt{1 - |a_t|}\,v_t

    per channel, with :math:`a_t = \exp(\Delta_t(-e^\nu + i\omega))`, so that :math:`|a_t| < 1` whatever is learned.
    Selective with ``gates``: step sizes :math:`\Delta_t` and gates in (0, 1) are functions of the input alone, so the
    map stays linear in u; without, :math:`\Delta = g = 1` and the map is time-invariant. A token reads the state before
    it writes to it: fast modes then pass on the token before, at full strength, and the token itself goes by d.

    The roots keep the map's size independent of the decay: :math:`(s_{t-1}, v_t) \mapsto (s_t, y_t)` is a contraction
    for every :math:`a_t` (its matrix :math:`\bigl(\begin{smallmatrix}a & b\\ b & 0\end{smallmatrix}\bigr)`,
    :math:`b^2 = 1 - |a|`, has norm 1), so that a mode has norm at most 1, and with ``bounded``
    (:math:`\sum_k|c_k| + |d|\le 1` for every channel) the whole has at most :math:`\|W\|`, whatever the gates say. The
    adjoint is the reversed scan, with the decays shifted by one token.

    Time-invariant: chunks of T tokens by one T x T matrix per channel. Selective: factors :math:`e^{\pm\lambda\tau}`
    within chunks, which are shortened (with a :class:`ShortenedChunkWarning`, once) where these would overflow.

    Args:
        features: D.
        hidden: M, the channels.
        states: S, complex numbers of state per channel.
        gates: module mapping ``x`` to ``(B, N, 3 M)``: step sizes (through softplus, 1 at zero), input and output gates
            (through the logistic function); None for the time-invariant map.
        mask: module mapping ``x`` to ``(B, N)``, true for tokens that count. The others are neither read nor written;
            when selective, no time passes at them either.
        chunk: T, at least 1.
        timescales: shortest and longest initial :math:`e^{-\nu}` in tokens, spread evenly in their logarithm.
        frequency: largest initial :math:`|\omega|` in radians per token.
        bounded: keep the coefficients of each channel within a sum of 1.
        scale: standard deviation of the initial W; half of :math:`1/\sqrt D` when None.
        generator: source of the initial weights.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        states: int = 1,
        gates: nn.Module | None = None,
        mask: nn.Module | None = None,
        chunk: int = 32,
        timescales: tuple[float, float] = (1.0, 64.0),
        frequency: float = 0.5,
        bounded: bool = True,
        scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if min(features, hidden, states, chunk) < 1:
            raise ConfigError(
                f"SSM: expected features, hidden, states, chunk >= 1, got {features}, {hidden}, {states}, {chunk}; "
                "e.g. 64, 128, 1, 32"
            )
        if not 0 < timescales[0] <= timescales[1] < math.inf or not 0 <= frequency <= math.pi:
            raise ConfigError(
                f"SSM: expected timescales 0 < shortest <= longest and frequency in [0, pi], got {timescales} and "
                f"{frequency}; e.g. (1, 64) and 0.5"
            )
        self.in_shape, self.out_shape = (features,), (hidden,)
        self.states, self.chunk, self.bounded = states, chunk, bounded
        self.project = Dense(features, hidden, scale=scale, generator=generator)
        shape = (hidden, states)
        low, high = (math.log(t) for t in timescales)
        self.log_rate = nn.Parameter(-(low + (high - low) * torch.rand(shape, generator=generator)))
        self.frequency = nn.Parameter(frequency * (2 * torch.rand(shape, generator=generator) - 1))
        angle = 2 * math.pi * torch.rand(shape, generator=generator)
        # most goes through the memory; the sum is kept off the kink of the bound at 1
        self.coefficient = nn.Parameter(torch.stack([angle.cos(), angle.sin()]) * (0.7 / states))
        self.skip = nn.Parameter(torch.full((hidden,), 0.2))
        self.gates, self.mask = gates, mask
        self._told = False

    @property
    def selective(self) -> bool:
        """Whether step sizes depend on the input."""
        return self.gates is not None

    def eigenvalues(self) -> Tensor:
        r"""The decays a at :math:`\Delta = 1`, complex ``(M, S)``, inside the unit disk."""
        with torch.no_grad():
            return torch.polar((-self.log_rate.exp()).exp(), self.frequency)

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """c as ``(2, M, S)`` and d as ``(M,)``, after the bound."""
        c, d = self.coefficient, self.skip
        if not self.bounded:
            return c, d
        total = torch.linalg.vector_norm(c, dim=0).sum(-1) + d.abs()
        share = 1 / total.clamp_min(1.0)
        return c * share[:, None], d * share

    def tensors(self) -> Tensors:
        shared = self.project.tensors()
        c, d = self.coefficients()
        return {**shared, "skip": d} if self.selective else {**shared, **self._matrices(c, d)}

    def _matrices(self, c: Tensor, d: Tensor) -> Tensors:
        """The matrices of one chunk of the time-invariant map."""
        rate, size = self.log_rate.exp(), self.chunk
        tau = torch.arange(size + 1, dtype=rate.dtype, device=rate.device)
        fall = (-rate[..., None] * tau).exp()
        angle = self.frequency[..., None] * tau
        power = torch.stack([angle.cos(), angle.sin()]) * fall  # (2, M, S, T + 1)
        share = -torch.expm1(-rate)  # 1 - |a|
        c = (c * share)[..., None]
        after = torch.stack([c[0] * power[0] - c[1] * power[1], c[0] * power[1] + c[1] * power[0]])
        kernel = torch.cat([d[:, None], after[0, :, :, : size - 1].sum(1)], 1)
        place = torch.arange(size, device=rate.device)
        ago = place - place[:, None]  # from token j (rows) to token i (columns)
        within = kernel[:, ago.clamp_min(0)] * (ago >= 0)
        inject = power[..., :size].flip(-1).permute(1, 3, 0, 2).flatten(2)
        read = torch.stack([after[0], -after[1]])[..., :size].permute(1, 0, 2, 3).flatten(1, 2)
        return {"within": within, "inject": inject, "read": read, "turn": power[..., size]}

    def inputs(self, x: Any) -> Tensors:
        mask = None if self.mask is None else self.mask(x).to(self.log_rate.dtype)
        given = {} if mask is None else {"mask": mask[..., None]}
        if self.gates is None:
            return given
        return {**given, **self._factors(self.steps(x), mask)}

    def steps(self, x: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes, input and output gates of an input, each ``(B, N, M)``; selective only."""
        assert self.gates is not None
        raw = self.gates(x)
        channels = self.out_shape[0]
        if raw.dim() != 3 or raw.shape[-1] != 3 * channels:
            raise ConfigError(
                f"SSM: expected gates of shape (B, N, {3 * channels}), got {tuple(raw.shape)}; end the module in "
                f"nn.Linear(..., {3 * channels})"
            )
        step, gate_in, gate_out = raw.split(channels, -1)
        return F.softplus(step + RESTING), gate_in.sigmoid(), gate_out.sigmoid()

    def _factors(self, steps: tuple[Tensor, Tensor, Tensor], mask: Tensor | None) -> Tensors:
        """The factors of :func:`~toreq.core.scan.factored` for these steps and gates."""
        step, gate_in, gate_out = steps
        rate, frequency = self.log_rate.exp().T[:, None], self.frequency.T[:, None]  # (S, 1, M)
        root = inflow(rate * step[:, None])
        if mask is not None:
            gate_in, gate_out = gate_in * mask[..., None], gate_out * mask[..., None]
            step = step * mask[..., None]
        size, most = self._fitting(step, rate)
        n = step.shape[1]
        pad = -n % size
        step = F.pad(step, (0, 0, 0, pad)).unflatten(1, (-1, size))  # (B, K, T, M)
        passed = step.cumsum(2)
        half = passed[:, :, -1:] / 2
        written = (passed - half).flatten(1, 2)[:, None, :n]
        c = self.coefficients()[0].transpose(1, 2)[:, None, :, None]  # (2, 1, S, 1, M)
        cos, sin = (frequency * written).cos(), (frequency * written).sin()
        inject = (root * gate_in[:, None] * _grown(rate * written, most))[:, None] * torch.stack([cos, -sin], 1)
        seen = (passed - half - step).flatten(1, 2)[:, None, :n]  # the time of the token before
        cos, sin = (frequency * seen).cos(), (frequency * seen).sin()
        turned = torch.stack([c[0] * cos - c[1] * sin, -(c[0] * sin + c[1] * cos)], 1)
        read = (root * gate_out[:, None] * _grown(-rate * seen, most))[:, None] * turned
        return {
            "inject": F.pad(inject, (0, 0, 0, pad)),
            "read": F.pad(read, (0, 0, 0, pad)),
            "turn": self._turn(half.squeeze(2), rate, frequency, most),
        }

    @staticmethod
    def _turn(half: Tensor, rate: Tensor, frequency: Tensor, most: float | None) -> Tensor:
        """The decay from the middle of each chunk to the middle of the next, ``(B, 2, S, K, M)``."""
        half = half[:, None]
        angle, decay = frequency * _to_next(half), _to_next(_limited(rate * half, most))
        return torch.stack([angle.cos(), angle.sin()], 1) * (-decay).exp()[:, None]

    @torch.no_grad()
    def _fitting(self, step: Tensor, rate: Tensor) -> tuple[int, float | None]:
        """The chosen chunk, or a shorter one whose factors do not overflow; and what limits half the decay of a single
        token, None where nothing has to."""
        size = wanted = min(self.chunk, step.shape[1])
        most = _REACH.get(step.dtype, _USUAL_REACH)
        rate = rate.amax(0).squeeze(0)
        reach = first = self._reach(step, rate, size)
        while not reach <= most and size > 1:
            size = max(1, min(size - 1, int(size * most / reach) if reach < math.inf else 1))
            reach = self._reach(step, rate, size)
        if size < wanted and not self._told:
            self._told = True
            warnings.warn(
                f"SSM: expected a chunk of {wanted} tokens to decay by less than exp({most:.0f}), got "
                f"exp({first:.0f}); chunks of {size} are used, which is slower: choose a shorter chunk, or lower the "
                "rates",
                ShortenedChunkWarning,
                stacklevel=2,
            )
        return size, None if reach <= most else most / 2

    @staticmethod
    def _reach(step: Tensor, rate: Tensor, size: int) -> float:
        pad = -step.shape[1] % size
        total = F.pad(step, (0, 0, 0, pad)).unflatten(1, (-1, size)).sum(2)
        return float((total * rate).amax())

    def _t(self, t: Tensors | None) -> Tensors:
        t = self.tensors() if t is None else t
        if "inject" not in t or (self.mask is not None and "mask" not in t):
            raise ConfigError(
                "SSM: expected what depends on the input beside the weights, got weights alone; couple it by a "
                "Potential, or pass {**op.tensors(), **op.inputs(x)}"
            )
        return t

    def forward(self, u: Tensor, t: Tensors | None = None) -> Tensor:
        t = self._t(t)
        if self.selective:
            return self._scan(F.linear(u, t["weight"]), t, reverse=False)
        # one product projects and puts the channels first
        v = (t["weight"] @ u.flatten(0, 1).T).view(-1, *u.shape[:2])
        return self._scan(v.permute(1, 2, 0), t, reverse=False)

    def add(self, acc: Tensor | None, u: Tensor, t: Tensors) -> Tensor:
        # the scan's own order of memory, in which its adjoint reads without a copy, is that of the first term
        return self.forward(u, t) if acc is None else self.forward(u, t) + acc

    def adjoint(self, w: Tensor, t: Tensors | None = None) -> Tensor:
        t = self._t(t)
        v = self._scan(w, t, reverse=True)
        if self.selective:
            return v @ t["weight"]
        return (v.permute(2, 0, 1).flatten(1).T @ t["weight"]).view(*w.shape[:2], -1)

    def _scan(self, v: Tensor, t: Tensors, reverse: bool) -> Tensor:
        """The scan of the channels ``(B, N, M)``, which when time-invariant are best laid out as ``(M, B, N)``."""
        mask = t.get("mask")
        self._check_length(v.shape[1], t)
        v = v if mask is None else v * mask
        if self.selective:
            # masked tokens neither write nor read: the factors hold the mask
            return factored(v, t["inject"], t["read"], t["turn"], reverse) + t["skip"] * v
        y = toeplitz(
            v.permute(2, 0, 1).contiguous(), t["within"], t["inject"], t["read"], t["turn"], reverse
        ).permute(1, 2, 0)  # fmt: skip
        return y if mask is None else y * mask

    def _check_length(self, n: int, t: Tensors) -> None:
        if self.selective:
            most, chunks = t["inject"].shape[3], t["turn"].shape[3]
            fits, wanted = most - most // chunks < n <= most, f"{most - most // chunks + 1} to {most}"
        else:
            fits, wanted = "mask" not in t or t["mask"].shape[1] == n, str(t["mask"].shape[1]) if "mask" in t else ""
        if not fits:
            raise ConfigError(
                f"SSM: expected {wanted} tokens, as its inputs have, got {n}; take inputs(x) of the same sequences"
            )

    def gradient(self, w: Tensor, u: Tensor, t: Tensors) -> Tensors:
        with torch.enable_grad():
            leaf = {k: v.detach().requires_grad_(k != "mask") for k, v in t.items()}
            value = (w.detach() * self.forward(u.detach(), leaf)).sum()
        wanted = {k: v for k, v in leaf.items() if v.requires_grad}
        # of sequences within one chunk the states between chunks are no part
        grads = torch.autograd.grad(value, list(wanted.values()), materialize_grads=True)
        return dict(zip(wanted, grads, strict=True))

    @torch.no_grad()
    def norm(
        self,
        iterations: int = 50,
        generator: torch.Generator | None = None,
        length: int | None = None,
        t: Tensors | None = None,
    ) -> float:
        r"""Largest singular value for sequences of N tokens, by power iteration on :math:`A^\top A`.

        Args:
            iterations: number of applications of :math:`A^\top A`, at least 1.
            generator: source of the start vector; seed 0 when None.
            length: N; None for that of the inputs, and 256 where there are none.
            t: the tensors, with :meth:`inputs` of B examples where these are needed: the largest over them.
        """
        t = self._t(t)
        weight = t["weight"]
        generator = generator or torch.Generator(device=weight.device).manual_seed(0)
        if length is None:
            length = t["inject"].shape[3] if self.selective else t["mask"].shape[1] if "mask" in t else 256
        batch = max((v.shape[0] for k, v in t.items() if k == "mask" or (self.selective and k == "turn")), default=1)
        shape = (batch, length, *self.in_shape)
        v = torch.randn(shape, generator=generator, dtype=weight.dtype, device=weight.device)
        sigma = v.new_zeros(batch)
        for _ in range(iterations):
            v = v / torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
            u = self.forward(v, t)
            sigma = torch.linalg.vector_norm(u, dim=(1, 2))
            v = self.adjoint(u, t)
        return float(sigma.amax())

    @torch.no_grad()
    def transfer(self, angles: Tensor) -> Tensor:
        r"""Transfer functions of the channels, of the time-invariant map, complex ``(F, M)``:
        :math:`H(\theta) = \tfrac12\sum_k\left[\frac{\gamma_k}{e^{i\theta} - a_k} +
        \frac{\bar\gamma_k}{e^{i\theta} - \bar a_k}\right] + d`, :math:`\gamma_k = c_k(1 - |a_k|)`.

        Args:
            angles: :math:`\theta` in radians per token, ``(F,)``.
        """
        if self.selective:
            raise ConfigError("SSM.transfer: expected a time-invariant map, got gates; use norm(t=...)")
        c, d = self.coefficients()
        a = self.eigenvalues()
        gamma = torch.complex(c[0], c[1]) * -torch.expm1(-self.log_rate.exp())
        unit = torch.polar(torch.ones_like(angles), angles)[:, None, None]
        return 0.5 * (gamma / (unit - a) + gamma.conj() / (unit - a.conj())).sum(-1) + d

    @torch.no_grad()
    def norm_limit(self, points: int = 512) -> float:
        r"""Closed form of the norm of the time-invariant map for ever longer sequences, which bounds it for all:
        :math:`\max_\theta\sigma_{\max}(\mathrm{diag}(H(\theta))\,W)`, the maximum looked for on a grid that is
        refined around the best three.

        Args:
            points: frequencies in [0, pi], beside those of the modes and of their flanks.
        """
        rate, frequency = self.log_rate.exp().flatten(), self.frequency.abs().flatten()
        # a slow mode's peak is as narrow as its rate, and another mode's phase moves it off the centre
        flanks = [frequency + k * rate for k in (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)]
        grid = torch.linspace(0, math.pi, points, dtype=rate.dtype, device=rate.device)
        angles = torch.cat([grid, *flanks]).clamp(0, math.pi).unique()
        sizes = self._sizes(angles)
        best = float(sizes.amax())
        for i in sizes.topk(min(3, len(angles))).indices.tolist():
            low, high = float(angles[max(i - 1, 0)]), float(angles[min(i + 1, len(angles) - 1)])
            for _ in range(3):
                near = torch.linspace(low, high, 17, dtype=rate.dtype, device=rate.device)
                found = self._sizes(near)
                best, j = max(best, float(found.amax())), int(found.argmax())
                low, high = float(near[max(j - 1, 0)]), float(near[min(j + 1, 16)])
        return best

    def _sizes(self, angles: Tensor) -> Tensor:
        r""":math:`\sigma_{\max}(\mathrm{diag}(H(\theta))\,W)` for each angle."""
        weight = self.project.tensors()["weight"]
        gram = torch.einsum("md,fm,me->fde", weight, self.transfer(angles).abs().square(), weight)
        return torch.linalg.eigvalsh(gram)[:, -1].clamp_min(0).sqrt()

    def extra_repr(self) -> str:
        kind = "selective" if self.selective else "time-invariant"
        return f"{self.in_shape} -> {self.out_shape}, states={self.states}, chunk={self.chunk}, {kind}"


def _limited(exponent: Tensor, most: float | None) -> Tensor:
    # more than this is forgotten to the last digit, in one token, and would overflow on its way back
    return exponent if most is None else exponent.clamp_max(most)


def _grown(exponent: Tensor, most: float | None) -> Tensor:
    return _limited(exponent, most).exp()


def _to_next(half: Tensor) -> Tensor:
    """What lies between the middles of neighbouring chunks ``(B, ., K, M)``; the last has no neighbour."""
    return half + torch.cat([half[:, :, 1:], half[:, :, -1:]], 2)


__all__ = ["SSM", "ShortenedChunkWarning", "inflow"]
