"""``secateur profile``: a table of times, and a file of it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_models import save_model

from secateur.cli import main
from secateur.measure.latency import LatencyTable

NET = '''
"""Networks of a user."""

import torch
from torch import nn


def net(width=16):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
    return nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(4 * width, 5))


def example():
    return torch.zeros(2, 3, 4, 4)
'''
QUICK = ("--levels", "2", "--repeats", "1")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_times.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("own_times", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("profile") / "model")


def test_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t.json"
    words = [str(folder), "--out", str(out), "--batch", "2", "--seq-len", "9", *QUICK, "--threads", "1", "--json"]
    before = torch.get_num_threads()
    assert main(["profile", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    table = LatencyTable.load(out)
    assert torch.get_num_threads() == before
    assert (table.dtype, table.threads, table.clock) == ("float32", 1, "wall")
    assert found["entries"] == len(table.entries)
    assert found["dense"]["median"] > 0
    down = next(p for p in found["parts"] if p["first"].endswith("down_proj"))
    assert (down["part"], down["shape"], down["count"]) == ("Linear", "48x80", 2)
    assert down["axes"] == ["hidden", "model.layers.0.mlp.ffn"]
    assert any("weight=24x40:float32" in key and "2x9x40:float32" in key for key in table.entries)
    existing = [*words[:2], str(tmp_path / "more.json"), *words[3:], "--existing", str(out)]
    assert main(["profile", *existing]) == 0
    assert LatencyTable.load(tmp_path / "more.json") == table  # nothing was timed again


def test_a_callable_as_a_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["own_times:net", "--inputs", "own_times:example", "--out", "t.json", *QUICK]
    assert main(["profile", *words, "--cpu-time", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.split()[1] for line in out.splitlines() if line.split()[:1] == ["Conv2d"]] == ["16x3x3x3"]
    for text in ("one forward pass of Sequential", "all else", "times written to t.json", "1 thread"):
        assert text in out
    assert max(map(len, out.splitlines())) <= 120
    assert LatencyTable.load("t.json").clock == "process"
    assert main(["profile", *words]) == 2
    assert "t.json: exists already" in capsys.readouterr().err
    assert main(["profile", *words, "--overwrite", "--threads", "1"]) == 0
    assert LatencyTable.load(place / "t.json").clock == "wall"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["own_times:net"], "give example inputs, --input-shape"),
        (["own_times:net", "--input-shape", "2,3,4,4", "--batch", "2"], "--batch does not go with --input-shape"),
        (["own_times:net", "--input-shape", "2,3,4,4", "--levels", "0"], "--levels must be at least 1, not 0"),
        (["own_times:net", "--input-shape", "2,3,4,4", "--threads", "2", "--cpu-time"], "2 threads"),
        (["own_times:net", "--input-shape", "2,3,4,4", "--device", "cuda", "--threads", "1"], "goes with --device cpu"),
        (["own_times:net", "--existing", "no.json"], "no.json: is no readable latency table"),
        (["{folder}", "--seq-len", "999"], "longer than the 256 positions"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_is_one_line(
    place: Path, folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["profile", *(w.format(folder=folder) for w in words), "--out", "t.json"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not (place / "t.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["profile", "own_times:net", "--input-shape", "2,3,4,4", "--device", "cuda", "--out", str(place / "t.json")]
    assert main(words) == 2
    assert "device 'cuda' is not available here" in capsys.readouterr().err
