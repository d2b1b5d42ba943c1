"""`toreq sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

if TYPE_CHECKING:
    from torch import Tensor

    from toreq.systems import DiffTorEqProp, Known
    from toreq.training.run import Run

Half = Literal["top", "bottom", "left", "right"]


@dataclass(frozen=True)
class Sample:
    """Draw images from a denoising run (difftoreqprop with denoising=1) by annealed Langevin dynamics.

    Writes them as a grid; rows of classes with --labels, completed test images with --keep.
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("samples.png")
    """The picture."""
    n: Annotated[int, tyro.conf.arg(metavar="N")] = 64
    """How many images."""
    labels: Annotated[str, tyro.conf.arg(metavar="CLASSES", help_behavior_hint="(default: of any class)")] = ""
    """Classes in turn, as in 0,1,2, or all of them by `each`: the label node is clamped to them."""
    keep: Annotated[Half | None, tyro.conf.arg(help_behavior_hint="(default: nothing is given)")] = None
    """The half of the first test images that is given; the rest is painted."""
    levels: Annotated[int, tyro.conf.arg(metavar="N")] = 50
    """Noise levels."""
    eta: Annotated[float, tyro.conf.arg(metavar="0..1")] = 1.0
    """Share of fresh noise at each level."""
    corrections: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Langevin steps at each level."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Of all noise."""
    animation: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Also write the chains as they move to this GIF."""

    def run(self, console: Console, command: str) -> int:
        """Draw and write; returns the exit code."""
        import torch

        from toreq import training
        from toreq.diagnostics import samples
        from toreq.errors import ConfigError
        from toreq.io import atomic_write_bytes
        from toreq.systems import Anneal, DiffTorEqProp

        run = training.load_run(self.run_folder)
        net = run.net
        if not isinstance(net, DiffTorEqProp) or run.config.side == "bp-ff":
            raise ConfigError(
                f"sample: expected a run of difftoreqprop, got {run.config.system} ({run.config.side}); train one with "
                "toreq train difftoreqprop --set denoising=1"
            )
        labels, known = self._labels(net), self._known(run)
        low, high = net.span
        anneal = Anneal(levels=self.levels, high=high, low=low, eta=self.eta, corrections=self.corrections)
        ring = net.conveyor(
            self.n, anneal=anneal, labels=labels, known=known, batch=max(1, self.n),
            generator=torch.Generator().manual_seed(self.seed),
        )  # fmt: skip
        columns = net.num_classes if self.labels == "each" else None
        frames, found = [], None
        # one batch: what is on the ring is its chains at one level after the other
        with torch.no_grad():
            while found is None:
                found = ring.tick()
                if self.animation is not None:
                    frames.append(samples.grid(ring.x[0], columns))
        atomic_write_bytes(self.out, samples.png(samples.grid(found, columns)))
        console.print(f"wrote {self.out}: {len(found)} images, {anneal.evaluations} denoisings each", soft_wrap=True)
        if self.animation is not None:
            atomic_write_bytes(self.animation, samples.gif(frames))
            console.print(f"wrote {self.animation}: {len(frames)} frames", soft_wrap=True)
        return 0

    def _labels(self, net: DiffTorEqProp) -> Tensor | None:
        import torch

        from toreq.errors import ConfigError

        if not self.labels:
            return None
        try:
            given = range(net.num_classes) if self.labels == "each" else [int(s) for s in self.labels.split(",")]
        except ValueError:
            raise ConfigError(
                f"sample: expected classes as in 0,1,2 or `each`, got {self.labels!r}; give whole numbers"
            ) from None
        chosen = torch.tensor(list(given))
        return chosen.repeat(-(-self.n // len(chosen)))[: self.n]

    def _known(self, run: Run) -> Known | None:
        import dataclasses

        import torch

        from toreq import training
        from toreq.errors import ConfigError
        from toreq.systems import Known

        if self.keep is None:
            return None
        config = dataclasses.replace(run.config, limit_train=1, limit_test=None, holdout=None)
        x = training.prepare(config, "cpu").test_x[: self.n]
        if x.dim() != 4 or len(x) < self.n:
            raise ConfigError(
                f"sample: expected at least {self.n} test images with --keep, got {tuple(x.shape)}; lower --n"
            )
        height, width = x.shape[-2:]
        mask = torch.zeros(x.shape[1:], dtype=torch.bool)
        half = {
            "top": (slice(0, height // 2), slice(None)),
            "bottom": (slice(height // 2, None), slice(None)),
            "left": (slice(None), slice(0, width // 2)),
            "right": (slice(None), slice(width // 2, None)),
        }[self.keep]
        mask[(slice(None), *half)] = True
        return Known(x.to(next(run.net.parameters()).dtype), mask)
