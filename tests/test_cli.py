"""The command-line tool, end to end on a slice of MNIST: exit codes, files, messages, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from toreq import __version__, systems
from toreq.cli import main
from toreq.cli.parsing import expand_set, literal
from toreq.training import checkpoint

SMALL = [
    "--limit-train", "400", "--limit-test", "200", "--batch-size", "50", "--epochs", "1", "--device", "cpu",
    "--deterministic", "--lr", "0.01", "--set", "hidden=24",
]  # fmt: skip


def _train(out: Path, *extra: str) -> int:
    return main(["train", "toreqprop", *SMALL, "--out", str(out), *extra])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert _train(out) == 0
    return out


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that an error is told in."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("toreq: ")
    return lines[0]


# -- help, version, listing


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"toreq {__version__}\n"


@pytest.mark.parametrize("command", ["systems", "train", "eval", "show", "sample", "check", "doctor", "demo"])
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main(["--help"]) == 0
    assert command in capsys.readouterr().out
    assert main([command, "--help"]) == 0
    assert f"toreq {command}" in capsys.readouterr().out


def test_train_has_the_options_it_promises(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("data", "epochs", "seed", "limit-train", "limit-test", "batch-size", "lr", "out", "device"):
        assert f"--{option}" in text
    for option in ("precision", "side", "set", "resume", "deterministic", "overwrite"):
        assert f"--{option}" in text


def test_systems_lists_options_and_estimators(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["systems"]) == 0
    text = capsys.readouterr().out
    for name in systems.names():
        assert name in text
        for arch in systems.architectures(name):
            assert arch in text
            assert all(f"{option}=" in text for option in systems.options(name, arch) if option != "arch")
    assert "centered" in text
    assert "implicit" in text


# -- bad usage


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["train", "toreqprob"], "did you mean 'toreqprop'"),
        (["train", "toreqprop", "--data", "mnits"], "did you mean 'mnist'"),
        (["train", "toreqprop", "--set", "hiden=24"], "did you mean 'hidden'"),
        (["train", "toreqprop", "--set", "arch=cnov"], "did you mean 'conv'"),
        (["train", "toreqprop", "--set", "hidden"], "expected key=value"),
        (["train", "toreqprop", "--set", "hidden=24", "hidden=32"], "twice"),
        (["train", "toreqprop", "--limit-train", "50", "--set", "solver.tolerence=1e-3"], "did you mean 'tolerance'"),
        (["train", "toreqprop", "--limit-train", "50", "--set", "estimator=centred"], "did you mean 'centered'"),
        (["train", "toreqprop", "--side", "bp"], "bp-eq"),
        (["train", "toreqprop", "--epochs", "0"], "epochs"),
        (["train", "toreqprop", "--lr", "-1"], "learning_rate"),
        (["train", "toreqprop", "--device", "gpu"], "device"),
        (["train"], "expected a SYSTEM"),
        (["train", "toreqprop", "--resume", "somewhere"], "SYSTEM"),
        (["train", "--resume", "somewhere", "--lr", "0.1"], "--lr"),
        (["check", "toreqprob"], "toreqprop"),
    ],
)
def test_bad_usage_is_code_2_and_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert reason in _error(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "subcommand"),
        (["trian", "toreqprop"], "train"),
        (["train", "toreqprop", "--epoch", "3"], "--epochs"),
        (["train", "toreqprop", "--epochs", "three"], "three"),
        (["eval"], "RUN"),
    ],
)
def test_arguments_that_do_not_parse_are_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert reason in captured.err + captured.out


@pytest.mark.parametrize(
    "arguments", [["eval", "nowhere"], ["show", "nowhere"], ["doctor", "nowhere"], ["train", "--resume", "nowhere"]]
)
def test_a_missing_run_is_code_1(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 1
    assert "nowhere" in _error(capsys)


def test_a_file_in_the_way_is_code_1_and_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("precious")
    assert _train(tmp_path / "file") == 1
    assert _error(capsys) == f"toreq: out: expected a folder, got the file {tmp_path / 'file'}; choose another --out"
    assert (tmp_path / "file").read_text() == "precious"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from toreq.errors import CheckpointError

    with pytest.raises(CheckpointError):
        main(["eval", "nowhere", "--debug"])
    monkeypatch.setenv("TOREQ_DEBUG", "1")
    with pytest.raises(CheckpointError):
        main(["eval", "nowhere"])


def test_set_takes_several_assignments_and_leaves_the_rest_alone() -> None:
    assert expand_set(["train", "--set", "a=1", "b.c=(2, 3)", "toreqprop", "--out", "x=y"]) == [
        "train", "--set", "a=1", "--set", "b.c=(2, 3)", "toreqprop", "--out", "x=y"
    ]  # fmt: skip
    assert expand_set(["--set", "a=1", "--set", "b=2", "x"]) == ["--set", "a=1", "--set", "b=2", "x"]
    assert [literal(text) for text in ("3", "1e-3", "(4, 5)", "true", "None", "conv")] == [
        3,
        1e-3,
        (4, 5),
        True,
        None,
        "conv",
    ]


# -- the way through


def test_train_tells_what_it_did(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(tmp_path / "again", "--seed", "0") == 0
    text = " ".join(capsys.readouterr().out.split())
    summary = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert f"test accuracy {summary['test_accuracy']:.2%}" in text
    assert "epoch 1/1" in text
    assert summary["command"].startswith("toreq train toreqprop --limit-train 400")
    assert summary["options"] == {"hidden": [24]}
    assert summary["test_accuracy"] == json.loads((run / "summary.json").read_text())["test_accuracy"]


def test_eval_gives_the_accuracy_of_training(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--json", str(tmp_path / "clean.json")]) == 0
    clean = json.loads((tmp_path / "clean.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert clean["accuracy"] == summary["test_accuracy"]
    assert clean["confusion"] == summary["confusion"]
    assert f"{clean['accuracy']:.2%}" in capsys.readouterr().out
    noisy = ["eval", str(run), "--corrupt", "gaussian_noise", "--severity", "5", "--json", str(tmp_path / "noisy.json")]
    for _ in range(2):
        assert main(noisy) == 0
        found = json.loads((tmp_path / "noisy.json").read_text())
        assert found["accuracy"] < clean["accuracy"]
    assert main(["eval", str(run), "--limit-test", "50", "--json", str(tmp_path / "few.json")]) == 0
    assert json.loads((tmp_path / "few.json").read_text())["examples"] == 50


def test_eval_on_data_that_do_not_fit_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from toreq import data

    blobs = data.blob_dataset(num_classes=3)
    monkeypatch.setattr(data, "load", lambda name: blobs)
    assert main(["eval", str(run), "--data", "blobs"]) == 2
    assert "10 classes" in _error(capsys)
    monkeypatch.undo()
    assert main(["eval", str(run), "--corrupt", "gausian_noise"]) == 2
    assert "gaussian_noise" in _error(capsys)


def test_check_writes_what_it_promises(tmp_path: Path) -> None:
    assert main(["check", "toreqprop", "--json", str(tmp_path / "check.json")]) == 0
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["system"] == "toreqprop"
    assert {"estimator", "parameter", "cosine", "relative_error"} <= set(found["gradients"][0])
    assert {"steps", "peak_mb"} <= set(found["memory"][0])
    assert 0 < found["radius"] < 1


def test_show_and_doctor_read_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(run), "--out", str(tmp_path / "plots")]) == 0
    assert list((tmp_path / "plots").iterdir())
    assert main(["doctor", str(run)]) in (0, 1)
    assert capsys.readouterr().out.strip()


def test_the_demo_reports_a_row_for_each_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from toreq.training import recipes
    from toreq.training.recipes import DemoRow

    rows = (DemoRow("toreqprop", "toreqprop mlp", {"hidden": (24,)}, epochs=1, train={"batch_size": 50}),)
    monkeypatch.setattr(recipes, "demo_rows", lambda: rows)
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--limit-train", "400", "--limit-test", "100"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert [(row["label"], row["side"]) for row in results["rows"]] == [
        ("toreqprop mlp", "eqprop"),
        ("toreqprop mlp", "bp-ff"),
    ]
    assert (out / "report.html").read_text().startswith("<!")
    text = capsys.readouterr().out
    assert "report.html" in text.replace("\n", "")
    assert main(["demo", "--out", str(out)]) == 1
    assert "choose another --out" in _error(capsys)


# -- processes of their own


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "toreq.cli", *arguments]


def _environment() -> dict[str, str]:
    source = str(Path(__file__).parents[1] / "src")
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "TERM": "dumb"}


def _stopped_by(number: signal.Signals, out: Path, *arguments: str) -> str:
    """Train in a process of its own, send it `number` after 50 steps, and return what it says at the end."""
    process = subprocess.Popen(
        _command("train", "toreqprop", *arguments, "--out", str(out)),
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    return errors.strip().splitlines()[-1]


LONG = [
    "--limit-train", "1600", "--limit-test", "100", "--batch-size", "20", "--epochs", "2", "--device", "cpu",
    "--deterministic", "--set", "hidden=16",
]  # fmt: skip


@pytest.mark.cli
def test_ctrl_c_saves_and_the_command_it_names_goes_on_exactly(tmp_path: Path) -> None:
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    message = _stopped_by(signal.SIGINT, broken, *LONG)
    assert message.startswith("toreq: stopped at step ")
    command = f"toreq train --resume {broken}"
    assert message.endswith(command)
    assert not (broken / "summary.json").exists()
    _, state = checkpoint.load(broken / "checkpoint")
    assert 50 <= state["step"] < 160

    assert main(command.split()[1:]) == 0
    assert main(["train", "toreqprop", *LONG, "--out", str(unbroken)]) == 0
    found, expected = (checkpoint.load(path / "checkpoint")[0] for path in (broken, unbroken))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    one, other = (json.loads((path / "summary.json").read_text()) for path in (broken, unbroken))
    for name in ("test_accuracy", "test_loss", "train_loss", "free_steps_mean", "asym_mean", "radius", "confusion"):
        assert one[name] == other[name]


@pytest.mark.cli
def test_sigterm_saves_too(tmp_path: Path) -> None:
    message = _stopped_by(signal.SIGTERM, tmp_path / "run", *LONG)
    assert message.endswith(f"toreq train --resume {tmp_path / 'run'}")
    _, state = checkpoint.load(tmp_path / "run" / "checkpoint")
    assert 50 <= state["step"] < 160


@pytest.mark.ddp
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    arguments = ["train", "toreqprop", *SMALL]
    done = subprocess.run(
        _command(*arguments, "--devices", "2", "--out", str(tmp_path / "two")),
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    two, one = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("two", "one"))
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-3)
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-3)
    assert sum(map(sum, two["confusion"])) == two["test_examples"] == 200
    found, expected = (checkpoint.load(tmp_path / name / "checkpoint")[0] for name in ("two", "one"))
    for name, tensor in expected.items():
        if name.startswith("model/"):
            assert torch.allclose(found[name], tensor, atol=2e-3), name


def test_an_option_that_is_text_is_read_as_text() -> None:
    from toreq.cli.parsing import parse_set

    options = {"attention": "softmax", "selective": True, "gain": None, "hidden": (4,)}
    found = parse_set(["attention=none", "selective=false", "gain=none", "hidden=3"], lambda _: options)
    assert found == {"attention": "none", "selective": False, "gain": None, "hidden": (3,)}
