"""Exit codes: 0, 2 for your input, 1 for our fault, 130 for Ctrl-C; and one real process for each verb."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_models import save_model, write_data

from secateur import cli
from secateur.cli import inspect
from secateur.errors import SecateurError


def replace_verb(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(_: Sequence[str]) -> None:
        raise error

    monkeypatch.setattr(inspect, "run", fail)


@pytest.fixture(autouse=True)
def _path_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_our_fault(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    replace_verb(monkeypatch, RuntimeError("it [bold]broke[/bold]"))
    assert cli.main(["inspect"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("secateur failed: RuntimeError: it [bold]broke[/bold]\n")
    assert "our fault" in err
    assert "Traceback (most recent call last)" in err
    assert "in fail" in err


def test_your_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"[red]x[/red] :smile: is wrong; {'a long line ' * 30}"
    replace_verb(monkeypatch, SecateurError(text))
    assert cli.main(["inspect"]) == 2
    assert capsys.readouterr() == ("", f"error: {text}\n")


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    replace_verb(monkeypatch, KeyboardInterrupt())
    assert cli.main(["inspect"]) == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("", "stopped; nothing was written\n")


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prun"]) == 2
    assert capsys.readouterr() == ("", "error: there is no command 'prun'; did you mean 'prune'?\n")


def test_an_unknown_option_is_your_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prune", "model", "--out", "x", "--bugdet", "params=70%"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "--bugdet" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_names_every_verb(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb}" in out for verb in ("inspect", "prune", "eval"))


@pytest.mark.parametrize("verb", ["inspect", "prune", "eval"])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: secateur {verb}" in out
    assert ("--max-width-cut" in out) is (verb == "prune")


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prune", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("the largest share of layers that may go", "folder that keeps scores", "Held-out data", "Seed of"):
        assert words in text


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.1.0"


# Real processes


def secateur(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    code = "import sys; from secateur.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


def test_real_processes(tmp_path: Path) -> None:
    save_model(tmp_path / "dense", num_hidden_layers=1)
    write_data(tmp_path / "data")
    for words in (
        ["inspect", "dense", "--json"],
        ["prune", "dense", "--out", "out", "--dims", '{"ffn": 40}', "--data", "data/ids.npy", "--json"],
        ["eval", "out", "--against", "dense", "--data", "data/ids.npy", "--json"],
    ):
        done = secateur(tmp_path, *words)
        assert done.returncode == 0, done.stderr
        assert isinstance(json.loads(done.stdout), dict)
        assert done.stderr == "", words
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "dense", "out"]


def test_options_that_only_python_can_give_are_no_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prune", "--method", "fastnas", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--levels" in shown
    assert "--clock" not in shown
