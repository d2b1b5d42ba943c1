"""The state of one training run: what is built at its start, saved, restored and reported."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toreq.errors import ConvergenceWarning, DivergenceError
from toreq.io import atomic_write_json
from toreq.layer import equilibria
from toreq.training import checkpoint, rng
from toreq.training.build import build, make_optimizer, trained_module
from toreq.training.config import TrainConfig
from toreq.training.data import prepare
from toreq.training.environment import environment, peak_memory_mb, reset_peak_memory
from toreq.training.evaluation import Evaluation, evaluate, radius
from toreq.training.process import make_fabric
from toreq.training.run import CONFIG, FORMAT, SUMMARY, RunError, RunFolder
from toreq.training.totals import Totals, difference, means

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

RADIUS_EXAMPLES = 32
WELL_SETTLED = 0.99
SETTLING = (
    "free_steps_mean",
    "nudged_steps_mean",
    "free_converged_fraction",
    "nudged_converged_fraction",
    "converged_fraction",
    "asym_mean",
    "halvings",
)


@dataclasses.dataclass
class Position:
    """Where a run is: finished epochs, finished batches of this epoch, steps in all, seconds of training in this epoch,
    and the sums at the last step line."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    mark: dict[str, float] = dataclasses.field(default_factory=dict)


class Session:
    """One process's part of a run: data, network, optimizer, sums and position, and the folder they are saved in."""

    def __init__(self, config: TrainConfig, folder: RunFolder, *, resuming: bool, overwrite: bool) -> None:
        self.config = config
        self.folder = folder
        self.at = Position()
        self.saved_step = 0
        self.fabric = make_fabric(config)
        self.data = prepare(config, self.fabric.device)
        torch.manual_seed(config.seed)
        self.net = build(config, self.data.input_shape, self.data.num_classes, self.data.train_x)
        self.model = trained_module(self.net, config)
        self.raw_optimizer = make_optimizer(self.model, config)
        # Nothing is written before the data and the network are known to be good.
        if self.fabric.is_global_zero and not resuming:
            RunFolder.create(folder.path, overwrite=overwrite)
        self.fabric.launch()
        self.world, self.rank = self.fabric.world_size, self.fabric.global_rank
        self.wrapped, self.optimizer = self.fabric.setup(self.model, self.raw_optimizer)
        self.layers = equilibria(self.model)
        # Reading a number makes a GPU wait, once per step too many for a network that does not settle.
        self.watchful = self.fabric.device.type == "cpu" or bool(self.layers)
        self.data = self.data.to(next(self.model.parameters()).dtype)
        self.totals = Totals(self.fabric.device)
        if self.world > 1:
            # The processes start from one network and then draw their own noise.
            torch.manual_seed(config.seed + 1_000_003 * self.rank)
        if resuming:
            self._restore()
        if self.fabric.is_global_zero:
            self._write_config()
        if not resuming:
            self.save()
        reset_peak_memory(self.fabric.device)

    def _write_config(self) -> None:
        values = {
            "format": FORMAT,
            "version": 1,
            "train": self.config.to_json(),
            "model": {"input_shape": list(self.data.input_shape), "num_classes": self.data.num_classes},
            "data": {"name": self.data.name, "variant": self.data.variant},
            "environment": environment(self.fabric.device),
        }
        atomic_write_json(self.folder.path / CONFIG, values)

    # -- sums over processes, and what must never reach the weights or a checkpoint

    def sums(self) -> dict[str, float]:
        """Return the sums of this epoch over all processes."""
        joint = Totals(self.fabric.device)
        joint.sums += self.totals.sums
        if self.world > 1:
            torch.distributed.all_reduce(joint.sums)
        return joint.read()

    def agree(self, *flags: bool) -> list[bool]:
        """Return the flags that any process has set, so that all save and stop at the same step."""
        if self.world == 1:
            return list(flags)
        raised = torch.tensor([float(flag) for flag in flags], device=self.fabric.device)
        torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX)
        return [value > 0 for value in raised.tolist()]

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Add the step and the checkpoint that is kept to a `DivergenceError` of the layer."""
        try:
            yield
        except DivergenceError as error:
            raise DivergenceError(f"{error}{self._kept()}") from error

    def _kept(self) -> str:
        return (
            f" (at step {self.at.step}, epoch {self.at.epoch + 1}); the checkpoint of step {self.saved_step} is kept "
            f"in {self.folder.checkpoint}"
        )

    def check(self) -> dict[str, float]:
        """Return the sums; raises `DivergenceError` when a loss or a residual since the epoch began is not finite."""
        sums = self.sums()
        if sums["diverged"]:
            where = [name or "the layer" for name, module in self.model.named_modules() if _diverged(module)]
            raise DivergenceError(
                f"training: expected finite residuals, got {int(sums['diverged'])} diverging relaxations"
                f"{' in ' + ', '.join(where) if where else ''}; lower --lr, give --gradient-clip, or damp the solver "
                f"(--set solver.damping=0.5){self._kept()}"
            )
        self.check_loss(sums["loss"])
        return sums

    def check_loss(self, loss: float) -> None:
        """Raise `DivergenceError` for a loss that is not finite."""
        if not math.isfinite(loss):
            raise DivergenceError(
                "training: expected a finite loss, got NaN or infinity; lower --lr or give --gradient-clip"
                f"{self._kept()}"
            )

    # -- checkpoints

    def save(self) -> None:
        """Save all that `_restore` needs to go on as if nothing had happened."""
        joint = self.check()
        for name, parameter in self.model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise DivergenceError(
                    f"training: expected finite weights, got NaN or infinity in {name}; lower --lr or give "
                    f"--gradient-clip{self._kept()}"
                )
        generators = rng.capture(self.model)
        if self.world > 1:
            generators = {name: self._gathered(state) for name, state in generators.items()}
        if self.fabric.is_global_zero:
            optimizer, record = checkpoint.optimizer_tensors(self.raw_optimizer)
            tensors: dict[str, Tensor] = {
                **checkpoint.prefixed("model", self.model.state_dict()),
                **checkpoint.prefixed("optimizer", optimizer),
                **checkpoint.prefixed("rng", generators),
            }
            state = {
                **dataclasses.asdict(self.at),
                "sums": joint,
                "optimizer": record,
                "precision": self.fabric.strategy.precision.state_dict(),
                "devices": self.world,
                "config": self.config.to_json(),
            }
            checkpoint.save(self.folder.checkpoint, tensors, state)
        self.saved_step = self.at.step

    def _gathered(self, state: Tensor) -> Tensor:
        device = self.fabric.device
        found = [torch.empty_like(state, device=device) for _ in range(self.world)]
        torch.distributed.all_gather(found, state.to(device))
        return torch.stack(found).cpu()

    def _restore(self) -> None:
        where = f"checkpoint {self.folder.checkpoint}"
        tensors, state = checkpoint.load(self.folder.checkpoint)
        checkpoint.expect(
            state,
            (*(item.name for item in dataclasses.fields(Position)), "sums", "optimizer", "devices", "precision"),
            where,
        )
        if state["devices"] != self.world:
            raise RunError(f"resume: expected {state['devices']} devices, got {self.world}; use as many as before")
        checkpoint.restore_module(self.model, checkpoint.within("model", tensors), where)
        checkpoint.restore_optimizer(
            self.raw_optimizer, checkpoint.within("optimizer", tensors), state["optimizer"], where
        )
        if state["precision"]:
            self.fabric.strategy.precision.load_state_dict(state["precision"])
        generators = checkpoint.within("rng", tensors)
        if self.world > 1:
            generators = {name: states[self.rank] for name, states in generators.items()}
        rng.restore(self.model, generators)
        if self.fabric.is_global_zero:
            # The sums are joint ones, so the other processes go on from zero.
            self.totals.write(state["sums"])
        self.at = Position(**{item.name: state[item.name] for item in dataclasses.fields(Position)})
        self.saved_step = self.at.step
        if self.at.epoch >= self.config.epochs and self.folder.summary() is not None:
            raise RunError(
                f"resume: the run in {self.folder.path} is finished after {self.at.epoch} epochs; "
                f"give --epochs {self.at.epoch + 1} or more to train on"
            )
        if self.fabric.is_global_zero:
            self.folder.rewind(self.at.step, self.at.epoch)

    # -- reports

    def evaluate(self, *, couplings: bool = True) -> Evaluation:
        """Evaluate on the test data at the precision of training."""
        with self.fabric.autocast():
            return evaluate(
                self.model,
                self.net.criterion,
                self.data.test_x,
                self.data.test_y,
                num_classes=self.data.num_classes,
                couplings=couplings,
            )

    def step_line(self, writer: SummaryWriter | None) -> dict[str, Any]:
        """Write and return the means over the steps since the last such line."""
        sums = self.check()
        found = means(difference(sums, self.at.mark))
        self.at.mark = sums
        line = {
            "kind": "step",
            "step": self.at.step,
            "epoch": self.at.epoch + 1,
            "loss": found["loss"],
            "accuracy": found["accuracy"],
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **{name: found[name] for name in SETTLING},
        }
        self._record(line, writer, "train")
        return line

    def epoch_line(self, writer: SummaryWriter | None) -> dict[str, Any]:
        """Evaluate, write and return the results of the epoch, and go to the next one."""
        found = means(self.check())
        tested = self.evaluate()
        with self.fabric.autocast():
            rho = radius(self.model, self.data.test_x[:RADIUS_EXAMPLES])
        self.at.epoch += 1
        line = {
            "kind": "epoch",
            "epoch": self.at.epoch,
            "step": self.at.step,
            "loss": found["loss"],
            "accuracy": found["accuracy"],
            "test_loss": tested.loss,
            "test_accuracy": tested.accuracy,
            "seconds": self.at.seconds,
            "samples_per_second": len(self.data.train_x) / self.at.seconds,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **{name: found[name] for name in SETTLING},
            **{f"test_{name}": value for name, value in tested.settling.items()},
            "radius": rho,
            "peak_memory_mb": peak_memory_mb(self.fabric.device),
            "confusion": tested.confusion,
        }
        self._record(line, writer, "epoch")
        settled = found["converged_fraction"]
        if self.fabric.is_global_zero and settled is not None and settled < WELL_SETTLED:
            warnings.warn(
                f"training: expected relaxations to settle, got {1 - settled:.1%} unsettled in epoch {self.at.epoch}; "
                f"raise solver.max_steps or use solver=anderson (`toreq doctor {self.folder.path}` says more)",
                ConvergenceWarning,
                stacklevel=2,
            )
        self.at.batch, self.at.seconds, self.at.mark = 0, 0.0, {}
        self.totals = Totals(self.fabric.device)
        return line

    def _record(self, line: Mapping[str, Any], writer: SummaryWriter | None, group: str) -> None:
        if not self.fabric.is_global_zero:
            return
        self.folder.append(line)
        if writer is not None:
            for name, value in line.items():
                if isinstance(value, float):
                    writer.add_scalar(f"{group}/{name}", value, line["step"])

    def finish(self, command: str | None) -> dict[str, Any]:
        """Write and return summary.json: the values of the last epoch, and of the whole run where the name says so."""
        config, data = self.config, self.data
        off = self.evaluate(couplings=False).accuracy if self.layers else None
        if not self.fabric.is_global_zero:
            return {}
        history = [line for line in self.folder.metrics() if line["kind"] == "epoch"]
        seconds = math.fsum(line["seconds"] for line in history)
        last = dict(history[-1])
        for name in ("kind", "epoch", "step", "seconds"):
            del last[name]
        summary = {
            "system": config.system,
            "side": config.side,
            "options": dict(config.set),
            "data": data.name,
            "variant": data.variant,
            "train_examples": len(data.train_x),
            "test_examples": len(data.test_x),
            "seed": config.seed,
            "epochs": len(history),
            "steps": self.at.step,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "train_loss": last.pop("loss"),
            "train_accuracy": last.pop("accuracy"),
            **last,
            "seconds_per_epoch": seconds / len(history),
            "samples_per_second": len(data.train_x) * len(history) / seconds,
            "peak_memory_mb": max(line["peak_memory_mb"] for line in history),
            "couplings_off_accuracy": off,
            "config": config.to_json(),
            "command": command,
            "environment": environment(self.fabric.device),
        }
        atomic_write_json(self.folder.path / SUMMARY, summary)
        return summary


def _diverged(module: nn.Module) -> bool:
    last = getattr(module, "last", None)
    phases = (getattr(last, "free", None), getattr(last, "nudged", None))
    return any(found is not None and not bool(torch.isfinite(found.residual).all()) for found in phases)
