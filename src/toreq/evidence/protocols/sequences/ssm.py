"""A diagonal state-space model, trained by backprop through the whole sequence: a baseline, small and complete."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class DiagonalSSM(nn.Module):
    r"""One diagonal state space per feature (S4D; Gu et al. 2022), as a causal convolution.

    .. math:: s_t = \bar\lambda\, s_{t-1} + \bar b\, u_t, \qquad y_t = 2\,\mathrm{Re}\,\langle c, s_t\rangle + d\,u_t,
              \qquad \bar\lambda = e^{\Delta\lambda},\quad \bar b = (\bar\lambda - 1)/\lambda

    with :math:`\lambda = -e^{\nu} + i\omega`, so that :math:`|\bar\lambda| < 1` always. Started at
    :math:`\lambda_n = -\tfrac12 + i\pi n` with step sizes :math:`\Delta` spread over [0.001, 0.1]. The output of a
    whole sequence is the convolution with :math:`k_t = 2\,\mathrm{Re}\sum_n c_n \bar b_n \bar\lambda_n^t`, by FFT.

    Args:
        features: D, one state space each.
        states: complex states of each.
    """

    def __init__(self, features: int, states: int = 16) -> None:
        super().__init__()
        self.log_step = nn.Parameter(torch.empty(features).uniform_(math.log(1e-3), math.log(1e-1)))
        self.log_decay = nn.Parameter(torch.full((features, states), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(states, dtype=torch.float32).repeat(features, 1))
        # real and imaginary parts apart, so that optimizers and checkpoints see real numbers only
        self.read = nn.Parameter(torch.randn(features, states, 2) * math.sqrt(0.5))
        self.skip = nn.Parameter(torch.randn(features))

    def discrete(self) -> tuple[Tensor, Tensor]:
        r"""The complex :math:`\bar\lambda` and :math:`c\,\bar b`, (D, states) each."""
        rate = torch.complex(-self.log_decay.exp(), self.frequency)
        decay = torch.exp(self.log_step.exp()[:, None] * rate)
        return decay, torch.view_as_complex(self.read) * (decay - 1) / rate

    def kernel(self, length: int) -> Tensor:
        """What an impulse leaves behind, (D, length)."""
        rate = torch.complex(-self.log_decay.exp(), self.frequency) * self.log_step.exp()[:, None]
        _, weight = self.discrete()
        time = torch.arange(length, dtype=self.skip.dtype, device=self.skip.device)
        return 2 * torch.einsum("dn,dnt->dt", weight, torch.exp(rate[:, :, None] * time)).real

    def forward(self, u: Tensor) -> Tensor:
        """Outputs ``(B, N, D)`` of inputs ``(B, N, D)``; each position sees those up to itself."""
        length = u.shape[1]
        # twice the length, so that the end does not come round to the beginning
        spectrum = torch.fft.rfft(u, n=2 * length, dim=1) * torch.fft.rfft(self.kernel(length), n=2 * length).T
        return torch.fft.irfft(spectrum, n=2 * length, dim=1)[:, :length] + self.skip * u

    def uncounted_flops(self, length: int) -> float:
        """Operations of a forward pass of one sequence that torch's counter does not see: three transforms of 5 n log n
        for 2 x length real points (half of that each), their product, and the skip. The kernel, made once for a whole
        batch, is left out."""
        points = 2 * length
        transforms = 2 * 2.5 * points * math.log2(points)
        return len(self.skip) * (transforms + 6 * (length + 1) + 2 * length)


class SSMBlock(nn.Module):
    """A pre-norm residual block: state spaces, GELU, and a gated linear mixing of the features.

    Args:
        features: D.
        states: complex states of each feature.
    """

    def __init__(self, features: int, states: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.ssm = DiagonalSSM(features, states)
        self.mix = nn.Linear(features, 2 * features)

    def forward(self, h: Tensor) -> Tensor:
        """``(B, N, D)`` to the same shape."""
        inner = nn.functional.gelu(self.ssm(self.norm(h)))
        return h + nn.functional.glu(self.mix(inner), dim=-1)
