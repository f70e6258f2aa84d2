"""``secateur run`` on a language model in a folder: what is shown, what is written, what is refused."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_models import save_model, write_data
from safetensors.torch import load_file

import secateur
from secateur.cli import main
from secateur.load.model import load_model, quiet_transformers
from secateur.measure.quality import perplexity
from secateur.methods.iterative import iterative
from secateur.methods.verbs import batches_of

TRAINING = '''
"""Fine-tuning of a language model."""

import torch


def train(model, epochs):
    ids = torch.arange(32).reshape(2, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(epochs):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
'''
CUT = """\
model: dense
data: data/ids.npy
eval_data: data/text.txt
out: out/small
steps:
  - prune:
      budget: {intermediate_size: 40}
      seq_len: 16
  - evaluate:
      seq_len: 16
"""
MASKED = """\
model: dense
out: sparse
eval_data: data/ids.npy
steps:
  - iterative:
      budget: sparsity=50%
      steps: 2
      train: own_training:train
      seq_len: 16
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a model, data and two recipes, in which the user stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    save_model(tmp_path / "dense", num_hidden_layers=1)
    write_data(tmp_path / "data")
    (tmp_path / "own_training.py").write_text(TRAINING)
    (tmp_path / "cut.yaml").write_text(CUT)
    (tmp_path / "masked.yaml").write_text(MASKED)
    yield tmp_path
    sys.modules.pop("own_training", None)


def test_a_cut_is_what_prune_makes_and_stock_transformers_loads(work: Path, say: Callable[..., str]) -> None:
    found = json.loads(say("run", "cut.yaml", "--json"))
    words = ("--dims", '{"intermediate_size": 40}', "--data", "data/ids.npy", "--seq-len", 16, "--json")
    pruned = json.loads(say("prune", "dense", "--out", "pruned", *words, "--eval-data", "data/text.txt"))
    mine, theirs = load_file("out/small/model.safetensors"), load_file("pruned/model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert found == {"out": "out/small", **json.loads(Path("out/small/report.json").read_text())}
    assert found["steps"][0]["costs"] == pruned["costs"]
    assert found["steps"][0]["measured"]["kl"] == found["measured"]["kl"] == pruned["measured"]["kl"]
    assert found["measured"]["perplexity"] == pruned["measured"]["perplexity"]
    assert found["budget"] == pruned["budget"]
    assert {p.name for p in Path("out/small").iterdir()} == {p.name for p in Path("pruned").iterdir()}
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        stock = AutoModelForCausalLM.from_pretrained("out/small")
    assert stock.config.intermediate_size == 40


def test_people_get_a_table_of_each_step(work: Path, say: Callable[..., str]) -> None:
    text = say("run", "cut.yaml")
    for shown in ("1. prune, ", "2. evaluate, ", "KL, nats per token", "perplexity, held out", "multiply-accumulates"):
        assert shown in text
    assert text.index("1. prune") < text.index("2. evaluate") < text.index("saved in out/small (report.json and plan.")
    text = say("run", "masked.yaml", "--set", "out=other")
    for shown in ("1. iterative, ", "minus perplexity of the dense model", "2 best", "50.00%", "all 2 steps are done"):
        assert shown in text


def test_minus_perplexity_decides_on_tokens(work: Path, say: Callable[..., str]) -> None:
    sys.path.append(str(work))
    import own_training  # type: ignore[import-not-found]

    found = json.loads(say("run", "masked.yaml", "--set", "seed=5", "--json"))
    dense = load_model("dense")[0]
    rows: Any = batches_of(dense, "data/ids.npy", seq_len=16)
    torch.manual_seed(5)
    by_hand = iterative(dense, "sparsity=50%", own_training.train, lambda m: -perplexity(m, rows), steps=2)
    assert found["steps"][0]["dense"] == by_hand.dense < 0
    assert [h["after"] for h in found["steps"][0]["history"]] == [h["after"] for h in by_hand.history]
    sparse = secateur.load("sparse")
    assert all(torch.equal(a, b) for a, b in zip(sparse.parameters(), by_hand.model.parameters(), strict=True))


def test_values_are_overridden_and_results_replaced_when_asked(
    work: Path, say: Callable[..., str], refused: Callable[..., str]
) -> None:
    say("run", "cut.yaml")
    assert say("run", "cut.yaml") == "out/small was made by this very recipe: there is nothing to do\n"
    assert "line 4: out/small: exists already" in refused("run", "cut.yaml", "--set", "seed=1")
    assert "line 4: out/small: exists already" in refused("run", "cut.yaml", "--fresh")
    sizes = ("--set", "steps.1.budget={intermediate_size: 32}", "eval_data=data/ids.npy", "--overwrite")
    assert json.loads(say("run", "cut.yaml", *sizes, "--json"))["data"]["evaluation"] == "data/ids.npy"
    assert json.loads(Path("out/small/config.json").read_text())["intermediate_size"] == 32
    text = refused("run", "cut.yaml", "--overwrite", "--set", "steps.1.bugdet=1")
    assert text.startswith("error: cut.yaml, --set steps.1.bugdet: prune by minitron has no option 'bugdet'; did you")
    assert "--set is given twice" in refused("run", "cut.yaml", "--set", "seed=1", "--set", "seed=2")
    assert "holds the model that is being pruned" in refused("run", "cut.yaml", "--overwrite", "--set", "out=dense")


HEAL = """\
model: dense
data: data/ids.npy
eval_data: data/text.txt
out: healed
steps:
  - prune: {budget: {intermediate_size: 40}, seq_len: 16}
  - distill:
      data: {data/text.txt: 0.75, data/text.jsonl: 0.25}
      tokens: 256
      seq_len: 16
      batch_size: 4
      cache: true
      hidden: 0
  - finetune: {data: data/text.txt, steps: 2, seq_len: 16, optimizer: sgd, lr: 0.01}
  - evaluate: {seq_len: 16}
  - report: {}
"""


def test_a_cut_is_healed_on_mixed_data_and_goes_on_where_it_stopped(work: Path, say: Callable[..., str]) -> None:
    (work / "heal.yaml").write_text(HEAL)
    text = say("run", "heal.yaml", "--dry-run")
    for shown in ("2. distill", "256", "Estimates:", "a forward pass of"):
        assert shown in text
    assert not (work / "healed.steps").exists()
    text = say("run", "heal.yaml")
    for shown in ("1. prune, ", "2. distill, ", "steps of training", "highest learning rate", "256", "report.md"):
        assert shown in text
    trained = json.loads((work / "healed/report.json").read_text())["steps"][1]["training"]
    assert (trained["steps"], trained["tokens"]) == (4, 256)
    assert trained["after"]["kl"] <= trained["before"]["kl"]
    told = (work / "healed/report.md").read_text()
    assert "## 2. distill" in told
    assert "held-out perplexity" in told
    assert "{" not in told
    text = say("run", "heal.yaml", "--set", "steps.4.seq_len=8", "--overwrite")
    assert text.startswith("steps 1 to 3 are done already, in healed.steps\nstep 4, evaluate, is done again: seq_len")
    assert "1. prune" not in text
    text = say("run", "heal.yaml", "--overwrite", "--fresh")
    assert text.index("1. prune, ") < text.index("5. report, ")


def test_several_problems_are_one_message(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "cut.yaml").write_text(CUT.replace("seq_len: 16\n  -", "seqlen: 16\n  -").replace("data/ids", "data/id"))
    assert main(["run", "cut.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    first, *lines = err.splitlines()
    assert first == "error: cut.yaml has 2 problems"
    assert [line.split(":")[0] for line in lines] == ["  line 2", "  line 8"]
    assert "did you mean 'seq_len'" in lines[1]


def test_a_result_with_a_constructor_is_no_model(work: Path, refused: Callable[..., str]) -> None:
    (work / "built").mkdir()
    (work / "built/structure.json").write_text("{}")
    assert "--set model: model: built was saved with a constructor" in refused(
        "run", "cut.yaml", "--set", "model=built"
    )


def test_a_run_that_is_stopped_says_what_it_has_kept(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.recipe.pipeline.Recipe.run", stopped)
    assert main(["run", "cut.yaml", "--set", "out=kept"]) == 130
    assert capsys.readouterr().err == "stopped; finished steps are in kept.steps: run it again, and it goes on\n"
