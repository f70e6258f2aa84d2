"""``secateur sensitivity``: the file, the tables, the picture, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny, tokens

from secateur.cli import main
from secateur.measure.harm import Harm
from secateur.methods.scan_result import Sensitivity

Say = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and token rows."""
    path = tmp_path_factory.mktemp("model")
    tiny("llama", dtype=torch.float32).save_pretrained(path / "llama")
    np.save(path / "ids.npy", tokens(6, 12).numpy().astype(np.uint16))
    return path


def test_the_file_is_what_prune_allocates_by(folder: Path, tmp_path: Path, say: Say) -> None:
    out, picture = tmp_path / "s.json", tmp_path / "s.svg"
    words = ["--data", folder / "ids.npy", "--samples", 4, "--ratios", 0.3, 0.6]
    text = say("sensitivity", folder / "llama", *words, "--out", out, "--plot", picture)
    found = Sensitivity.load(out)
    assert (found.samples, found.ratios, found.measure) == (4, (0.3, 0.6), "kl")
    assert found.model == str(folder / "llama")
    assert found.data == str(folder / "ids.npy")
    name, losses = found.worst()[0]
    assert next(line for line in text.splitlines() if name in line).split()[1:] == [f"{x:.4f}" for x in losses.values()]
    assert "30% gone" in text
    assert "the worst 12 of 14" in text
    assert f"{found.cost['passes']:.1f} passes of the data instead of {found.cost['naive']:.0f}" in text
    assert f"--allocation {out}" in text
    assert picture.read_text().startswith("<?xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.json", "s.svg"]
    words = ["--method", "magnitude", "--budget", "sparsity=50%", "--allocation", out, "--out", tmp_path / "pruned"]
    say("prune", folder / "llama", *words)
    report = json.loads((tmp_path / "pruned" / "report.json").read_text())
    assert len(set(report["masking"]["shares"].values())) > 1


def test_json_is_the_file(folder: Path, tmp_path: Path, say: Say) -> None:
    out = tmp_path / "s.json"
    words = ["--data", folder / "ids.npy", "--samples", 2, "--what", "blocks", "--measure", "loss", "--json"]
    told = json.loads(say("sensitivity", folder / "llama", *words, "--out", out))
    assert told.pop("out") == str(out)
    assert told == json.loads(out.read_text())
    assert set(told["blocks"]) == {f"model.layers.{i}{part}" for i in (0, 1) for part in ("", ".mlp", ".self_attn")}
    assert (told["losses"], told["axes"], told["measure"]) == ({}, {}, "loss")


def test_a_command_that_was_stopped_says_what_it_kept(
    folder: Path, tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.json"
    words = ["sensitivity", folder / "llama", "--data", folder / "ids.npy", "--samples", 2, "--out", out]
    words += ["--what", "weights", "--ratios", 0.5]
    values, left = Harm.values, 6

    def stopped(self: Harm, *args: Any) -> dict[str, float]:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return values(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Harm, "values", stopped)
        assert main([str(word) for word in words]) == 130
    kept = len((tmp_path / "s.json.partial").read_text().splitlines()) - 1
    assert kept > 0
    error = capsys.readouterr().err
    assert f"stopped; {kept} measurements are kept in {out}.partial; the same command goes on from there" in error
    assert not out.exists()
    assert f"14 measurements on 2 samples, {kept} of them by the run before" in say(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


def test_a_classifier_of_the_users_own(tmp_path: Path, say: Say) -> None:
    out = tmp_path / "s.json"
    words = ["--data", "small_nets:pairs", "--ratios", 0.5, "--measure", "accuracy", "--out", out]
    text = say("sensitivity", "small_nets:Residual", *words)
    assert "accuracy lost" in text
    assert set(Sensitivity.load(out).also) == {"kl", "loss"}


def test_refusals(folder: Path, tmp_path: Path, refused: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, out = folder / "llama", folder / "ids.npy", tmp_path / "s.json"
    assert "ratios: 1.5 is not between" in refused("sensitivity", model, "--data", ids, "--out", out, "--ratios", 1.5)
    words = ["sensitivity", model, "--data", ids, "--out"]
    assert "is for classifiers" in refused(*words, out, "--measure", "accuracy")
    assert "only: 'fnn' matches no" in refused(*words, out, "--only", "fnn")
    assert "the result is a .json file" in refused(*words, tmp_path / "s")
    assert "a plot is a .png or .svg" in refused(*words, out, "--plot", tmp_path / "s.pdf")
    assert "no-such.npy" in refused("sensitivity", model, "--data", tmp_path / "no-such.npy", "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda _: None)
        assert "pip install 'secateur[report]'" in refused(*words, out, "--plot", tmp_path / "s.png")
    out.write_text("{}")
    assert "exists already" in refused(*words, out)
    assert "is no sensitivity file" in refused(*words, out, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]
