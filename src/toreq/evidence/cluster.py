"""The same jobs on a Ray cluster."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from toreq.errors import ConfigError
from toreq.evidence.claim import Outcome, Trial
from toreq.evidence.workers import ATTEMPTS, Done, Job, Report, perform


def _ray() -> Any:
    # A local cluster of one user needs no token; where one is set, it is kept.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # otherwise a job on 0 GPUs hides the machine's
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            'evidence: expected ray for --scheduler ray, got none installed; pip install "toreq[scale]"'
        ) from error


def _remote(protocol: Any, trial: Trial, threads: int) -> tuple[dict[str, Any], float]:
    outcome, seconds = perform(protocol, trial, threads)
    return outcome.to_json(), seconds


class Ray:
    """Jobs on a Ray cluster: the one of ``RAY_ADDRESS`` or of ``address``, else one started on this machine.

    Results come back to this process, which alone writes them. Scratch folders are resumed from where the node sees
    the folder of the results (a shared file system); elsewhere an interrupted run begins anew.

    Args:
        jobs: jobs at once.
        threads: of each job, reserved as that many CPUs.
        address: of a running cluster.

    Raises:
        ConfigError: ray is not installed.
    """

    def __init__(self, jobs: int = 1, threads: int = 1, address: str | None = None) -> None:
        self.jobs, self.threads, self.address = jobs, threads, address
        self.ray = _ray()

    @property
    def width(self) -> int:
        """How many jobs run at once."""
        return self.jobs

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Run all jobs, ``self.jobs`` at once; one whose worker dies is run again once."""
        ray = self.ray
        started = not ray.is_initialized()
        if started:
            address = self.address or os.environ.get("RAY_ADDRESS")
            own: dict[str, Any] = {}
            if not address:
                # workers of this machine find the modules that this process finds; another's have folders of their own
                paths = os.pathsep.join(path for path in sys.path if path)
                own = {
                    "num_cpus": self.jobs * self.threads,
                    "include_dashboard": False,
                    "runtime_env": {"env_vars": {"PYTHONPATH": paths}},
                }
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
        # a dead worker is ray's to start again; an exception of the protocol would only come again
        task = ray.remote(num_cpus=self.threads, max_retries=ATTEMPTS - 1, retry_exceptions=False)(_remote)
        waiting, running = list(jobs), {}
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    job = waiting.pop(0)
                    running[task.remote(job.protocol, job.trial, self.threads)] = job
                (ready,), _ = ray.wait(list(running), num_returns=1)
                job = running.pop(ready)
                done(job, self._report(ready))
        finally:
            for reference in running:
                ray.cancel(reference, force=False)
            if started:
                ray.shutdown()

    def _report(self, reference: Any) -> Report:
        errors = self.ray.exceptions
        try:
            content, seconds = self.ray.get(reference)
            return Report(Outcome.from_json(content), seconds, 1)
        except errors.RayTaskError as error:
            cause = getattr(error, "cause", None) or error
            return Report(None, 0.0, 1, f"{type(cause).__name__}: {cause}")
        except errors.RayError as error:
            # ray says neither how often it tried nor the exit code as a number
            first = (str(error).strip().splitlines() or ["no message"])[0]
            return Report(None, 0.0, ATTEMPTS, f"the worker died: {type(error).__name__}: {first}")
