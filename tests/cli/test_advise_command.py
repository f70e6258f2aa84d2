"""``secateur advise``: what is printed for people and for machines, the inputs of its commands, and what is refused."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_models import save_model, write_data
from transformers import T5Config, T5ForConditionalGeneration

from secateur.cli import main

MINE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second, self.fc = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.second(torch.relu(self.bn(self.first(x))))).mean((2, 3)))


def net():
    return Net().eval()


def pairs():
    return [(torch.randn(6, 3, 8, 8), torch.arange(6) % 4)]


def example():
    return torch.zeros(2, 3, 8, 8)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("advise")
    save_model(base / "dense", num_hidden_layers=2)
    write_data(base / "data")
    (base / "advised.py").write_text(MINE)
    return base


@pytest.fixture(autouse=True)
def _inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(str(work))


def test_json_has_facts_recommendation_and_cautions(say: Callable[..., str]) -> None:
    words = ("advise", "dense", "--target", "cpu", "--data", "data/ids.npy", "--budget", "params=80%")
    found = json.loads(say(*words, "--json"), parse_constant=pytest.fail)
    assert (found["format"], found["kind"], found["target"], found["budget"]) == (1, "advice", "cpu", "params=80%")
    assert found["facts"]["language"]
    assert {probe["kind"] for probe in found["facts"]["probes"]} >= {"weights", "ffn", "layers"}
    assert found["recommendation"]["rule"] == "structure"
    first = shlex.split(found["recommendation"]["commands"][0])
    assert first[:3] == ["secateur", "prune", "dense"]
    assert "data/ids.npy" in first
    assert "params=80%" in first
    assert {"no_zeros", "redundancy"} <= {advice["rule"] for advice in found["cautions"]}
    again = json.loads(say(*words, "--json"))
    assert again["facts"]["probes"] == found["facts"]["probes"]


def test_a_stranger_reads_it(say: Callable[..., str]) -> None:
    text = say("advise", "dense", "--target", "mobile", "--budget", "memory=90%", "--seconds", 0.01)
    assert "Recommendation for dense on mobile, memory=90%" in text
    assert "Do not prune: INT8 alone comes to about 27% of the bytes, and 90% are allowed." in text
    assert "secateur export dense --out out/model.onnx --int8 dynamic" in text
    assert "(new.jsonl: in place of your own data)" in text
    assert "When not to, and what to know" in text
    assert text.index("Recommendation") < text.index("When not to") < text.index("Facts that this rests on")


def test_a_network_gets_its_inputs_from_the_data_or_as_it_was_told(say: Callable[..., str]) -> None:
    given = ("advise", "advised:net", "--target", "gpu", "--budget", "macs=50%", "--json")
    for words, expected in (
        (("--data", "advised:pairs"), ["--input-shape", "2,3,8,8"]),
        (("--input-shape", "2,3,9,9"), ["--input-shape", "2,3,9,9"]),
        (("--inputs", "advised:example"), ["--inputs", "advised:example"]),
    ):
        found = json.loads(say(*given, *words))
        assert found["recommendation"]["rule"] == "convolutions"
        first = shlex.split(found["recommendation"]["commands"][0])
        assert first[-2:] == expected
        assert "--adapt-batch-norm" in first
        assert bool(found["facts"]["probes"]) == ("--data" in words)


def test_an_encoder_decoder_needs_no_data(
    work: Path, say: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=99, **sizes)).save_pretrained(work / "t5")
    capsys.readouterr()
    found = json.loads(say("advise", "t5", "--target", "cpu", "--budget", "params=70%", "--json"))
    assert (found["facts"]["language"], found["facts"]["probes"]) == (False, [])
    assert found["recommendation"]["rule"] == "structure"


def test_a_pruned_model_is_known(say: Callable[..., str]) -> None:
    how = ("--dims", '{"intermediate_size": 64}', "--data", "data/ids.npy", "--seq-len", 16, "--mend", "none")
    say("prune", "dense", "--out", "small", *how)
    found = json.loads(say("advise", "small", "--target", "gpu", "--data", "data/ids.npy", "--json"))
    assert found["facts"]["cut"]
    assert "pruned_already" in {advice["rule"] for advice in found["cautions"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("dense", "--target", "cpu", "--budget", "parms=70%"), "did you mean 'params'"),
        (("dense", "--target", "cpu", "--seconds", "0"), "--seconds must be above 0"),
        (("dense", "--target", "cpu", "--data", "data/idz.npy"), "did you mean 'ids.npy'"),
        (("nothing", "--target", "cpu"), "nothing"),
        (("advised:net", "--target", "cpu"), "give example inputs"),
        (
            ("advised:net", "--target", "cpu", "--input-shape", "2,4,8,8"),
            "expected input[2, 4, 8, 8] to have 3 channels",
        ),
    ],
    ids=str,
)
def test_bad_input_is_one_line(refused: Callable[..., str], words: tuple[str, ...], message: str) -> None:
    assert message in refused("advise", *words)


def test_a_target_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "dense", "--target", "toaster"]) == 2
    assert "llm-serving" in capsys.readouterr().err
