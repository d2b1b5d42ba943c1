"""`toreq tune`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from toreq.cli.parsing import literal, parse_set
from toreq.errors import ConfigError, ToreqError

if TYPE_CHECKING:
    from toreq.training import TrainConfig
    from toreq.tuning import Space, Tuned

STUDY, BEST, PICTURE, RUNS = "study.sqlite", "best.json", "trials.png", "runs"
MOST_EPOCHS, MOST_EXAMPLES, MOST_HELD_OUT = 3, 10_000, 5_000
_RANGE = re.compile(r"(?P<low>[^:,]+?)\.\.(?P<high>[^:,]+?)(?P<log>:log)?")


def _option(metavar: str, hint: str) -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


@dataclass(frozen=True)
class Tune:
    """Search for settings that train a system well, by the accuracy on training examples that are held out.

    The test data are not looked at. Writes every trial to study.sqlite as it ends, and best.json, with the command that
    trains with the best settings, and trials.png at the end. Ctrl-C keeps all trials, and the same command goes on.
    """

    system: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SYSTEM", help_behavior_hint="")]
    """The system to tune; `toreq systems` lists them."""
    space: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, _option("NAME=RANGE", "(default: shown at start)")
    ] = ()
    """What to search (repeatable): low..high, low..high:log, or values a,b,c of a field of training (learning_rate,
    weight_decay, batch_size, optimizer, schedule, warmup, gradient_clip, shift, rotate, zoom, shear), an option of the
    system, or a field of the solver or estimator (solver.damping). Whole ends mean whole numbers where the option is
    one."""
    trials: Annotated[int, _option("N", "(default: 20)")] = 20
    """Trainings in all; a larger number goes on with an earlier search."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, _option("KEY=VALUE", "(repeatable)")] = ()
    """An option of the system that stays fixed, as in `toreq train`."""
    data: Annotated[str, _option("NAME", "(default: mnist)")] = "mnist"
    """Data set."""
    epochs: Annotated[int | None, _option("N", "(default: the recipe's, 3 at most)")] = None
    """Passes of each trial over its training examples."""
    limit_train: Annotated[int | None, _option("N", "(default: 10000, or what there is)")] = None
    """Examples that each trial trains on, balanced over the classes."""
    holdout: Annotated[int | None, _option("N", "(default: a fifth of the training data, 5000 at most)")] = None
    """Training examples that the trials are judged by and do not train on."""
    side: Annotated[str, _option("NAME", "(default: eqprop)")] = "eqprop"
    """eqprop, bp-eq or bp-ff, as in `toreq train`."""
    seed: Annotated[int, _option("N", "(default: 0)")] = 0
    """Seed of the search, of the weights and of the order of the examples."""
    out: Annotated[Path | None, _option("DIR", "(default: runs/tune-SYSTEM[-ARCH]-DATA-SIDE-seedN)")] = None
    """Where the search is kept, new or that of an earlier call."""
    device: Annotated[str, _option("NAME", "(default: auto)")] = "auto"
    """auto, cpu, cuda or mps."""
    threads: Annotated[int | None, _option("N", "(default: torch's)")] = None
    """Number of threads."""

    def run(self, console: Console, command: str) -> int:
        """Search, print and write; returns the exit code."""
        from toreq.cli import tune_view
        from toreq.io import atomic_write_bytes, atomic_write_json
        from toreq.tuning import require_optuna
        from toreq.tuning.systems import train_command

        require_optuna()
        config = self._config()
        space = self._space(config)
        folder = self._folder(config)
        tune_view.announce(console, config, space, self.trials, folder)
        found = self._search(console, command, config, space, folder)
        plain = dataclasses.replace(config, holdout=None, limit_train=None)
        best = train_command(plain, found.best)
        values = {"system": config.system, "side": config.side, "data": config.data, "command": best}
        settings = {"train": config.to_json(), "made_by": command}
        with contextlib.suppress(OSError):
            # the runs of finished trials are gone from it
            (folder / RUNS).rmdir()
        atomic_write_json(folder / BEST, {**values, **found.to_json(), **settings})
        atomic_write_bytes(folder / PICTURE, tune_view.picture(found, space))
        console.print(tune_view.table(found))
        for name in found.at_edge:
            console.print(
                f"the best {name} lies at an end of its range {found.space[name]}; a wider one may do better",
                soft_wrap=True,
            )
        console.print(f"written to {folder / BEST} and {folder / PICTURE}; train with:\n  {best}", soft_wrap=True)
        return 0

    def _config(self) -> TrainConfig:
        from toreq import data as datasets
        from toreq import systems, training
        from toreq.cli.systems import known_system

        if self.trials < 1:
            raise ConfigError(f"tune: expected at least one trial, got {self.trials}; ask for more")
        system = known_system(self.system)
        options = parse_set(self.set, lambda arch: systems.options(system, arch))
        config = training.config_for(
            system, options, data=self.data, seed=self.seed, device=self.device, side=self.side, threads=self.threads
        )
        examples = len(datasets.load(self.data).train_y)
        held = self.holdout if self.holdout is not None else max(1, min(MOST_HELD_OUT, examples // 5))
        most = max(1, min(MOST_EXAMPLES, examples - held))
        return dataclasses.replace(
            config,
            epochs=self.epochs if self.epochs is not None else min(config.epochs, MOST_EPOCHS),
            limit_train=self.limit_train if self.limit_train is not None else most,
            holdout=held,
        )

    def _space(self, config: TrainConfig) -> Space:
        from toreq.tuning.systems import check_names, default_space

        if not self.space:
            space = default_space(config)
            parameters = {name: p for name, p in space.parameters.items() if name not in config.set}
            return dataclasses.replace(space, parameters=parameters)
        space = parse_space(self.space)
        check_names(config, space)
        return whole_where_whole(space, config)

    def _folder(self, config: TrainConfig) -> Path:
        name = "-".join(
            [config.system, *([str(config.set["arch"])] if "arch" in config.set else []), config.data, config.side]
        )
        folder = self.out or Path("runs") / f"tune-{name}-seed{config.seed}"
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"tune: expected a folder in --out, got the file {folder}; choose another --out")
        # a hidden file is no result of anybody's: the lock of a search that ended before its first trial
        if folder.exists() and not (folder / STUDY).exists() and any(p for p in folder.iterdir() if p.name[0] != "."):
            raise ConfigError(
                f"tune: expected a new folder or that of a search, got {folder} with files in it; choose another --out"
            )
        return folder

    def _search(self, console: Console, command: str, config: TrainConfig, space: Space, folder: Path) -> Tuned:
        from toreq.cli.tune_view import Live
        from toreq.training import Interrupted
        from toreq.tuning import tune
        from toreq.tuning.systems import HeldOut, present

        about = config.to_json()
        for name in ("out", "device", "devices", "threads", "checkpoint_every", "seed"):
            del about[name]
        with Live(console, self.trials) as live:
            try:
                return tune(
                    HeldOut(config, folder / RUNS),
                    space,
                    self.trials,
                    seed=config.seed,
                    storage=folder / STUDY,
                    name=config.system,
                    start=present(config, space),
                    about=about,
                    done=live.done,
                )
            except (Interrupted, KeyboardInterrupt) as stop:
                again = shlex.join(["toreq", *shlex.split(command)[1:]])
                raise ToreqError(
                    f"stopped after {live.finished} of {self.trials} trials, which are kept; go on with: {again}"
                ) from stop


def parse_space(assignments: Sequence[str]) -> Space:
    """The space of ``name=low..high``, ``name=low..high:log`` and ``name=a,b,c``.

    Raises:
        ConfigError: for what is none of these, a name given twice, or a range that is out of order.
    """
    from toreq.tuning import Choice, Integer, Real, Space

    parameters: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        match = _RANGE.fullmatch(text)
        if not (name and equals) or not (match or "," in text):
            raise ConfigError(
                f"--space: expected NAME=LOW..HIGH, NAME=LOW..HIGH:log or NAME=A,B,C, got {assignment!r}; for example "
                "--space learning_rate=1e-4..1e-2:log"
            )
        if name in parameters:
            raise ConfigError(f"--space: expected each name once, got {name!r} twice; leave one out")
        if match is None:
            parameters[name] = Choice([literal(part.strip()) for part in text.split(",")])
            continue
        ends = [literal(match["low"]), literal(match["high"])]
        if any(isinstance(end, bool) or not isinstance(end, int | float) or math.isnan(end) for end in ends):
            raise ConfigError(
                f"--space: expected numbers as the ends of {name}, got {text!r}; list values as {name}=a,b"
            )
        kind = Integer if all(isinstance(end, int) for end in ends) else Real
        parameters[name] = kind(*ends, log=match["log"] is not None)
    return Space(parameters)


def whole_where_whole(space: Space, config: TrainConfig) -> Space:
    """The space with `Real` in the place of `Integer` where what is tuned is a number with a point by default."""
    from toreq import systems
    from toreq.tuning import Integer, Real, Space
    from toreq.tuning.systems import FLAGS

    arch = config.set.get("arch")
    options = systems.options(config.system, None if arch is None else str(arch))
    changed = {}
    for name, parameter in space.parameters.items():
        default = getattr(config, name) if name in FLAGS else options.get(name)
        if isinstance(parameter, Integer) and (isinstance(default, float) or name == "gradient_clip"):
            parameter = Real(float(parameter.low), float(parameter.high), parameter.log)
        changed[name] = parameter
    return Space(changed)
