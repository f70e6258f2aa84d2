"""``secateur distill``: from two folders to a third, and what is refused before anything is trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_models import save_model, write_data
from tokenizers import Tokenizer as RawTokenizer

import secateur
from secateur.cli import main
from secateur.load.model import load_model
from secateur.train.loop import fit


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("distill")
    save_model(base / "dense", num_hidden_layers=1)
    save_model(base / "small", intermediate_size=32, seed=1, num_hidden_layers=1)
    save_model(base / "words", vocab_size=272)
    save_model(base / "other", num_hidden_layers=1)
    text = (base / "other" / "tokenizer.json").read_text()
    raw = json.loads(text)
    vocabulary = raw["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    RawTokenizer.from_str(json.dumps(raw)).save(str(base / "other" / "tokenizer.json"))
    write_data(base / "data")
    np.save(base / "data" / "train.npy", np.random.default_rng(0).integers(3, 200, (16, 16)))
    return base


def words(work: Path, out: Path, **other: object) -> list[object]:
    said: dict[str, object] = {"teacher": work / "dense", "student": work / "small", "out": out, "steps": 4}
    said |= {"data": work / "data" / "train.npy", "eval-data": work / "data" / "ids.npy", "batch-size": 4, **other}
    return ["distill", *(word for name, value in said.items() if value is not None for word in (f"--{name}", value))]


def test_the_student_comes_closer_and_is_saved_whole(work: Path, say: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "healed"
    found: dict[str, Any] = json.loads(say(*words(work, out, lr=1e-3, steps=20), "--json"))
    told = found["distillation"]
    assert told["after"]["kl"] < 0.9 * told["before"]["kl"]
    assert set(found["measured"]) == {"perplexity", "kl", "data"}
    healed, _, _ = load_model(out)
    before, _, _ = load_model(work / "small")
    assert {n: p.shape for n, p in healed.state_dict().items()} == {n: p.shape for n, p in before.state_dict().items()}
    rows = torch.from_numpy(np.load(work / "data" / "ids.npy"))
    measured = secateur.evaluate(healed, rows)["perplexity"]
    assert measured == pytest.approx(told["after"]["perplexity"], rel=1e-5)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == told["history"]
    assert list(out.glob("events.out.tfevents.*"))
    assert not (tmp_path / "healed.training").exists()
    assert "distilled with Secateur" in (out / "README.md").read_text()
    assert (work / "small" / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()


def test_a_cache_stands_in_for_the_teacher(work: Path, say: Callable[..., str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = json.loads(say(*words(work, tmp_path / "a", cache=cache), "--json"))
    second = json.loads(say(*words(work, tmp_path / "b", cache=cache, teacher=None), "--json"))
    assert first["distillation"]["after"] == second["distillation"]["after"]
    assert first["distillation"]["lr"] == second["distillation"]["lr"]


def test_a_run_that_was_cut_off_goes_on(
    work: Path,
    say: Callable[..., str],
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "healed"

    def interrupted(*given: Any) -> Any:
        fit(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.methods.healing.fit", interrupted)
    assert main([str(w) for w in words(work, out)]) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.undo()
    other = refused(*words(work, out, lr=0.5))
    assert "lr" in other
    assert "healed.training" in other
    assert "went on from step 4" in say(*words(work, out))
    assert "went on" not in say(*words(work, tmp_path / "anew"), "--restart")


def test_mixed_sources_take_weights(work: Path, say: Callable[..., str], tmp_path: Path) -> None:
    a, b = work / "data" / "train.npy", work / "data" / "ids.npy"
    given = words(work, tmp_path / "m")
    at = given.index("--data") + 1
    given[at : at + 1] = [f"{a}=0.7", f"{b}=0.3"]
    assert json.loads(say(*given, "--json"))["data"]["training"] == [f"{a}=0.7", f"{b}=0.3"]


def test_a_diverging_run_says_so_and_keeps_the_best(
    work: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "d"
    assert main([str(w) for w in words(work, out, lr=1e30, optimizer="sgd", clip=0, warmup=0)]) == 2
    err = capsys.readouterr().err
    assert "diverged" in err
    assert "smaller lr" in err
    healed, _, _ = load_model(out)
    assert all(bool(p.isfinite().all()) for p in healed.parameters())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"teacher": "words"}, "vocabulary"),
        ({"teacher": "other"}, "tokenizers"),
        ({"teacher": None}, "--cache"),
        ({"data": "data/train.np"}, "train.npy"),
        ({"lr": -1}, "lr"),
        ({"epochs": 1}, "steps and epochs"),
        ({"kl": 0}, "nothing to learn"),
        ({"eval-data": "self"}, "held-out"),
        ({"layers": "a b"}, "layers"),
        ({"student": "smal"}, "smal"),
    ],
)
def test_bad_input_is_one_line(
    work: Path, refused: Callable[..., str], tmp_path: Path, other: dict[str, object], said: str
) -> None:
    given = {
        name: work / str(value) if name in ("teacher", "data", "student") and value is not None else value
        for name, value in other.items()
    }
    given = {name: str(value).split() if name == "layers" else value for name, value in given.items()}
    flat = [x for w in words(work, tmp_path / "x", **given) for x in (w if isinstance(w, list) else [w])]
    assert said in refused(*flat)
    assert not (tmp_path / "x").exists()
