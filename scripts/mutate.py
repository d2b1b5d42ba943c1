"""Plant defects in a copy of toreq and count how many the tests catch: a test that cannot fail proves nothing.

    python scripts/mutate.py                 # all defects
    python scripts/mutate.py --only adjoint  # those whose name contains a word
    python scripts/mutate.py --list

Each defect is one textual patch. The oracle tests run on the patched copy and stop at the first failure; a defect that no
test notices has survived, and the script exits with 1. Before that they run on an unpatched copy: tests that fail there
would "catch" everything, so they are named and the script stops, unless ``--allow-failing`` takes them out.
"""
# ruff: noqa: E501 - one defect a line reads as a table

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITE = (
    "test_nodes",
    "test_operators",
    "test_couplings",
    "test_ring",
    "test_energy",
    "test_solvers",
    "test_anderson",
    "test_locality",
    "test_estimators",
    "test_nudges",
    "test_orders",
    "test_layer",
    "test_module",
    "test_bad_input",
    "test_wrap",
    "test_norm_control",
    "test_engine",
    "test_compaction",
    "test_rounding",
    "test_starts",
    "test_settings",
)


@dataclass(frozen=True)
class Defect:
    """One textual patch of one file, with the test modules most likely to notice it first."""

    name: str
    file: str
    old: str
    new: str
    first: tuple[str, ...]


class StaleDefect(Exception):
    """The text that a defect replaces is no longer in the source, or is there more than once."""


def _d(name: str, file: str, old: str, new: str, *first: str) -> Defect:
    return Defect(name, file, old, new, first)


_EP = "estimators/equilibrium_propagation.py"
_COUPLINGS = "core/couplings.py"
_BASE = "solvers/base.py"
_LOOP = "solvers/loop.py"
_PROBLEM = "solvers/problem.py"
_ANDERSON = "solvers/anderson.py"

DEFECTS: tuple[Defect, ...] = (
    # the contrast
    _d("contrast: wrong sign", "core/energy.py", "plus[1], minus[1], -weight,", "plus[1], minus[1], weight,", "test_energy"),
    _d("centered: factor 1/2 missing", _EP, "weight = 0.5 * pair.active", "weight = 1.0 * pair.active", "test_estimators"),
    _d("one-sided: factor 2", _EP, "weight = active / beta", "weight = 2 * active / beta", "test_estimators"),
    _d("nudge: wrong sign", "estimators/base.py", "scaled(nudge.cotangent(h), -signed_beta)", "scaled(nudge.cotangent(h), signed_beta)", "test_estimators"),
    _d("nonconservative: factor 1/2 missing", "estimators/nonconservative.py", "weight = -0.5 * pair.active", "weight = -1.0 * pair.active", "test_estimators"),
    _d("nonconservative: correction has the wrong sign", "estimators/nonconservative.py", "added(difference(transpose(dh), forward(dh))", "added(difference(forward(dh), transpose(dh))", "test_orders"),
    _d("holomorphic: points off by half a step", _EP, "+ math.pi / self.points", "+ 0.1 * math.pi / self.points", "test_orders"),
    _d("holomorphic: wrong normalisation", _EP, "weight = 2 * active.repeat", "weight = 1 * active.repeat", "test_estimators"),
    _d("predictive: wrong sign", "estimators/predictive.py", "pending = scaled(force, -1 / beta)", "pending = scaled(force, 1 / beta)", "test_predictive"),
    _d("predictive: error not sent back", "estimators/predictive.py", "total = total + message", "total = total + (0 if reader == n else message)", "test_estimators"),
    _d("implicit: missing sigma'", "estimators/adjoint.py", "return self.free.dynamics.derivative(self.free.a, self.free.h, wanted, self.free.bindings)", "return wanted", "test_estimators"),
    _d("implicit: linear couplings without the cotangent", "estimators/adjoint.py", "Energy.accumulate(self.terms, h, self.v, only)", "Energy.accumulate(self.terms, h, {}, only)", "test_estimators"),
    _d("implicit: Jacobian instead of its transpose", "estimators/adjoint.py", "self.transpose, _ = field_products(free.dynamics, free.h, free.bindings)", "_, self.transpose = field_products(free.dynamics, free.h, free.bindings, both=True)", "test_estimators"),
    _d("beta: one for the whole batch", "estimators/base.py", "beta = self.aim(free.dynamics) * norm(free.h) / direct", "beta = (self.aim(free.dynamics) * norm(free.h) / direct).mean().expand_as(direct)", "test_nudges"),
    _d("nudged phase: tolerance relative to the state", _PROBLEM, "ratio = _ratio(difference(r1, r2), difference(a1, a2))", "ratio = _ratio(difference(r1, r2), a1)", "test_estimators"),
    _d("asymmetry: odd part instead of even", "estimators/pairs.py", "norm({n: t + down[n] for n", "norm({n: t - down[n] for n", "test_nudges"),
    _d("halving: examples mixed up", "estimators/pairs.py", "again = self.pair(part, LinearNudge(take(v, worst))", "again = self.pair(part, LinearNudge(take(v, worst.flip(0)))", "test_nudges"),
    _d("halving: bindings of other examples", "core/state.py", "lambda t: rows(t, index)) for name, b", "lambda t: t[: len(index)]) for name, b", "test_compaction"),
    # the layer
    _d("layer: cotangent of the second read-out ignored", "settle.py", "for n, c in zip(layer.readout, cotangents, strict=True)\n", "for n, c in zip(layer.readout[:1], cotangents[:1], strict=True)\n", "test_layer"),
    _d("layer: cost gradient not divided by the batch", "settle.py", "factor = cotangents[0] / size if", "factor = cotangents[0] if", "test_nudges"),
    _d("layer: double backward not refused", "settle.py", "if torch.is_grad_enabled():", "if False:", "test_layer"),
    _d("layer: outputs share storage with the kept state", "settle.py", "solution.h[n].clone() for n in layer.readout", "solution.h[n].view_as(solution.h[n]) for n in layer.readout", "test_layer"),
    _d("layer: recurrent torus without its self-coupling", "layer.py", "SelfCoupling(n, strength) for n", "SelfCoupling(n, 0.0) for n", "test_solvers"),
    # solvers and memory
    _d("fixed point: damping the wrong way round", "solvers/fixed_point.py", "torch.lerp(a, f, self.damping)", "torch.lerp(f, a, self.damping)", "test_solvers"),
    _d("gauss-seidel: reads stale nodes", "solvers/fixed_point.py", "h.update(problem.activate({n: a[n] for n in colour}))", "pass\n        h = problem.activate(a)", "test_solvers"),
    _d("frozen examples: batch mix-up", _LOOP, "self.kept = chosen_pair(self.done, self.kept, kept) if before", "self.kept = chosen_pair(self.done.flip(0), self.kept, kept) if before", "test_solvers"),
    _d("frozen examples: not frozen", _LOOP, "self.kept = chosen_pair(self.done, self.kept, kept) if before else kept", "self.kept = kept", "test_solvers"),
    _d("convergence: decided by the batch", _LOOP, "settled = ratio <= solver.tolerance", "settled = (ratio <= solver.tolerance).any().expand_as(ratio).clone()", "test_solvers"),
    _d("anderson: wrong normalisation", _ANDERSON, "return c / c.sum(1, keepdim=True)", "return c / c.abs().sum(1, keepdim=True)", "test_anderson"),
    _d("anderson: ring off by one", _ANDERSON, "carry.head = (i + 1) % self.length", "carry.head = (i + 1) % (self.length - 1)", "test_anderson"),
    _d("anderson: safeguard keeps the history", _ANDERSON, "carry.valid = valid & ~grown[:, None]", "carry.valid = valid.clone()", "test_anderson"),
    _d("ring: off by one", "memory/ring.py", "(self._head - age) % self.length", "(self._head - age - 1) % self.length", "test_ring"),
    _d("ring: fading sum keeps the oldest", "memory/ring.py", "self._last * oldest", "0 * oldest", "test_ring"),
    # energies, couplings, operators, nodes
    _d("bilinear: missing adjoint", _COUPLINGS, "h[self.post], tensors)\n\n    def gradient", "0 * h[self.post], tensors)\n\n    def gradient", "test_couplings"),
    _d("bilinear: half of the contrast dropped", _COUPLINGS, "joined([m[self.pre], d[self.pre]])", "joined([m[self.pre], 0 * d[self.pre]])", "test_couplings"),
    _d("drive: examples weighted alike", _COUPLINGS, 'return {"drive": d * per_example(weight, d)}', 'return {"drive": d * weight.mean()}', "test_couplings"),
    _d("gate: half of its gradient dropped", _COUPLINGS, "wd * self.op(g * m, bound.shared) + m * self.op(g * wd, bound.shared)", "2 * wd * self.op(g * m, bound.shared)", "test_couplings"),
    _d("gate: gradient dropped", _COUPLINGS, 'grads["gate"] = wd', 'grads["gate"] = 0 * wd', "test_couplings"),
    _d("potential: bias learns from the mean", _COUPLINGS, 'grads["bias"] = dp.', 'grads["bias"] = mp.', "test_couplings"),
    _d("spring: one side pushes", "core/quadratic.py", "return {self.a: -pull,", "return {self.a: pull,", "test_couplings"),
    _d("attention: part through the keys missing", "core/attention.py", "p.transpose(-1, -2) @ q, bound)", "0 * q, bound)", "test_couplings"),
    _d("residual: part through the Jacobian missing", "core/residual.py", "{self.node: at.out + g}", "{self.node: at.out}", "test_couplings"),
    _d("layer norm: the gain's contrast by the slope at one end", "core/nodes.py", "* (c + d)).mean(-1, keepdim=True) / (s + t)", "* c).mean(-1, keepdim=True) / s", "test_rounding"),
    _d("potential: difference of the slopes by the tangent", "core/couplings.py", "return dz.tanh() * (1 - p * q)", "return dz * (1 - q * q)", "test_rounding"),
    _d("exits alone: springs to finer levels left out wrongly", "systems/mstep/exits.py", "names.issuperset(c.nodes)", "len(c.nodes) == 1", "test_mstep"),
    _d("layer norm: direct part of the adjoint gradient dropped", "core/energy.py", "total = total + (t.detach() *", "total = total + 0 * (t.detach() *", "test_estimators"),
    _d("dense: symmetric weight not symmetrised", "core/operators.py", "return _Symmetric.apply(weight) if self.symmetric else weight", "return weight", "test_operators"),
    _d("conv: adjoint without padding", "core/convolution.py", "padding=self.padding,\n            output_padding=self.output_padding", "padding=0,\n            output_padding=0", "test_operators"),
    _d("conv: adjoint of the pooling too large", "core/convolution.py", "w = (w / pool**2)", "w = (w / pool)", "test_operators"),
    _d("circulant: adjoint is the operator itself", "core/operators.py", "return self._convolve(w, t, conjugate=True)", "return self._convolve(w, t, conjugate=False)", "test_operators"),
    _d("tanh: wrong derivative", "core/nodes.py", "w = w * (1 - h * h)", "w = w * (1 - h.abs())", "test_nodes"),
    _d("softmax: derivative without its rank-one part", "core/nodes.py", "w = h * (w - (h * w).sum(-1, keepdim=True))", "w = h * w", "test_nodes"),
    _d("hard sigmoid: wrong potential", "core/nodes.py", "return (h * (a - (0.5 / self.gain) * h))", "return (h * (a - h))", "test_nodes"),
    _d("tanh: increment of the tangent", "core/nodes.py", "(1 - h * self(a))", "(1 - h * h)", "test_nodes"),
    _d("attention: change of the queries' field by the pattern alone", "core/attention.py", "dp @ mk + mp @ dk", "dp @ mk", "test_couplings"),
    _d("spring: strength by the difference alone", "core/quadratic.py", "-dot(wde, me).sum()", "-dot(wde, de).sum()", "test_couplings"),
    _d("chain: errors without the forces on the way", "core/prediction.py", "pending[c.source] + message if c.source in pending", "message if c.source in pending", "test_predictive"),
    _d("radius: sigma' missing", "core/spectral.py", "v = dynamics.derivative(a, h, transpose(v), bindings)", "v = transpose(v)", "test_energy"),
    _d("norm control: small weights blown up", "core/norm_control.py", "self.bound / sigma.clamp_min(self.bound)", "self.bound / sigma", "test_norm_control"),
    # the engine: origins, few digits, compaction
    _d("origin: centered phases without one", _EP, "force, extra, origin=both)", "force, extra)", "test_engine.py::test_nudged_phases_measure_the_response_only"),
    _d("origin: one-sided phase without one", _EP, "force, extra, origin=(free.a, free.h))", "force, extra)", "test_engine"),
    _d("origin: not shifted where the field is not linear", _PROBLEM, "self.static = added(self.static, difference(origin[0], self._evaluate(origin[1], None)))", "pass", "test_engine"),
    _d("origin: whole states are multiplied", _PROBLEM, "self[name] = self.h[name] - self.h0[name]", "self[name] = self.h[name]", "test_engine"),
    _d("origin: lost where a map takes the place of the field", "core/energy.py", "return added(out, {n: t for n, t in (static or {}).items() if n in out})", "return out", "test_engine"),
    _d("mixed: forces that turn are counted twice", _PROBLEM, "added(f, {n: -t for n, t in self.extra(h).items()})", "f", "test_engine"),
    _d("mixed: the finish keeps rounded couplings", _BASE, "fine = problem.around(problem.field(coarse.h), coarse.h)", "fine = low", "test_engine"),
    _d("mixed: steps of the first part not counted", _BASE, "steps=coarse.steps + last.steps", "steps=last.steps", "test_engine"),
    _d("mixed: contrast rounded where the field is not linear", "estimators/base.py", 'precision == "full" or not linear or', 'precision == "full" or', "test_engine"),
    _d("residual: an overflow passes for settled", _PROBLEM, "clamp_min(torch.finfo(size.dtype).tiny) + 0 * scale", "clamp_min(torch.finfo(size.dtype).tiny)", "test_engine"),
    _d("residual: relative to twice the state", _PROBLEM, "size / (size + scale)", "size / (size + 2 * scale)", "test_solvers", "test_engine"),
    _d("anderson: the smaller colour is eliminated", "core/energy.py", "return max(free, key", "return min(free, key", "test_engine"),
    _d("anderson: coefficients of two slots swapped", _ANDERSON, "return torch.stack([a, b], 1)", "return torch.stack([b, a], 1)", "test_anderson"),
    _d("anderson: forgotten slots keep their weight", _ANDERSON, "ones = ones * valid[:, :k, None]", "pass", "test_anderson"),
    _d("compaction: examples come back in another order", _LOOP, "back[order] = torch.arange", "back[:] = torch.arange", "test_compaction"),
    _d("compaction: who left first is forgotten", _LOOP, "moving if self.rows is None else self.rows[moving]", "moving", "test_compaction"),
    _d("compaction: the solver carries other examples on", _LOOP, "self.solver.select(self.carry, moving)", "self.solver.select(self.carry, moving - moving[0])", "test_compaction"),
    _d("compaction: the two phases part", _PROBLEM, "return torch.cat([ratio, ratio])", "return torch.cat([ratio, 0.3 * ratio])", "test_compaction"),
    _d("compaction: who is active is not reduced", _PROBLEM, "self.active.index_select(0, index))", "self.active[: index.shape[0]])", "test_compaction"),
    _d("compaction: the response is measured from other starts", _PROBLEM, "return displacement_from(take(self.start, index))", "return displacement_from({n: t[: len(index)] for n, t in self.start.items()})", "test_compaction"),
    _d("compaction: a force that knows its batch is cut", _PROBLEM, "if self.extra is not None:\n            return None", "if False:\n            return None", "test_compaction"),
    _d("compaction: memory format lost", "core/state.py", "return t[index] if t.dim() == 4 else t.index_select(0, index)", "return t.index_select(0, index)", "test_compaction"),
    _d("rounding: an accumulator is written to", "core/operators.py", "return fresh.add_(acc) if acc.dtype == dtype else acc + fresh", "return acc.add_(fresh)", "test_rounding"),
    _d("symmetric weight: gradient not symmetrised", "core/operators.py", "return _Symmetric.apply(grads[0])", "return grads[0]", "test_rounding"),
    _d("norm control: smallest direction of few rows", "core/norm_control.py", "best = mixing[:, -1] @ weight", "best = mixing[:, 0] @ weight", "test_rounding"),
    _d("tanh: fast branch without the gain", "core/functions.py", "s = (a * (-2 * gain)).sigmoid_()", "s = (a * -2).sigmoid_()", "test_rounding"),
    _d("warm start: of examples never seen", "starts.py", "seen = store.seen[index]", "seen = torch.ones_like(store.seen[index])", "test_starts"),
    _d("warm start: an overflow is kept", "starts.py", "store.seen[index] = finite", "store.seen[index] = True", "test_starts"),
    # the associative memory
    _d("softmax: the increment's sum is not kept", "core/nodes.py", "u - torch.log1p((h * torch.expm1(u)).sum(-1, keepdim=True))", "u", "test_difftoreqprop_memory"),
    _d("memory: odds without the keys' norm", "systems/difftoreqprop_memory.py", "- 0.5 * keys.square().sum(1)", "", "test_difftoreqprop_memory"),
    _d("memory: what is recalled is filtered with the input", "systems/difftoreqprop_memory.py", "Seen(seen.x - centre, seen.level)", "Seen(seen.x, seen.level)", "test_difftoreqprop_memory"),
    _d("by node: the smallest residual counts", "solvers/problem.py", "for n in r]).amax(0)", "for n in r]).amin(0)", "test_difftoreqprop_memory"),
    # state spaces
    _d("state space: gradients of the first half of a doubled batch alone", "core/couplings.py", "g[:size] + g[size:] if k in both.batched else g for k, g in grads.items()}\n\n\nclass Lateral", "g[:size] if k in both.batched else g for k, g in grads.items()}\n\n\nclass Lateral", "test_tepssr"),
    _d("state space: the border's state read a token late", "core/ssm_state.py", "before = at.step.cumsum(1) - at.step", "before = at.step.cumsum(1)", "test_tepssr_memory"),
    _d("state space: written at a masked token", "core/ssm_state.py", "gate_in, gate_out = gate_in * mask, gate_out * mask", "gate_out = gate_out * mask", "test_tepssr_memory"),
    _d("segments: the ring's weights do not sum to 1", "systems/tepssr_memory.py", "(1 - rho) / (1 - rho**slots)", "1 / (1 - rho**slots)", "test_tepssr_memory"),
    _d("parts: every token in every part", "systems/tepssr_parts.py", "mask[:, None] & (place >= low) & (place < high)", "mask[:, None] & (place < high)", "test_tepssr_parts"),
    # denoising
    _d("filter: other directions pass", "systems/difftoreqprop_filter.py", "passed = others * flat +", "passed = flat +", "test_difftoreqprop_filter"),
    _d("filter: deviation for variance of the noise", "systems/difftoreqprop_filter.py", "noise = level.to(self.variances.dtype).square()[:, None]", "noise = level.to(self.variances.dtype)[:, None]", "test_difftoreqprop_filter"),
    _d("filter: the level's parabola turned round", "systems/difftoreqprop_filter.py", "0.5 * (before - after) / bend", "0.5 * (after - before) / bend", "test_difftoreqprop_filter"),
    _d("filter: draws with noise twice in kept directions", "systems/difftoreqprop_filter.py", "b = b - (b @ self.basis) @ self.basis.T", "b = 1 * b", "test_difftoreqprop_filter"),
    _d("filter: few examples trusted as many", "systems/difftoreqprop_filter.py", "shrunk(variances.clamp_min(0), len(flat)).flip(0)", "variances.clamp_min(0).flip(0)", "test_difftoreqprop_filter"),
    _d("sampling: too much fresh noise", "systems/difftoreqprop_sampling.py", "u = self.anneal.eta * t * (1 - (t / s).square()).sqrt()", "u = self.anneal.eta * t", "test_difftoreqprop_sampling"),
    _d("clamp: noise in evaluation", "systems/difftoreqprop_parts.py", "if self.log_noise is not None and self.training:", "if self.log_noise is not None:", "test_difftoreqprop"),
    _d("clamp: no class is the first class", "systems/difftoreqprop_parts.py", "CERTAIN * hot * named[:, None]", "CERTAIN * hot", "test_difftoreqprop"),
    _d("denoising: the clamp costs twice", "systems/difftoreqprop.py", "0.5 * clamp.strength * pulling", "clamp.strength * pulling", "test_difftoreqprop"),
    # chains of some nodes
    _d("chain: settled nodes get noise", "solvers/langevin.py", "return self.noisy is None or n in self.noisy", "return True", "test_langevin_noisy"),
    _d("chain: settled nodes crawl", "solvers/langevin.py", "out[n] = t + residual[n]", "out[n] = t + 0.02 * residual[n]", "test_langevin_noisy"),
    _d("chain: steps not in units of the slopes", "solvers/langevin.py", "if self.preconditioned else 1.0)", "if False else 1.0)", "test_langevin_noisy"),
    _d("chain: the limit in other units", "solvers/curvature.py", "g[n].flatten(1) * units[n]", "g[n].flatten(1)", "test_langevin"),
    _d("thermal: nudges not in units of the slopes", "estimators/thermal.py", "free.dynamics.activation(n).gain * t", "t", "test_langevin_noisy"),
    _d("predictive coding: a rate once halved, doubled", "systems/tpeqprop_coding.py", "rate / 2, rate)", "2 * rate, rate)", "test_tpeqprop"),
    _d("linear attention: shares as if tokens were alike", "core/attention.py", "-z[1] * self.inverse_temperature * high * low", "z[1] * self.inverse_temperature * high * low", "test_tepssr_parts"),
    _d("attention: padding counts in contrasts", "core/attention.py", "dp, mp = self._counted(dp, bound), self._counted(low + 0.5 * dp, bound)", "mp = low + 0.5 * dp", "test_tepssr_parts"),
    # gates
    _d("gated coupling: the way down ungated", "core/gating.py", "parts[self.pre] = below * self.op.adjoint", "parts[self.pre] = self.op.adjoint", "test_htsep"),
    _d("gated coupling: means and differences swapped", "core/gating.py", "torch.cat([below * m[self.pre], below * d[self.pre]])", "torch.cat([below * d[self.pre], below * m[self.pre]])", "test_htsep"),
    _d("contexts: closed where they should be open", "systems/htsep_context.py", "((self.radius[name] - self._distance(self.places(name))) / self.edge)", "((self._distance(self.places(name)) - self.radius[name]) / self.edge)", "test_htsep_contexts"),
    _d("open norm: all units held, open or not", "systems/htsep_norm.py", "self._clip(post.amax(0), pre.amax(0))", "self._clip(torch.ones_like(post.amax(0)), torch.ones_like(pre.amax(0)))", "test_htsep"),
    _d("open norm: clipped to nothing", "systems/htsep_norm.py", "excess = (sizes - self.bound).clamp_min(0)", "excess = sizes", "test_htsep"),
    _d("laws: a new one believes nothing of others", "systems/htsep_laws.py", "if len(used):", "if False:", "test_htsep_contexts"),
    _d("laws: moves of the mean are no variance", "systems/htsep_laws.py", "(1 - rate) * torch.outer", "0 * torch.outer", "test_htsep_contexts"),
    # segments, and orders of memory
    _d("segments: padding alone moves the ring", "systems/tepssr_memory.py", "new if real is None else _moved(real, new, held)", "new", "test_tepssr_memory"),
    _d("segments: padding alone has the answer", "systems/tepssr_memory.py", "torch.where(real[:, None], logits, last)", "logits", "test_tepssr_memory"),
    _d("segments: old states at the wrong age", "systems/tepssr_memory.py", "rows[(new.head - place) % count]", "rows[(new.head + place) % count]", "test_tepssr_memory"),
    _d("states joined along another axis", "core/state.py", "order.index(0))", "0)", "test_tepssr"),
    _d("settings: fast is exact", "systems/registry.py", 'if settings == "fast":', "if False:", "test_settings"),
)  # fmt: skip


def patch(package: Path, defect: Defect) -> None:
    """Plant a defect in the package at `package`."""
    file = package / defect.file
    text = file.read_text()
    if text.count(defect.old) != 1:
        raise StaleDefect(f"{defect.name}: expected {defect.old!r} once in {defect.file}, got {text.count(defect.old)}")
    file.write_text(text.replace(defect.old, defect.new))


def copy_package(folder: Path) -> Path:
    """A copy of the package without its data, which these tests do not read."""
    target = folder / "src" / "toreq"
    shutil.copytree(ROOT / "src" / "toreq", target, ignore=shutil.ignore_patterns("__pycache__", "*.gz"))
    return target


def run_tests(package: Path, tests: Iterable[str], extra: Sequence[str] = ()) -> tuple[int, list[str]]:
    """Run test modules on the package at `package`; the exit code and the names of the tests that failed."""
    source = package.parent
    files = [str(ROOT / "tests" / f"{name}.py") if "::" not in name else str(ROOT / "tests" / name) for name in tests]
    environment = {**os.environ, "TOREQ_TYPECHECK": "0", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = str(source)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:randomly"]
    command += ["-o", f"pythonpath={source} {ROOT / 'tests'}", "--rootdir", str(ROOT), *extra, *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+(?:\[[^\n]*?\])?)(?= - |$)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1):
        failed.append(f"pytest exit code {done.returncode}: {(done.stdout + done.stderr).strip().splitlines()[-1:]}")
    return done.returncode, failed


def catch(defect: Defect, skip: Sequence[str] = ()) -> str | None:
    """The first test that notices the defect, or None when it survives the whole suite."""
    with tempfile.TemporaryDirectory(prefix="toreq-mutate-") as folder:
        package = copy_package(Path(folder))
        patch(package, defect)
        extra = ["-x", *(f"--deselect={name}" for name in skip)]
        rest = [name for name in SUITE if name not in defect.first]
        for tests in (defect.first, rest):
            code, failed = run_tests(package, tests, extra)
            if code != 0:
                return failed[0] if failed else f"pytest exit code {code}"
    return None


def baseline(allow_failing: bool) -> list[str]:
    """Tests that fail without any defect; they must be none, or are taken out."""
    with tempfile.TemporaryDirectory(prefix="toreq-mutate-") as folder:
        code, failed = run_tests(copy_package(Path(folder)), SUITE)
    if code != 0 and not allow_failing:
        listed = "\n  ".join(failed)
        raise SystemExit(
            f"mutate: expected tests that pass without a defect, got failures; mend them first\n  {listed}"
        )
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Plant the chosen defects and print what caught each; 0 when none survived."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="defects whose name contains this text")
    parser.add_argument("--list", action="store_true", help="print the defects and stop")
    parser.add_argument("--allow-failing", action="store_true", help="leave out tests that fail without a defect")
    parser.add_argument("--no-baseline", action="store_true", help="trust that the tests pass without a defect")
    options = parser.parse_args(arguments)
    chosen = [d for d in DEFECTS if options.only.lower() in d.name.lower()]
    if not chosen:
        raise SystemExit(f"mutate: expected part of a defect's name, got {options.only!r}; see --list")
    if options.list:
        print("\n".join(f"{d.name:60s} {d.file}" for d in chosen))
        return 0
    skip = [] if options.no_baseline else baseline(options.allow_failing)
    for name in skip:
        print(f"left out, fails without a defect: {name}")
    survived, stale = [], []
    for i, defect in enumerate(chosen, 1):
        start = time.perf_counter()
        try:
            caught = catch(defect, skip)
        except StaleDefect as error:
            stale.append(defect.name)
            print(f"{i:3d}/{len(chosen)}  STALE     {error}", flush=True)
            continue
        if caught is None:
            survived.append(defect.name)
        verdict = "SURVIVED" if caught is None else "caught"
        by = "" if caught is None else caught.removeprefix("tests/")
        print(
            f"{i:3d}/{len(chosen)}  {verdict:8s}  {defect.name:58s} {time.perf_counter() - start:5.1f} s  {by}",
            flush=True,
        )
    caught_count = len(chosen) - len(survived) - len(stale)
    print(f"\n{caught_count} of {len(chosen)} defects caught, {len(survived)} survived, {len(stale)} stale")
    return 1 if survived or stale else 0


if __name__ == "__main__":
    sys.exit(main())
