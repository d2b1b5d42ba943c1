"""The benches of epochs and of time to accuracy: their arithmetic, their refusals, and exact resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from toreq.bench import accuracy, epoch, nets
from toreq.data import Batches, Dataset, blob_dataset
from toreq.errors import CheckpointError, ConfigError

SIZES = nets.Sizes(width=8, channels=(3, 4), kernel=3)
OURS = ("toreq", "backprop", "unrolled", "red-black")


@pytest.fixture(scope="module")
def data() -> Dataset:
    return blob_dataset(200, 100, (1, 8, 8), 4, noise=0.5)


def quick(data: Dataset, **options: Any) -> dict[str, Any]:
    return epoch.run(**{"threads": (1,), "sides": OURS, "batch_size": 30, "data": data, "sizes": SIZES, **options})


def test_a_whole_epoch_counts_every_batch_and_is_judged(data: Dataset) -> None:
    result = quick(data, nets=("mlp",))
    rows = {row["side"]: row for row in result["rows"]}
    assert set(rows) == set(OURS)
    for row in rows.values():
        # 200 images in batches of 30: six full ones and a rest
        assert row["batches"] == 7
        assert not row["extrapolated"]
        assert row["seconds_per_epoch"] == pytest.approx(7 * row["mean_ms"] / 1e3)
        assert 0 < row["minimum_ms"] <= row["median_ms"] <= row["upper_quartile_ms"]
        assert 0 <= row["accuracy"] <= 1
    assert rows["toreq"]["settled"] == 1
    assert rows["toreq"]["free_steps"] >= 1
    assert rows["backprop"]["settled"] is None
    lines = {line["name"]: line for line in result["ratios"]}
    line = lines["mlp: toreq / backprop, 1 thread(s)"]
    expected = rows["toreq"]["seconds_per_epoch"] / rows["backprop"]["seconds_per_epoch"]
    assert line["value"] == pytest.approx(expected)
    assert line["target"] == 1.8
    assert line["holds"] == (line["value"] <= 1.8)
    gap = lines["mlp: points of accuracy below backprop after the epoch"]
    assert gap["value"] == pytest.approx(100 * (rows["backprop"]["accuracy"] - rows["toreq"]["accuracy"]))
    json.dumps(result)


@pytest.mark.parametrize("net", ["lateral", "conv"])
def test_every_net_runs(net: str, data: Dataset) -> None:
    result = quick(data, nets=(net,), sides=("toreq", "backprop"), batches=2)
    # two batches of seven are not an epoch
    assert [(r["side"], r["extrapolated"], r["accuracy"], r["batches"]) for r in result["rows"]] == [
        ("toreq", True, None, 2),
        ("backprop", True, None, 2),
    ]
    assert {line["name"] for line in result["ratios"]} == {f"{net}: toreq / backprop, 1 thread(s)"}


def test_every_thread_count_is_set_and_put_back(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(epoch, "_warm", lambda trainer, stream: seen.append(torch.get_num_threads()) or 0.0)
    result = quick(data, nets=("mlp",), threads=(1, 2), sides=("backprop",), batches=1)
    assert seen == [1, 2]
    assert [r["threads"] for r in result["rows"]] == [1, 2]
    assert torch.get_num_threads() == 1


def test_a_slow_side_runs_a_spread_sample_and_says_so(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Slow(nets.Trainer):
        def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
            seen.append(int(images.sum() * 1000))

        def predict(self, images: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(images), 4)

    build = nets.build

    def patched(net: str, side: str, *rest: Any) -> nets.Trainer:
        return Slow(torch.nn.Linear(1, 1), 1e-3) if side == "red-black" else build(net, side, *rest)

    monkeypatch.setattr(nets, "build", patched)
    monkeypatch.setattr(epoch, "_warm", lambda trainer, stream: 100.0 if isinstance(trainer, Slow) else 0.0)
    result = quick(data, nets=("mlp",), sampled=3)
    rows = {row["side"]: row for row in result["rows"]}
    assert rows["red-black"]["extrapolated"]
    assert rows["red-black"]["batches"] == 3
    assert rows["red-black"]["accuracy"] is None
    assert rows["toreq"]["batches"] == 7
    wanted = [int(x.sum() * 1000) for x, _ in Batches(*data.split("train"), 30, seed=0).epoch(0)]
    assert seen == [wanted[0], wanted[3], wanted[6]]


def test_unknown_names_are_refused_with_the_nearest(data: Dataset) -> None:
    with pytest.raises(ConfigError, match="did you mean 'mlp'"):
        quick(data, nets=("mpl",))
    with pytest.raises(ConfigError, match="did you mean 'backprop'"):
        quick(data, sides=("backprob",))
    with pytest.raises(ConfigError, match="at least 1"):
        quick(data, batches=0)
    with pytest.raises(ConfigError, match="did you mean 'red-black'"):
        nets.build("conv", "red-blak")
    with pytest.raises(ConfigError, match="expected one of mlp, conv"):
        accuracy.learn("lateral", "toreq", "unused", data=data)


def test_sides_of_a_net_have_the_same_shapes_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    shapes = {}
    for net in ("mlp", "conv"):
        for side in ("toreq", "backprop", "red-black"):
            trainer = nets.build(net, side, (1, 8, 8), 4, SIZES)
            shapes[net, side] = sorted(p.numel() for p in trainer.parameters())
        assert shapes[net, "toreq"] == shapes[net, "backprop"] == shapes[net, "red-black"]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("side", ["toreq", "red-black"])
def test_learning_resumes_as_if_unbroken(side: str, data: Dataset, tmp_path: Path) -> None:
    def learn(folder: str, most: int) -> dict[str, Any]:
        return accuracy.learn(
            "mlp", side, tmp_path / folder, most, data, SIZES, 30, lambda k: k % 3 == 0, report=lambda line: None
        )

    whole = learn("whole", 18)
    learn("parts", 9)
    parts = learn("parts", 18)
    assert whole["points"] == parts["points"]
    assert [p["batches"] for p in whole["points"]] == [3, 6, 9, 12, 15, 18]
    assert len({p["accuracy"] for p in whole["points"]}) > 1
    written = json.loads((tmp_path / "parts" / f"mlp-{side}.json").read_text())
    assert written == parts
    assert parts["complete"]
    weights = [torch.load(tmp_path / f / f"mlp-{side}.pt")["trainer"]["model"] for f in ("whole", "parts")]
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


def test_learning_stops_at_the_target_and_refuses_a_damaged_state(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.975, 0.99, 0.1])
    monkeypatch.setattr(accuracy, "accuracy", lambda trainer, data: next(scores))

    def learn() -> dict[str, Any]:
        return accuracy.learn("mlp", "backprop", tmp_path, 50, data, SIZES, 30, lambda k: k % 2 == 0, lambda line: None)

    curve = learn()
    assert [p["batches"] for p in curve["points"]] == [2, 4, 6]
    assert curve["reached"]
    assert learn() == curve
    (tmp_path / "mlp-backprop.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"learn: expected a state of this side in mlp-backprop\.pt"):
        learn()


def test_a_state_of_other_settings_is_refused(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy.learn("mlp", "red-black", tmp_path, 1, data, SIZES, 30, report=lambda line: None)
    monkeypatch.setitem(nets.STEPS["mlp"], "red-black", (3, 2))
    with pytest.raises(CheckpointError, match=r"3 free and 2 nudged steps.*got one of.*15 free and 15 nudged"):
        accuracy.learn("mlp", "red-black", tmp_path, 2, data, SIZES, 30, report=lambda line: None)


def write_curve(folder: Path, side: str, points: list[tuple[int, float]]) -> None:
    content = {"points": [{"batches": b, "accuracy": a} for b, a in points]}
    (folder / f"mlp-{side}.json").write_text(json.dumps(content))


def test_seconds_to_accuracy_combine_curves_with_seconds_per_batch(tmp_path: Path) -> None:
    write_curve(tmp_path, "toreq", [(60, 0.9), (120, 0.971), (180, 0.969), (240, 0.981)])
    write_curve(tmp_path, "backprop", [(60, 0.95), (120, 0.975)])
    write_curve(tmp_path, "autograd", [(60, 0.9), (120, 0.975), (600, 0.985)])
    write_curve(tmp_path, "red-black", [(60, 0.9), (500, 0.96)])
    seconds = {"toreq": 10.0, "backprop": 2.0, "autograd": 500.0, "red-black": 100.0}
    rows = [{"net": "mlp", "side": s, "threads": t, "mean_ms": 1e3 * v * t} for s, v in seconds.items() for t in (1, 2)]
    bench = tmp_path / "epoch.json"
    bench.write_text(json.dumps({"results": [{"bench": "overhead"}, {"bench": "epoch", "rows": rows}]}))
    result = accuracy.run(tmp_path, ("mlp",), bench, budget=40_000.0)
    found = {(row["side"], row["target"]): (row["seconds"], row["verdict"]) for row in result["rows"]}
    assert found["toreq", 0.97] == (1200.0, "reached")
    assert found["toreq", 0.98] == (2400.0, "reached")
    assert found["backprop", 0.97] == (240.0, "reached")
    assert found["backprop", 0.98] == (None, "curve ends before the budget")
    assert found["autograd", 0.97] == (None, "> budget")
    assert found["red-black", 0.97] == (None, "> budget")
    assert found["torchdeq", 0.98] == (None, "no curve")
    lines = {line["name"]: line["value"] for line in result["ratios"]}
    assert lines["mlp to 97.0%: backprop / toreq"] == pytest.approx(0.2)
    assert lines["mlp to 97.0%: autograd / toreq"] is None
    with pytest.raises(ConfigError, match=r"expected a result of `toreq bench epoch` in none\.json"):
        accuracy.run(tmp_path, ("mlp",), tmp_path / "none.json")


def test_bad_usage_of_the_command_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        accuracy.main(["learn", "mlp", "torchdec"])
    assert stopped.value.code == 2
    assert "did you mean 'torchdeq'" in capsys.readouterr().err
