"""The command-line tool `toreq`."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from toreq import __version__

OK, FAILURE, BAD_USAGE = 0, 1, 2
LOG_WIDTH = 120

DESCRIPTION = """Networks that settle: Equilibrium Propagation for PyTorch.

`toreq COMMAND --help` explains a command. --version prints the version; --debug (or TOREQ_DEBUG=1) shows the traceback
of an error. Exit codes: 0 success, 1 failure, 2 bad usage."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments `argv` (those of the process by default) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("TOREQ_DEBUG", "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    if arguments in (["--version"], ["-V"]):
        print(f"toreq {__version__}")
        return OK

    from rich.console import Console

    from toreq.errors import ConfigError, ToreqError

    errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        with warnings.catch_warnings():
            _one_line_warnings(errors)
            return _dispatch(arguments)
    except (ToreqError, OSError, KeyboardInterrupt) as error:
        if debug:
            raise
        errors.print(f"toreq: {str(error) or 'stopped'}")
        return BAD_USAGE if isinstance(error, ConfigError) else FAILURE


def _dispatch(arguments: list[str]) -> int:
    import torch
    import tyro
    from rich.console import Console

    from toreq.cli import bench, demo, evaluate, evidence, inspect, sample, systems, train, tune
    from toreq.cli.parsing import expand_set

    # A state that decays to subnormal numbers makes a step many times slower.
    torch.set_flush_denormal(True)
    commands: dict[str, Any] = {
        "systems": systems.Systems,
        "train": train.Train,
        "tune": tune.Tune,
        "eval": evaluate.Eval,
        "show": inspect.Show,
        "sample": sample.Sample,
        "check": inspect.Check,
        "doctor": inspect.Doctor,
        "demo": demo.Demo,
        "bench": bench.Bench,
        "evidence": evidence.Evidence,
    }
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            commands, prog="toreq", description=DESCRIPTION, args=expand_set(arguments), sort_subcommands=False
        )
    except SystemExit as stop:
        # tyro has printed the help (0) or what is wrong with the arguments (2).
        return stop.code if isinstance(stop.code, int) else BAD_USAGE
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        # Where nobody looks at a window (a log, a pipe) there is room for a whole table.
        console = Console(highlight=False, width=LOG_WIDTH)
    return command.run(console, shlex.join(["toreq", *arguments]))


def _one_line_warnings(errors: Any) -> None:
    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: object = None,
        line: str | None = None,
    ) -> None:
        errors.print(f"toreq: warning: {message}")

    warnings.showwarning = show
