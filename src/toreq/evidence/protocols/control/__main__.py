"""Measure all sides on one task.

    python -m toreq.evidence.protocols.control --task pendulum --budget quick --seeds 3 --out RESULT.json

Every side is tuned first, in equal trials with seeds apart from those that are measured. What is in the file is not run
again, and a run that was interrupted goes on at its last checkpoint.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from toreq.bench.timing import commit
from toreq.errors import ConfigError, DataError, ToreqError
from toreq.evidence import budgets, store
from toreq.evidence.claim import TUNING_SEED, Outcome, Trial
from toreq.evidence.protocols import control
from toreq.evidence.protocols.control.extra import versions
from toreq.evidence.protocols.control.results import Results, settings
from toreq.evidence.workers import perform
from toreq.training.environment import environment
from toreq.tuning import tune


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    chosen = _parser().parse_args(arguments)
    try:
        measure(chosen, shlex.join(sys.argv[1:] if arguments is None else arguments))
    except ToreqError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m toreq.evidence.protocols.control",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", default="pendulum", help=f"one of {', '.join(control.TASKS)}")
    parser.add_argument("--budget", default="quick", help=f"one of {', '.join(budgets.BUDGETS)}")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every side, from 0 on")
    parser.add_argument("--sides", nargs="+", default=list(control.SIDES), help="what to measure")
    parser.add_argument("--trials", type=int, default=3, help="of the search for every side; 0: shipped settings")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file, kept up to date")
    return parser


def measure(chosen: argparse.Namespace, words: str) -> Results:
    """Tune and run what the file does not hold yet.

    Raises:
        ConfigError: for an unknown task, budget or side.
        DataError: for a file of other settings.
    """
    budget, task = budgets.find(chosen.budget), control.find(chosen.task)
    if chosen.seeds < 1 or chosen.trials < 0:
        raise ConfigError(
            f"control: expected at least one seed and no negative trials, got {chosen.seeds}, {chosen.trials}"
        )
    for name in chosen.sides:
        control.trunk(name, (1,))  # an unknown side is refused before anything runs
    described = {**settings([task.size(budget)]), "task": repr(task), "trials": chosen.trials}
    results = _opened(chosen.out, task.name, budget.name, described)
    results.command = f"python -m toreq.evidence.protocols.control {words}"
    results.commit, results.environment = commit(), environment(torch.device(chosen.device))
    results.environment["versions"] |= versions()
    results.environment["threads"] = chosen.threads
    store.prepare_scratch(chosen.out.parent)
    scratch = chosen.out.parent / store.SCRATCH / chosen.out.stem
    for name in chosen.sides:
        if chosen.trials and name not in results.tuned:
            _tune(results, name, task, budget, chosen, scratch / f"{name}-tuning")
        for seed in range(chosen.seeds):
            if (name, seed) in results.runs:
                continue
            tuned = results.tuned[name].best if name in results.tuned else {}
            trial = Trial(budget, name, seed, chosen.device, scratch / f"{name}-{seed}", tuned)
            protocol = functools.partial(_side, name=name, task=task)
            outcome, seconds = perform(protocol, trial, chosen.threads)
            results.runs[name, seed], results.seconds[name, seed] = outcome, seconds
            results.save(chosen.out)
            store.drop_scratch(trial.scratch)
            print(_line(name, seed, outcome, seconds), flush=True)
    return results


def _opened(path: Path, task: str, budget: str, described: dict[str, Any]) -> Results:
    if not path.exists():
        return Results(task, budget, described)
    found = Results.load(path)
    if (found.task, found.budget, found.settings) != (task, budget, described):
        raise DataError(
            f"control: expected results of {task} ({budget}) at the present settings in {path}, got {found.task} "
            f"({found.budget}) or others; name another file, or move it away"
        )
    return found


def _tune(
    results: Results, name: str, task: control.Task, budget: budgets.Budget, chosen: argparse.Namespace, scratch: Path
) -> None:
    scratch.mkdir(parents=True, exist_ok=True)
    made = control.trunk(name, task.size(budget).hidden)

    def value(number: int, params: Mapping[str, Any]) -> float:
        trial = Trial(budget, name, TUNING_SEED, chosen.device, scratch / str(number))
        torch.set_num_threads(chosen.threads)
        torch.set_flush_denormal(True)
        found = control.objective(made, trial, task, params)
        print(f"{name} tuning {dict(params)}: {found:.4g}", flush=True)
        return found

    results.tuned[name] = tune(
        value,
        control.SPACE,
        chosen.trials,
        seed=TUNING_SEED,
        storage=scratch / "search.sqlite",
        name=f"{task.name} {name}",
        start={"learning_rate": task.size(budget).rate},
    )
    results.save(chosen.out)
    store.drop_scratch(scratch)


def _side(trial: Trial, name: str, task: control.Task) -> Outcome:
    return control.side(name, trial, task)


def _line(name: str, seed: int, outcome: Outcome, seconds: float) -> str:
    shown = ("steps to threshold", "return", "return, pushed")
    values = [f"{key} {outcome.metrics[key].value}" for key in shown if key in outcome.metrics]
    return f"{name} seed {seed}: {', '.join(values)}; {seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
