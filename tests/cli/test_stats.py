"""``secateur stats``: the library's numbers, as a table and as JSON."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_models import save_model

from secateur.cli import main
from secateur.load.model import load_model, quiet_transformers
from secateur.measure.sparsity import statistics

NET = '''
"""Networks of a user."""

import torch
from torch import nn


def net(width=6):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * width, 5))
    with torch.no_grad():
        model[0].weight[:, 1:3] = 0
    return model


def many():
    return nn.Sequential(*[nn.Linear(2, 2) for _ in range(75)])


def example():
    return torch.zeros(3, 4, 4, 4)
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_zeros.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("own_zeros", None)


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["stats", *map(str, words)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def values(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shown(capsys, *words, "--json"), parse_constant=pytest.fail)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model on disk, half of one weight zero."""
    path = save_model(tmp_path_factory.mktemp("stats") / "model", num_hidden_layers=1)
    model: Any = load_model(path)[0]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    with quiet_transformers():
        model.save_pretrained(path)
    return path


def test_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = values(capsys, folder, "--pattern", "2:4", "1:4", "--gzip")
    real = statistics(load_model(folder)[0], patterns=[(2, 4), (1, 4)], gzip=True)
    assert found == {"model": str(folder), "class": "LlamaForCausalLM", **real.to_json()}
    up = next(w for w in found["weights"] if w["name"].endswith("up_proj.weight"))
    assert (up["sparsity"], up["patterns"]["2:4"]["all"], up["patterns"]["1:4"]["share"]) == (0.5, True, 0.0)
    assert up["macs_skipped"] == up["macs"] / 2 > 0


def test_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, folder, "--gzip")
    up = next(line for line in out.splitlines() if "up_proj" in line)
    assert up.split()[1:4] == ["80x48", "50.0%", "all"]
    for words in (
        "of the maskable weights are zero",
        "maskable weights",
        "all parameters",
        "zlib level 6",
        "an embedding",
    ):
        assert words in out
    assert "nothing faster" in out
    assert max(map(len, out.splitlines())) <= 120


def test_a_callable_with_inputs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = values(capsys, "own_zeros:net", "--model-args", '{"width": 8}', "--input-shape", "3,4,4,4")
    first = found["weights"][0]
    assert (first["shape"], first["sparsity"], first["macs"]) == ([8, 4, 3, 3], 0.5, 4 * 8 * 36)
    assert (first["macs_skipped"], first["patterns"]) == (4 * 8 * 18, {"2:4": {"share": 1.0, "all": True}})
    assert found["weights"][1]["name"] == "3.weight"
    del place


def test_inputs_from_a_function(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert values(capsys, "own_zeros:net", "--inputs", "own_zeros:example")["weights"][0]["macs"] == 4 * 6 * 36
    del place


def test_without_inputs_there_are_no_macs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = values(capsys, "own_zeros:net", "--only", "0")
    assert (found["weights"][0]["macs"], len(found["weights"])) == (None, 1)
    assert found["no_macs"]
    out = shown(capsys, "own_zeros:net", "--ignore", "0")
    assert "no MACs" in out
    assert "--input-shape" in out
    assert "listed weights" in out
    assert "not listed: 1 tensor: ignored" in out
    del place


def test_a_long_table_is_cut_and_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "own_zeros:many")
    assert "59.weight" in out
    assert "60.weight" not in out
    assert "... and 15 more: --json lists all" in out
    assert len(values(capsys, "own_zeros:many")["weights"]) == 75
    del place


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["own_zeros:net", "--pattern", "2-4"], "--pattern '2-4' is no N:M pattern, such as 2:4"),
        (["own_zeros:net", "--pattern", "4:2"], "the pattern 4:2 is none"),
        (["own_zeros:net", "--only", "7"], "the pattern '7' matches no weight"),
        (["own_zeros:net", "--input-shape", "3,9,4,4"], "Sequential does not run on these inputs"),
        (["own_zeros:net", "--inputs", "own_zeros:example", "--input-shape", "1,2"], "not both"),
        (["nowhere"], "nowhere: no such model folder"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_is_one_line(place: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["stats", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    del place
