"""Robustness: baselines against closed forms, matched training, smoke runs of every side, the runner and its page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from toreq.data import Dataset
from toreq.errors import ConfigError, DataError
from toreq.evidence import BUDGETS, Outcome, Trial
from toreq.evidence.protocols import robustness
from toreq.evidence.protocols.robustness import baselines, corruptions, fitting, protocol, report, running, sides
from toreq.evidence.protocols.robustness.__main__ import main
from toreq.evidence.protocols.robustness.fitting import Matching, Recipe
from toreq.evidence.workers import perform

SMOKE = BUDGETS["smoke"]
ROOT = Path(__file__).resolve().parent.parent


# -- baselines


def test_the_wiener_filter_is_the_least_squares_denoiser() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    x = (torch.randn(200_000, 6, generator=generator, dtype=torch.float64) @ mixing + 2).view(-1, 1, 2, 3)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    wiener = baselines.Wiener(nn.Identity(), x).given(0.7)
    assert isinstance(wiener, baselines.Wiener)
    noisy = (x + 0.7 * noise).flatten(1)
    # ordinary least squares from noisy to clean images, with an intercept
    design = torch.cat([noisy, torch.ones(len(noisy), 1, dtype=torch.float64)], 1)
    fitted = design @ torch.linalg.lstsq(design, x.flatten(1)).solution
    assert torch.allclose(wiener.denoised(noisy.view_as(x)).flatten(1), fitted, atol=0.05)
    assert torch.equal(wiener.given(0.0)(x), x)  # type: ignore[operator]


def test_the_gaussians_are_the_bayes_rule_under_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([[1.0, 0.2], [0.3, 2.0]], dtype=torch.float64)
    means = torch.tensor([[0.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    y = (torch.arange(60_000) % 3 == 0).long()
    x = (means[y] + scales[y] * torch.randn(60_000, 2, generator=generator, dtype=torch.float64)).view(-1, 1, 1, 2)
    sigma = 0.5
    told = baselines.Gaussians(x, y, 2).given(sigma)
    points = 2 * torch.randn(500, 1, 1, 2, generator=generator, dtype=torch.float64)
    exact = torch.stack(
        [
            math.log(prior)
            + torch.distributions.Normal(mean, (scale**2 + sigma**2).sqrt()).log_prob(points.flatten(1)).sum(1)
            for mean, scale, prior in zip(means, scales, (2 / 3, 1 / 3), strict=True)
        ],
        1,
    )
    scores = told(points)
    # equal up to a constant, and to the error of moments from so many draws
    assert torch.allclose(scores[:, 0] - scores[:, 1], exact[:, 0] - exact[:, 1], atol=0.2, rtol=0.05)
    assert int((scores.argmax(1) != exact.argmax(1)).sum()) <= 5


def test_the_networks_are_of_the_stated_sizes() -> None:
    sizes = {make: sum(p.numel() for p in make().parameters()) for make in (baselines.cnn, baselines.mlp)}
    assert sizes[baselines.cnn] == 28_938
    assert sizes[baselines.mlp] == 784 * 512 + 512 + 512 * 10 + 10
    assert baselines.cnn()(torch.rand(2, 1, 28, 28)).shape == (2, 10)


# -- corruptions


class Mean(nn.Module):
    """Says 1 when the mean is above 1/2."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        return torch.stack([torch.full_like(mean, 0.5), mean], 1)


def test_the_noise_curve_of_a_mean_is_the_normal_distribution() -> None:
    x = torch.full((4000, 1, 2, 2), 0.6)
    y = torch.ones(4000, dtype=torch.int64)
    points = corruptions.noise_curve(Mean(), x, y, "unclipped", 0, (0.0, 0.2, 1.0))
    for sigma, found in points:
        deviation = sigma / 2
        share = 0.5 * (1 + math.erf(0.1 / deviation / math.sqrt(2))) if sigma else 1.0
        assert found == pytest.approx(100 * share, abs=2.5)


def test_noise_is_the_same_for_every_net_and_clipped_where_it_says_so() -> None:
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    free, bound = (corruptions.noisy(x, 0.5, clip, 7) for clip in ("unclipped", "clipped"))
    assert torch.equal(free.clamp(0, 1), bound)
    assert not torch.equal(free, bound)
    assert torch.equal(corruptions.noisy(x, 0.5, "unclipped", 7), free)
    assert torch.allclose(corruptions.noisy(x, 0.25, "unclipped", 7) - x, (free - x) / 2, atol=1e-6)


def test_a_classifier_that_wants_sigma_is_told() -> None:
    asked: list[float] = []

    class Asks(Mean):
        def given(self, sigma: float) -> nn.Module:
            asked.append(sigma)
            return self

    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    corruptions.noise_curve(Asks(), x, y, "clipped", 0, (0.0, 0.3))
    corruptions.corruption_curve(Asks(), x, y, "blur", 0, (1,))
    assert asked == [0.0, 0.3, 0.0]


# -- matched clean accuracy


def _separable(number: int = 400) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(number) % 2
    x = torch.randint(0, 120, (number, 1, 2, 2), generator=generator) + 100 * y[:, None, None, None]
    x = x.to(torch.uint8)
    return Dataset("toy", "toy", x, y, x, y, 2, (1, 2, 2), "none")


def _linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))


def test_training_stops_at_the_same_clean_accuracy() -> None:
    data = _separable()
    matching = Matching(target=90.0, tolerance=4.0, every=1)
    found = [fitting.fit(_linear(), data, Recipe(200, rate, 16), 0, 100, matching) for rate in (3e-3, 1e-2)]
    for one in found:
        assert one.matched is True
        assert abs(one.held_out - 90) <= 4
    # the faster one needs fewer steps, and neither all of them
    assert found[1].steps < found[0].steps < 200 * 19


def test_a_side_that_never_gets_there_is_not_called_matched() -> None:
    found = fitting.fit(_linear(), _separable(), Recipe(1, 1e-6, 16), 0, 100, Matching(99.0, 0.5, 1))
    assert found.matched is False
    assert found.steps == 19
    # nor one that overshoots between two looks
    found = fitting.fit(_linear(), _separable(), Recipe(40, 3e-2, 16), 0, 100, Matching(60.0, 1.0, 200))
    assert found.held_out > 61
    assert found.matched is False


def test_equal_epochs_are_all_run() -> None:
    data = _separable()
    found = fitting.fit(_linear(), data, Recipe(3, 1e-2, 16), 0, 100)
    assert found.matched is None
    assert (found.steps, found.samples) == (3 * 19, 3 * 300)


def test_held_out_images_are_not_trained_on() -> None:
    data = _separable(40)
    rest, x, y = fitting.held_out(data, 10)
    assert torch.equal(torch.cat([rest.train_x, data.train_x[30:]]), data.train_x)
    assert torch.equal(x, data.inputs("train", slice(30, None)))
    assert len(rest.train_y) == 30
    assert len(y) == 10
    with pytest.raises(ConfigError, match="hold out fewer"):
        fitting.held_out(data, 40)
    with pytest.raises(ConfigError, match="target in"):
        Matching(target=120.0)


# -- the sides


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    pytest.importorskip("foolbox")
    kept: dict[str, Outcome] = {}

    def outcome(name: str) -> Outcome:
        if name not in kept:
            trial = Trial(SMOKE, name, 0, "cpu", tmp_path_factory.mktemp("scratch"))
            kept[name] = perform(running.Measured(True), trial, 1)[0]
        return kept[name]

    return outcome


@pytest.mark.parametrize("name", list(robustness.SIDES))
def test_a_smoke_run_gives_finite_numbers_of_the_right_shape(name: str, smoke: Callable[[str], Outcome]) -> None:
    outcome = smoke(name)
    assert Outcome.from_json(outcome.to_json()) == outcome
    assert all(q.value is not None and math.isfinite(q.value) for q in outcome.metrics.values())
    for curve in ("noise clipped", "noise unclipped"):
        assert [x for x, _ in outcome.curves[curve]] == list(corruptions.SIGMAS)
        assert outcome.curves[curve][0][1] == outcome.metrics["clean accuracy"].value
    assert {"blur", "occlusion", "salt and pepper"} <= set(outcome.curves)
    attacked = robustness.SIDES[name].attacked
    assert ("white-box linf" in outcome.curves) == attacked
    if attacked:
        for norm, eps in protocol.NORMS.items():
            pgd, white = (dict(outcome.curves[f"{kind} {norm}"]) for kind in ("pgd", "white-box"))
            assert list(pgd) == [0.0, *eps]
            assert all((white[size] or 0) <= (pgd[size] or 0) for size in eps)
        checks = [q.value for name, q in outcome.metrics.items() if name.startswith("check: ")]
        assert len(checks) == 15
        assert outcome.metrics["gradients not masked"].value == float(all(checks))


def test_the_same_trial_gives_the_same_numbers(smoke: Callable[[str], Outcome], tmp_path: Path) -> None:
    sides._network.cache_clear()
    again = perform(running.Measured(True), Trial(SMOKE, "bp mlp", 0, "cpu", tmp_path), 1)[0]
    assert again == smoke("bp mlp")


def test_a_finished_part_is_read_again_but_not_for_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(SMOKE, "x", 0, "cpu", tmp_path)
    net = baselines.mlp(width=4).eval()
    first = protocol.measure(net, trial, attacked=False)

    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(protocol, "_corruptions", stops)
    assert protocol.measure(net, trial, attacked=False) == first
    with torch.no_grad():
        net[1].weight.mul_(2)  # type: ignore[index, union-attr, operator]
    with pytest.raises(KeyboardInterrupt):
        protocol.measure(net, trial, attacked=False)


def test_an_unknown_side_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'bp mlp'"):
        sides.find("bp mpl")


# -- the runner and its page


def test_the_runner_keeps_what_is_there_and_refuses_what_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    arguments = ["--budget", "smoke", "--no-attacks", "--sides", "bp mlp", "--out", str(out), "--seeds"]
    assert main([*arguments, "1"]) == 0
    first = json.loads(out.read_text())
    assert main([*arguments, "2"]) == 0
    second = json.loads(out.read_text())
    assert second["runs"][0] == first["runs"][0]
    assert [run["seed"] for run in second["runs"]] == [0, 1]
    assert "bp mlp, seed 1" in capsys.readouterr().out
    # attacked runs do not belong into this file
    assert main(["--budget", "smoke", "--sides", "bp mlp", "--out", str(out), "--seeds", "1"]) == 1
    assert "move the file away" in capsys.readouterr().err
    assert json.loads(out.read_text()) == second
    out.write_text("{")
    with pytest.raises(DataError, match="expected results"):
        running.load(out)


def test_the_page_is_written_between_its_markers(tmp_path: Path, smoke: Callable[[str], Outcome]) -> None:
    names = ("bp mlp", "gaussians")
    runs = [{"side": name, "seed": 0, "seconds": 1.0, "commit": None, **smoke(name).to_json()} for name in names]
    head = {"protocol": "robustness", "version": running.VERSION, "budget": "smoke", "attacked": True}
    file, page = tmp_path / "some.json", tmp_path / "page.md"
    file.write_text(json.dumps({**head, "command": "the command", "runs": runs}))
    page.write_text("before\n<!-- begin some -->\nold\n<!-- end some -->\nafter\n")
    report.write([file], page)
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("before")
    assert text.endswith("after\n")
    clean = smoke("gaussians").metrics["clean accuracy"].value
    assert f"| gaussians | {clean:.1f} |" in text
    assert "the command" in text
    for theme in ("light", "dark"):
        assert (tmp_path / f"some-{theme}.svg").read_text().startswith("<svg")
    with pytest.raises(DataError, match="put them in"):
        report.replaced("no markers", "some", "")


def test_the_committed_tables_are_those_of_the_committed_files() -> None:
    text = (ROOT / report.PAGE).read_text(encoding="utf-8")
    files = sorted((ROOT / "evidence" / "results" / "protocols").glob("robustness-*.json"))
    assert files
    for file in files:
        content = report.body(running.load(file))
        assert report.replaced(text, file.stem, content) == text, "run the protocol's --report"
