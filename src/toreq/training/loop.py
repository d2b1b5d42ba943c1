"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from toreq.data import Augmentation, Batches, seeded
from toreq.errors import ConfigError
from toreq.training.config import TrainConfig
from toreq.training.evaluation import unwarned
from toreq.training.interrupt import Interrupted, StopRequest
from toreq.training.process import process_settings
from toreq.training.progress import Live
from toreq.training.run import RunFolder, resume_command
from toreq.training.session import Session

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG_EVERY = 50
_AUGMENT = 1  # key of the augmentation's random stream, apart from the batches' own


def train(
    config: TrainConfig, *, overwrite: bool = False, console: Console | None = None, command: str | None = None
) -> dict[str, Any]:
    """Train a new run into the folder `config.out` and return its summary.

    `console` shows live progress; `command` is recorded in the summary. Raises `RunError` for a folder that is taken or
    cannot be written, `DivergenceError` for a loss or relaxation that is no longer finite (the last good checkpoint
    stays), and `Interrupted` after Ctrl-C or SIGTERM, when the run has been saved.
    """
    if config.out is None:
        raise ConfigError("train: expected a folder in `out`, got None; say where the run is to be written")
    with process_settings(config), StopRequest() as stop:
        session = Session(config, RunFolder(Path(config.out)), resuming=False, overwrite=overwrite)
        with _resumable(session):
            return _run(session, stop, console, command)


def resume(
    path: Path | str, *, epochs: int | None = None, console: Console | None = None, command: str | None = None
) -> dict[str, Any]:
    """Continue the run in the folder `path` from its checkpoint and return its summary.

    On one thread the numbers are those of an unbroken run. More `epochs` extend a run; a cosine schedule then is that
    of the longer run from here on. Raises as `train` does, and `CheckpointError` for a damaged or foreign checkpoint.
    """
    folder = RunFolder(Path(path))
    config = TrainConfig.from_json(folder.config()["train"])
    if epochs is not None:
        config = dataclasses.replace(config, epochs=epochs)
    with process_settings(config), StopRequest() as stop:
        session = Session(config, folder, resuming=True, overwrite=False)
        with _resumable(session):
            return _run(session, stop, console, command)


def _run(session: Session, stop: StopRequest, console: Console | None, command: str | None) -> dict[str, Any]:
    config, fabric, at = session.config, session.fabric, session.at
    model, optimizer, criterion = session.wrapped, session.optimizer, session.net.criterion
    x, y = session.data.train_x, session.data.train_y
    # With several processes each needs a share of every batch.
    drop_last = 0 < len(x) % config.batch_size < session.world
    batches = Batches(x, y, config.batch_size, seed=config.seed, drop_last=drop_last)
    total = config.epochs * len(batches)
    augment = Augmentation(config.shift, config.rotate, config.zoom, config.shear, config.flip)
    last_save = time.monotonic()

    with _live(session, console, total) as live, _writer(session) as writer, unwarned(session.layers):
        while at.epoch < config.epochs:
            model.train()
            started = time.perf_counter() - at.seconds
            for joint_x, joint_y in batches.epoch(at.epoch, start=at.batch):
                if augment.active:
                    # a pure function of (seed, epoch, batch), so that a resumed run sees the same images
                    draw = seeded(config.seed, _AUGMENT, at.epoch, at.batch, device=joint_x.device)
                    joint_x = augment(joint_x, generator=draw)
                x, y = joint_x[session.rank :: session.world], joint_y[session.rank :: session.world]
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate_at(at.step, total)

                with session.explained():
                    logits = model(x)
                loss = criterion(logits, y)
                if session.watchful:
                    session.check_loss(float(loss.detach()))
                with session.explained():
                    # DDP averages over processes, whose shares of a batch may differ by one.
                    fabric.backward(loss * (len(y) * session.world / len(joint_y)))
                session.totals.add(session.layers, loss, logits, y)
                at.step += 1
                at.batch += 1
                if session.watchful:
                    session.check()

                if config.gradient_clip is not None:
                    fabric.clip_gradients(model, optimizer, max_norm=config.gradient_clip)
                optimizer.step()
                optimizer.zero_grad()

                at.seconds = time.perf_counter() - started
                live.advance()
                if at.step % LOG_EVERY == 0:
                    live.note(session.step_line(writer))
                due = time.monotonic() - last_save >= config.checkpoint_every
                stopping, due = session.agree(stop.signal is not None, due)
                if stopping or due:
                    session.save()
                    last_save = time.monotonic()
                if stopping:
                    raise Interrupted(
                        f"stopped at step {at.step} of {total} (epoch {at.epoch + 1}) and saved; "
                        f"go on with: {resume_command(session.folder.path)}"
                    )
            live.epoch(session.epoch_line(writer), config.epochs)
            session.save()
            last_save = time.monotonic()
    return session.finish(command)


@contextlib.contextmanager
def _resumable(session: Session) -> Iterator[None]:
    """Say how to go on after a second Ctrl-C, which stops at once."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(
            f"stopped at once at step {session.at.step}; the checkpoint of step {session.saved_step} is kept; "
            f"go on with: {resume_command(session.folder.path)}"
        ) from stop


def _live(session: Session, console: Console | None, total: int) -> Live:
    config = session.config
    return Live(
        console or Console(quiet=True),
        label=" ".join([config.system, *([str(config.set["arch"])] if "arch" in config.set else []), config.side]),
        total=total,
        done=session.at.step,
        batch_size=config.batch_size,
        show=console is not None and session.fabric.is_global_zero,
    )


@contextlib.contextmanager
def _writer(session: Session) -> Iterator[SummaryWriter | None]:
    if not session.fabric.is_global_zero:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    # What was logged after the checkpoint is about to be logged again.
    with SummaryWriter(str(session.folder.tensorboard), purge_step=session.at.step + 1) as writer:
        yield writer
