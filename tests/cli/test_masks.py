"""The command line on masks: prune, apply and what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_models import save_model, write_data

import secateur
from secateur.cli import main

NET = '''
"""A user's own network."""

import torch
from torch import nn


class Masked(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        yield torch.randn(4, 4, 6, 6, generator=generator), torch.randint(4, (4,), generator=generator)
'''
STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
weight = model.model.layers[0].mlp.down_proj.weight
groups = (weight.reshape(-1, 4) != 0).sum(1)
print(int(groups.max()), model(torch.arange(3, 9)[None]).logits.isfinite().all().item(), "secateur" in sys.modules)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a language model, data and a network of one's own."""
    save_model(tmp_path / "llm")
    write_data(tmp_path)
    (tmp_path / "own_masked.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("own_masked", None)
    return tmp_path


def zeros(model: Any, masks: Any) -> int:
    return sum(int((model.get_parameter(n) == 0).sum()) for n in masks)


def test_a_language_model_in_2_4_loads_in_stock_transformers(place: Path, say: Callable[..., str]) -> None:
    words = ("--method", "sparsegpt", "--budget", "n:m=2:4", "--data", "ids.npy", "--eval-data", "text.txt")
    report = json.loads(say("prune", "llm", *words, "--out", "sparse", "--seq-len", 16, "--json"))
    masked = report["sparsity"]["masked"]
    assert masked["zeros"] * 2 == masked["elements"]
    assert report["masking"]["n:m"] == "2:4"
    assert report["measured"]["kl"] > 0
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", STOCK, "sparse"], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", "True", "False"], done.stderr
    assert "sparsegpt" in (place / "sparse" / "README.md").read_text()


def test_people_get_a_table_and_the_truth_about_speed(place: Path, say: Callable[..., str]) -> None:
    text = say("prune", "llm", "--method", "magnitude", "--budget", "sparsity=50%", "--out", "sparse")
    assert "weights that stay, in 14 masked tensors" in text
    assert "50.0%" in text
    assert "not the model faster" in text


def test_a_cnn_with_batch_norms_adapted_and_loaded_again(place: Path, say: Callable[..., str]) -> None:
    words = ("--method", "wanda", "--budget", "sparsity=50%", "--data", "own_masked:batches", "--adapt-batch-norm")
    report = json.loads(
        say("prune", "own_masked:Masked", *words, "--eval-data", "own_masked:batches", "--out", "cnn", "--json")
    )
    assert report["batch_norms_adapted"] == 1
    assert report["measured"]["samples"] == 12
    model: Any = secateur.load("cnn")
    assert zeros(model, report["sparsity"]["tensors"]) == (8 * 36 + 512) // 2
    assert int(model[1].num_batches_tracked) == 3


def test_a_plan_is_applied_to_other_weights_and_thinned_out_otherwise(place: Path, say: Callable[..., str]) -> None:
    words = ("--method", "wanda", "--budget", "sparsity=75%", "--data", "ids.npy", "--seq-len", 16, "--keep-scores")
    say("prune", "llm", *words, "--out", "sparse")
    save_model(place / "trained", seed=4)
    report = json.loads(say("apply", "trained", "--plan", "sparse", "--out", "again", "--json"))
    plan = secateur.Plan.load(place / "sparse")
    again: Any = secateur.load("again")
    dense: Any = secateur.load("trained")
    for name, mask in plan.masks.items():
        assert torch.equal(again.get_parameter(name), dense.get_parameter(name) * mask)
    total = sum(m.numel() for m in plan.masks.values())
    assert report["costs"]["params"]["pruned"] - report["costs"]["nonzero"]["pruned"] == total * 3 // 4
    text = say("apply", "llm", "--plan", "sparse", "--budget", "sparsity=25%", "--out", "loose")
    assert f"{total // 4:,} of {total:,} weights set to zero" in text
    loose = secateur.Plan.load(place / "loose")
    assert loose.origin["budget"] == "sparsity=25%"
    assert all(bool(loose.masks[n][m].all()) for n, m in plan.masks.items())


def test_a_plan_applied_in_another_type_is_stored_in_the_checkpoints_own(place: Path, say: Callable[..., str]) -> None:
    save_model(place / "half", dtype=torch.bfloat16)
    say("prune", "half", "--method", "magnitude", "--budget", "sparsity=50%", "--out", "sparse")
    say("apply", "half", "--plan", "sparse", "--out", "again", "--dtype", "float32")
    assert {p.dtype for p in secateur.load("again").parameters()} == {torch.bfloat16}


REFUSED: list[tuple[tuple[object, ...], str]] = [
    (("prune", "llm", "--method", "wanda", "--budget", "sparsity=50%"), "wanda needs data"),
    (("prune", "llm", "--method", "magnitude", "--budget", "sparsity=100%"), "must be in [0, 1)"),
    (("prune", "llm", "--method", "magnitude", "--budget", "n:m=2:5"), "5 does not divide its 48 inputs; ignore it"),
    (("prune", "llm", "--method", "magnitude", "--budget", "sparsity=50%", "--ignore", "*.mpl"), "did you mean 'mlp'"),
    (("prune", "llm", "--method", "magnitude", "--budget", "params=50%"), "a budget of params is not served by masks"),
    (("prune", "llm", "--method", "magnitude", "--dims", '{"hidden_size": 24}'), "exact dims is not served by masks"),
    (
        ("prune", "llm", "--method", "magnitude", "--budget", "sparsity=50%", "--adapt-batch-norm"),
        "adapt_batch_norm needs data",
    ),
    (
        ("prune", "llm", "--method", "magnitude", "--budget", "sparsity=50%", "--allocation", "none.json"),
        "none.json: cannot be read",
    ),
    (("apply", "llm", "--plan", "llm"), "no readable plan in llm"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_what_cannot_be(
    place: Path, capsys: pytest.CaptureFixture[str], words: tuple[object, ...], message: str
) -> None:
    code = main([*(str(word) for word in words), "--out", "nothing"])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (place / "nothing").exists()


def test_another_sparsity_needs_scores(
    place: Path, say: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    say("prune", "llm", "--method", "magnitude", "--budget", "sparsity=50%", "--out", "sparse")
    assert main(["apply", "llm", "--plan", "sparse", "--budget", "sparsity=20%", "--out", "loose"]) == 2
    assert "--keep-scores" in capsys.readouterr().err
