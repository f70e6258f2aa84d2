"""``secateur eval``: the numbers of the library, on standard output."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_models import save_model, write_data

from secateur.cli import main
from secateur.load.model import load_model, quiet_transformers
from secateur.measure.quality import Reference, compare, perplexity


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("eval")
    save_model(base / "dense", num_hidden_layers=1)
    save_model(base / "small", intermediate_size=64, seed=1, num_hidden_layers=1)
    save_model(base / "words", vocab_size=272)
    write_data(base / "data")
    return base


def values(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["eval", *map(str, words), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(out, parse_constant=pytest.fail)
    return found


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["eval", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_perplexity_is_that_of_the_library(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = values(capsys, work / "small", "--data", work / "data/ids.npy", "--samples", 3)
    ids = torch.from_numpy(np.load(work / "data/ids.npy"))[:3]
    model = load_model(work / "small")[0]
    assert found == {
        "model": str(work / "small"),
        "data": str(work / "data/ids.npy"),
        "rows": 3,
        "perplexity": pytest.approx(perplexity(model, [ids])),
    }


def test_against_the_dense_model(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = values(capsys, work / "small", "--against", work / "dense", "--data", work / "data/ids.npy")
    ids = torch.from_numpy(np.load(work / "data/ids.npy"))
    small, dense = (load_model(work / name)[0] for name in ("small", "dense"))
    real = compare(small, Reference(dense, [ids]))
    assert found["rows"] == 4
    assert found["tokens"] == real.tokens == 60
    assert found["kl"] == pytest.approx(real.kl, rel=1e-5)
    assert found["kl"] > 0
    assert found["top1"] == pytest.approx(real.top1)
    assert (found["perplexity"], found["dense_perplexity"]) == pytest.approx((real.perplexity, real.dense_perplexity))
    same = values(capsys, work / "dense", "--against", work / "dense", "--data", work / "data/ids.npy")
    assert (same["kl"], same["top1"]) == (pytest.approx(0, abs=1e-6), 1.0)


def test_text_and_a_table(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", work / "data/text.txt", "--seq-len", 32, "--against", work / "dense"]
    assert main(["eval", *map(str, [work / "small", *words])]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in ("perplexity of the dense model", "KL to the dense model", "top-1 agreement"):
        assert word in out


def test_an_infinite_perplexity_is_still_json(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = load_model(work / "dense")[0]
    with torch.no_grad():
        model.model.norm.weight.mul_(1e6)
    with quiet_transformers():
        model.save_pretrained(tmp_path / "sure")
    found = values(capsys, tmp_path / "sure", "--data", work / "data/ids.npy")
    assert found["perplexity"] in ("inf", None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["small", "--data", "self"], "would measure a model on its own words"),
        (["small", "--data", "data/idz.npy"], "idz.npy: no such file or folder; did you mean 'ids.npy'?"),
        (["none", "--data", "data/ids.npy"], "none: no such model folder"),
        (["small", "--against", "words", "--data", "data/ids.npy"], "they cannot be compared"),
        (["small", "--data", "data/ids.npy", "--batch-size", "0"], "batch_size must be at least 1, not 0"),
        (["small", "--data", "data/ids.npy", "--samples", "0"], "samples must be at least 1, not 0"),
        (["small", "--data", "data/ids.npy", "--seq-len", "0"], "seq_len must be at least 1, not 0"),
        (["small", "--data", "data/ids.npy", "--seq-len", "999"], "seq_len 999 is longer than the 256 positions"),
        (["small", "--data", "data/ids.npy", "--dtype", "float31"], "'float31' is unknown; did you mean 'float32'"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_is_one_line(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(work)
    assert message in refused(capsys, *words)
