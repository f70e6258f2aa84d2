"""``secateur bench``: several models in one run, as people give them, and what it refuses."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_models import save_model
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from secateur.cli import bench_models
from secateur.cli.bench_models import short_names
from secateur.errors import SecateurError
from secateur.load.model import quiet_transformers
from secateur.measure import bench_memory
from secateur.measure.bench import load_bench
from secateur.measure.bench_passes import file_load
from secateur.measure.onnx import OnnxModel

NET = '''
"""Networks of a user."""

import torch
from torch import nn


def net(width=16):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
    return nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(4 * width, 5))


def half():
    return net(8)


class Broken(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)

    def forward(self, x):
        return None.shape


def other():
    return nn.Linear(7, 2)
'''
QUICK = ("--repeats", "3", "--threads", "1")
FAST = (*QUICK, "--skip", "memory")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_bench.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("own_bench", None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Llama, the same with 70% zeros in every layer, one that is cut, one of another vocabulary."""
    root = tmp_path_factory.mktemp("bench")
    save_model(root / "dense")
    save_model(root / "masked")
    save_model(root / "cut", intermediate_size=16)
    save_model(root / "foreign", vocab_size=300)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    with quiet_transformers():
        T5ForConditionalGeneration(T5Config(vocab_size=99, **sizes)).save_pretrained(root / "t5")
    file = root / "masked" / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensor[torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0)) < 0.9] = 0
    save_file(tensors, file, {"format": "pt"})
    return root


def test_language_models_side_by_side(folders: Path, tmp_path: Path, say: Callable[..., str]) -> None:
    out = tmp_path / "bench.json"
    before = torch.get_num_threads()
    words = ("bench", *(folders / name for name in ("dense", "masked", "cut")), "--seq-len", 12, "--decode", 3)
    values = json.loads(say(*words, *QUICK, "--batch", 2, "--out", out, "--json"))
    assert torch.get_num_threads() == before
    written = load_bench(out)
    assert {key: value for key, value in values.items() if key != "out"} == written
    dense, masked, cut = written["models"]
    assert [model["name"] for model in written["models"]] == ["dense", "masked", "cut"]
    assert (written["setting"]["batch"], written["setting"]["seq"], written["setting"]["decode"]) == (2, 12, 3)
    assert written["machine"]["threads"] == 1
    assert dense["params"] == masked["params"] == cut["params"] + 2 * 3 * 64 * 48
    assert dense["macs"] == masked["macs"] == cut["macs"] + 12 * 2 * 3 * 64 * 48
    assert masked["nonzero"] < 0.7 * dense["nonzero"]
    assert masked["bytes_compressed"] < 0.8 * dense["bytes_compressed"] < dense["bytes"]
    assert dense["bytes"] == (folders / "dense" / "model.safetensors").stat().st_size
    assert [set(model["times"]) for model in written["models"]] == [{"prefill", "decode"}] * 3
    assert dense["times"]["prefill"]["repeats"] == 3
    prefill = dense["times"]["prefill"]
    assert prefill["per_second"] == pytest.approx(24 / prefill["median"])
    zeros = 1 - masked["nonzero"] / masked["params"]
    told = f"{zeros:.0%} of the weights of masked are zero; measured"
    assert sum(note.startswith(told) for note in written["notes"]) == 2  # prefill and decode
    if bench_memory.can_measure(torch.device("cpu")):
        assert all(1 << 16 < model["peak_memory"] < 1 << 28 for model in written["models"])


def test_exported_models_are_timed_in_the_same_run(folders: Path, tmp_path: Path, say: Callable[..., str]) -> None:
    out = tmp_path / "bench.json"
    text = say("bench", folders / "dense", "--onnx", "--seq", 8, "--decode", 2, *FAST, "--out", out)
    own, exported = load_bench(out)["models"]
    assert (own["name"], own["runtime"], exported["name"], exported["runtime"]) == (
        "dense",
        "torch",
        "dense",
        "onnxruntime",
    )
    assert exported["macs"] == pytest.approx(own["macs"], rel=0.01)
    assert set(exported["times"]) == {"prefill", "decode"}
    for part in ("Prefill of 1 x 8 tokens", "Decoding 1 x 2 tokens after 8", "Student's t", f"written to {out}"):
        assert part in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("- ")) <= 120


def test_callables_and_files_on_the_same_images(place: Path, say: Callable[..., str]) -> None:
    from secateur.ship.onnx import export_onnx

    module = __import__("own_bench")
    export_onnx(module.net().eval(), torch.zeros(2, 3, 4, 4), place / "net.onnx")
    words = ("bench", "own_bench:net", "own_bench:half", "net.onnx", "--input-shape", "2,3,4,4", *FAST, "--json")
    values = json.loads(say(*words))
    assert [model["name"] for model in values["models"]] == ["own_bench:net", "own_bench:half", "net.onnx"]
    whole, half, exported = values["models"]
    assert whole["macs"] == 4 * 27 * 16 + 64 * 5 == 2 * half["macs"] == exported["macs"]
    assert list(exported["times"]) == ["forward"]
    assert any("own_bench:half (torch): forward" in note and "allow 2.00x" in note for note in values["notes"])
    file = OnnxModel("net.onnx")
    for given in ({"seq": 7}, {"decode": 2}):
        with pytest.raises(SecateurError, match=f"--{next(iter(given))} is for language models, and net.onnx takes no"):
            file_load(file.path, file, **{"batch": None, "seq": None, "decode": None, **given})
    alone = json.loads(
        say("bench", "net.onnx", "--batch", 3, *QUICK, "--skip", "memory", "macs", "compressed", "--json")
    )
    assert alone["setting"]["inputs"] == {"input": [3, 3, 4, 4]}
    only = alone["models"][0]
    assert (only["macs"], only["bytes_compressed"], only["peak_memory"]) == (None, None, None)
    assert only["bytes"] == (place / "net.onnx").stat().st_size


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no model to bench"),
        (["{dense}", "{dense}"], "is given twice"),
        (["{dense}", "{dense}/../dense"], "is given twice"),
        (["own_bench:Broken", "--input-shape", "2,3"], "Broken does not run on these inputs (AttributeError:"),
        (["{dense}", "{foreign}"], "320 tokens in its vocabulary, foreign has 300: they cannot be compared"),
        (["{t5}", "--seq", "5"], "--seq is for language models, and t5 is a T5ForConditionalGeneration"),
        (["{dense}", "--repeats", "2"], "repeats must be at least 3, not 2"),
        (["{dense}", "--batch", "0"], "--batch must be at least 1, not 0"),
        (["{dense}", "--threads", "0"], "--threads must be at least 1, not 0"),
        (["{dense}", "--decode", "-1"], "--decode must be at least 0, not -1"),
        (["{dense}", "--seq", "250"], "250 tokens and 16 generated ones are more than the 256 positions"),
        (["{dense}", "--skip", "memroy"], "--skip 'memroy': there is no such figure; did you mean 'memory'?"),
        (["{dense}", "--weights", "x.safetensors"], "--weights goes with one MODEL that is module:callable, and there"),
        (["{dense}", "--out", "{dense}"], "is a folder, and the result is a file"),
        (["no.onnx"], "no.onnx: there is no such file"),
        (["bad.onnx"], "bad.onnx: is no ONNX file that can be read"),
        (["own_bench:net"], "give example inputs, --input-shape"),
        (["own_bench:net", "--input-shape", "2,3,4,4", "--batch", "2"], "--batch does not go with --input-shape"),
        (["own_bench:net", "own_bench:other", "--input-shape", "2,3,4,4"], "Linear does not run on these inputs"),
        (["{dense}", "own_bench:other"], "Linear does not run on these inputs"),
        (["{dense}", "no-such-model"], "no-such-model: no such model folder"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_is_one_line(
    place: Path, folders: Path, refused: Callable[..., str], words: list[str], message: str
) -> None:
    (place / "bad.onnx").write_bytes(b"no graph")
    paths = {name: folders / name for name in ("dense", "foreign", "t5")}
    quick: tuple[str, ...] = () if "--repeats" in words or "--threads" in words else FAST
    quick = FAST[:-2] if "--skip" in words else quick
    assert message in refused("bench", *(word.format(**paths) for word in words), *quick)


def test_what_does_not_fit_is_said_before_it_is_loaded(
    folders: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (folders / "dense" / "model.safetensors").stat().st_size
    monkeypatch.setattr(bench_models, "available", lambda _: 3 * size)
    opened: list[Any] = []
    monkeypatch.setattr("secateur.cli.bench.open_entry", lambda *x, **_: opened.append(x))
    words = ("bench", folders / "dense", folders / "masked", folders / "cut", *FAST)
    told = refused(*words)
    assert "dense, masked, cut: loading them together needs about 0.0 GiB, and 0.0 GiB are free on cpu" in told
    assert "leave out --onnx" in refused("bench", folders / "dense", *FAST, "--onnx")
    assert not opened
    bench_models.check_memory(bench_models.entries([str(folders / "dense")]), "cpu", None, onnx=False)  # it fits alone


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(folders: Path, refused: Callable[..., str]) -> None:
    assert "device 'cuda' is not available here" in refused("bench", folders / "dense", "--device", "cuda")


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["out/a/model", "out/b/model", "x.onnx"]) == ["a/model", "b/model", "x.onnx"]
    assert short_names(["runs/dense", "org/cut", "net:make"]) == ["dense", "cut", "net:make"]
    assert short_names(["model", "sub/model", "/model"]) == ["model", "sub/model", "/model"]


def test_a_peak_that_cannot_be_had_is_said(
    folders: Path, say: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> Any:
        return subprocess.CompletedProcess([], -9, "", "")

    monkeypatch.setattr(subprocess, "run", stopped)
    monkeypatch.setattr(bench_models, "can_measure", lambda _: True)
    words = ("bench", folders / "dense", "--seq", 4, "--decode", 0, *QUICK, "--json")
    values = json.loads(say(*words))
    assert values["models"][0]["peak_memory"] is None
    assert any(note.startswith("Peak memory of dense is not known: the process that") for note in values["notes"])
