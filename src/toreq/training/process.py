"""Settings of the process that a run needs, put back when it ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from toreq.errors import ConfigError
from toreq.hardware import reuse_freed_memory
from toreq.training.config import TrainConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@contextlib.contextmanager
def process_settings(config: TrainConfig) -> Iterator[None]:
    """Set threads and determinism for a run, and flush subnormal numbers to zero and keep freed memory (which
    cannot be put back).

    With `deterministic` an operation without a deterministic form raises, and one thread is used unless `threads` says
    otherwise, since sums over threads depend on their number.
    """
    # A state that decays to subnormal numbers makes a step many times slower.
    torch.set_flush_denormal(True)
    reuse_freed_memory()
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    wanted = config.threads or (1 if config.deterministic else None)
    try:
        if wanted is not None:
            torch.set_num_threads(wanted)
        if config.deterministic:
            # cuBLAS reads this when its first handle is made.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = benchmark


def make_fabric(config: TrainConfig) -> Fabric:
    """Return the Fabric of `config`: device, precision, and DistributedDataParallel for more than one device.

    Raises `ConfigError` for a device that this machine has not.
    """
    import logging

    from lightning_fabric import Fabric

    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: expected a CUDA device, got none on this machine; use --device cpu")
    if config.device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device: expected an MPS device, got none on this machine; use --device cpu")
    try:
        return Fabric(
            accelerator=config.device,
            devices=config.devices,
            strategy="ddp" if config.devices > 1 else "auto",
            precision=config.precision,  # pyright: ignore[reportArgumentType]  # checked by TrainConfig
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"device: cannot use {config.devices} x {config.device}: {error}") from error
