"""The command line on ``module:callable``: inspect, prune, eval, and what it says when something is missing."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_models import save_model
from safetensors.torch import save_file

import secateur

NET = '''
"""A user's own network."""

import torch
from torch import nn
from torch.nn import functional


class Net(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.mid, self.fc = nn.Conv2d(width, 20, 3), nn.Linear(20, 4)

    def forward(self, x):
        x = self.mid(functional.relu(self.bn(self.conv(x))))
        return self.fc(functional.relu(x).mean((2, 3)))


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        yield torch.randn(4, 3, 6, 6, generator=generator), torch.randint(4, (4,), generator=generator)


def example():
    return {"x": torch.zeros(2, 3, 6, 6)}


def loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1]) * 3


def number():
    return 5
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the network, and weights that are not those of the constructor."""
    (tmp_path / "own_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("own_net", None)
    import own_net  # type: ignore[import-not-found]

    generator = torch.Generator().manual_seed(8)
    state = {
        name: tensor + 0.1 * torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in own_net.Net(width=16).state_dict().items()
    }
    save_file(state, tmp_path / "weights.safetensors")
    yield tmp_path
    sys.modules.pop("own_net", None)


MODEL = ("own_net:Net", "--model-args", '{"width": 16}', "--weights", "weights.safetensors")
SHAPE = ("--input-shape", "2,3,6,6")


def test_inspect(place: Path, say: Callable[..., str]) -> None:
    found = json.loads(say("inspect", "own_net:Net", *SHAPE, "--json"))
    assert [(k["kind"], k["axes"], k["sizes"]) for k in found["kinds"]] == [("channels", 2, [12, 20])]
    assert found["costs"]["macs"] == 36 * 27 * 12 + 16 * 9 * 12 * 20 + 20 * 4
    assert any("an output of the model" in reason for reason in found["frozen"])
    named = json.loads(say("inspect", "own_net:Net", "--inputs", "own_net:example", "--json"))
    assert named["costs"] == found["costs"]
    assert "2 " in say("inspect", "own_net:Net", *SHAPE)


def test_prune_save_load_and_eval(place: Path, say: Callable[..., str]) -> None:
    words = ("--method", "structural", "--criterion", "taylor", "--budget", "macs=50%", "params=60%", *SHAPE)
    data = ("--data", "own_net:batches", "--eval-data", "own_net:batches", "--loss", "own_net:loss")
    limits = ("--round-to", "channels", 2, "--limits", "conv.channels", 0.5, "--mend", "none")
    report = json.loads(say("prune", *MODEL, *words, *data, *limits, "--out", "small", "--json"))
    assert report["mend"] == {"method": "none"}
    dense = 36 * 27 * 16 + 16 * 9 * 16 * 20 + 20 * 4
    assert report["costs"]["macs"]["dense"] == dense
    assert report["costs"]["macs"]["pruned"] <= dense / 2
    assert report["costs"]["params"]["pruned"] <= 0.6 * report["costs"]["params"]["dense"]
    assert report["measured"]["samples"] == 12
    assert report["calibration"]["samples"] == 12
    assert report["options"]["loss"] == "own_net:loss"
    model: Any = secateur.load("small")
    assert sum(p.numel() for p in model.parameters()) == report["costs"]["params"]["pruned"]
    assert model.conv.out_channels % 2 == 0
    assert model.conv.out_channels >= 8
    found = json.loads(say("eval", "small", "--data", "own_net:batches", "--against", *MODEL, "--json"))
    assert found["accuracy"] == report["measured"]["accuracy"]["pruned"]
    assert found["dense_accuracy"] == report["measured"]["accuracy"]["dense"]
    assert found["top1"] == pytest.approx(report["measured"]["top1"])
    assert "accuracy of the dense model" in say("eval", "small", "--data", "own_net:batches", "--against", *MODEL)
    replayed = secateur.apply(_dense(), secateur.Plan.load(place / "small"), inputs=torch.zeros(2, 3, 6, 6))
    assert all(torch.equal(a, b) for a, b in zip(replayed.parameters(), model.parameters(), strict=True))


def _dense() -> Any:
    from secateur.load.constructor import build, load_weights

    model = build("own_net:Net", {"width": 16})
    load_weights(model, "weights.safetensors")
    return model.eval()


def test_people_get_a_table(place: Path, say: Callable[..., str]) -> None:
    words = ("--method", "structural", "--budget", "macs=60%", *SHAPE, "--eval-data", "own_net:batches")
    text = say("prune", *MODEL, *words, "--out", "small")
    for shown in ("channels, in 2 axes", "multiply-accumulates", "accuracy on 12 held-out", "that secateur.load loads"):
        assert shown in text


def test_a_hugging_face_folder(tmp_path: Path, say: Callable[..., str]) -> None:
    folder = save_model(tmp_path / "llama", tokenizer=False)
    out = tmp_path / "small"
    words = ("--method", "structural", "--budget", "macs=80%", "--only", "ffn", "--uniform", "False", "--out", out)
    report = json.loads(say("prune", folder, *words, "--json"))
    assert report["costs"]["macs"]["pruned"] <= 0.8 * report["costs"]["macs"]["dense"]
    assert report["data"] == {"calibration": None, "evaluation": None}
    assert report["units"]["ffn"]["axes"] == 2
    model = secateur.load(out)
    assert sum(p.numel() for p in model.parameters()) == report["costs"]["params"]["pruned"]


PRUNE = ("prune", *MODEL, "--method", "structural", "--budget", "macs=50%", "--out", "small")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("inspect", "own_net:Net"), "is no Hugging Face model: give example inputs, --input-shape 1,3,32,32 or"),
        (("inspect", "own_net:Nett", *SHAPE), "has no 'Nett'; did you mean 'Net'"),
        (("inspect", "own_nett:Net", *SHAPE), "there is no module 'own_nett'"),
        (("inspect", "own_net:Net", "--input-shape", "2,3,x"), "--input-shape '2,3,x' is no shape"),
        (("inspect", "own_net:Net", "--input-shape", "2,4,6,6"), "cannot trace Net"),
        (("inspect", "own_net:Net", *SHAPE, "--inputs", "own_net:example"), "not both"),
        (("inspect", "own_net:Net", *SHAPE, "--model-args", "[1]"), "--model-args must be a JSON object"),
        (("inspect", "own_net:Net", *SHAPE, "--model-args", "{"), "is not JSON"),
        (("inspect", "own_net:Net", *SHAPE, "--weights", "none.safetensors"), "none.safetensors: no such file"),
        ((*PRUNE, *SHAPE, "--data", "text.txt"), "--data text.txt: for a MODEL that is module:callable give"),
        ((*PRUNE, *SHAPE, "--data", "self"), "--data self: for a MODEL that is module:callable give"),
        ((*PRUNE, *SHAPE, "--data", "own_net:batchs"), "--data 'own_net:batchs': .* did you mean 'batches'"),
        ((*PRUNE, *SHAPE, "--data", "own_net:number"), "returned a int, not batches"),
        ((*PRUNE, *SHAPE, "--criterion", "fisher"), "criterion fisher needs data"),
        ((*PRUNE, *SHAPE, "--criterion", "fishr"), "did you mean 'fisher'"),
        ((*PRUNE, *SHAPE, "--loss", "own_net:loss"), "criterion magnitude_l2 takes no loss"),
        ((*PRUNE, *SHAPE, "--score", "perplexity"), "--score.* do not go with the method structural"),
        ((*PRUNE, *SHAPE, "--ignore", "midd"), "ignore: 'midd' matches no kind, axis or module; did you mean 'mid'"),
        ((*PRUNE[:-4], "--budget", "macs=1%", "--out", "small", *SHAPE), "the smallest reachable is"),
        (("prune", "own_net:Net", "--budget", "params=50%", "--out", "small", *SHAPE), "--method structural"),
        (("eval", "own_net:Net", "--data", "self"), "on its own words"),
        (("eval", "own_net:Net", "--data", "own_net:batches", "--against", "own_net:Net"), "only be those of one"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else "",
)
def test_what_cannot_be(place: Path, refused: Callable[..., str], words: tuple[str, ...], message: str) -> None:
    import re

    text = refused(*words)
    assert re.search(message, text), text
    assert not (place / "small").exists()


def test_options_that_do_not_go_with_a_folder(tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = save_model(tmp_path / "llama", tokenizer=False)
    assert "--weights goes with a MODEL that is module:callable" in refused("inspect", folder, "--weights", "x")
    words = ("prune", folder, "--budget", "params=70%", "--out", tmp_path / "out", "--loss", "own:loss")
    assert "--loss does not go with the method minitron" in refused(*words)
