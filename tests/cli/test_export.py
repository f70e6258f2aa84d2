"""``secateur export``: files that are checked, told as a table and as JSON, and what cannot be in one line."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_models import save_model, write_data
from transformers import T5Config, T5ForConditionalGeneration

from secateur.cli import main
from secateur.measure.onnx import OnnxModel
from secateur.measure.onnx_cache import OnnxGenerator
from secateur.measure.openvino import OpenvinoModel
from secateur.ship import memory

NET = '''
"""Networks of a user."""

import torch
from torch import nn


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48 * 4, 10))


class Bessel(nn.Linear):
    def forward(self, x):
        return torch.special.bessel_j0(super().forward(x))


class Branching(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else -y


def branching():
    return Branching(4, 4)


def bessel():
    return Bessel(4, 4)


def images():
    return [(torch.randn(8, 3, 4, 4), torch.zeros(8, dtype=torch.int64))]


def number():
    return 3


def columns():
    return [{"image": torch.randn(8, 3, 4, 4)}]
'''


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_exports.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("own_exports", None)


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    code = main(["export", *map(str, words)])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert err == ""
    return out


def values(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shown(capsys, *words, "--json"), parse_constant=pytest.fail)
    return found


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["export", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


def test_a_language_model_with_its_cache(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(place / "model", dtype=torch.bfloat16)
    words = [model, "--out", place / "new/m.onnx", "--cache", "--int8", "dynamic", "--exclude", "*down_proj*"]
    found = values(capsys, *words)
    assert (found["format"], found["kind"], found["to"], found["model"]) == (1, "export", "onnx", str(model))
    assert found["export"]["cache"]
    assert 0 < found["export"]["max_rel_error"] < 1e-5
    assert found["export"]["inputs"]["past_key_values.1.value"] == ["batch", 2, "past_sequence", 12]
    assert found["notes"] == ["the weights are bfloat16, which CPUs hardly compute in: they are exported in float32"]
    assert "GGUF" in {finding["who"] for finding in found["shapes"]}
    assert found["int8"]["path"] == str(place / "new/m_int8.onnx")
    assert found["int8"]["left"] == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    assert sorted(p.name for p in (place / "new").iterdir()) == ["m.onnx", "m_int8.onnx"]
    ids = torch.arange(3, 9).reshape(2, 3)
    for name in ("m.onnx", "m_int8.onnx"):
        assert OnnxGenerator(place / "new" / name).start(ids).shape == (2, 3, 320)
    assert "m.onnx: exists already; choose another name, or overwrite it" in refused(capsys, *words)


def test_a_fixed_file_is_calibrated_in_its_sizes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = save_model(place / "model"), write_data(place / "data")
    sizes = ["--fixed", "--batch", "2", "--seq-len", "8"]
    quantizing = ["--int8", "static", "--data", data / "ids.npy", "--samples", "4", "--ranges", "minmax"]
    text = shown(capsys, model, "--out", "m.onnx", *sizes, *quantizing)
    lines = [line.split() for line in text.splitlines()]
    assert ["input", "input_ids", "2", "x", "8"] in lines
    assert ["weights", "left", "in", "float", "none"] in lines
    assert "Sizes that kernels dislike" in text
    assert [port.shape for port in OnnxModel("m_int8.onnx").inputs] == [(2, 8), (2, 8)]
    err = refused(capsys, model, "--out", "n.onnx", "--fixed", "--seq-len", "257")
    assert f"--seq-len 257: {model} takes at most 256 tokens" in err


def test_a_fixed_encoder_decoder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=99, **sizes)).save_pretrained(place / "t5")
    capsys.readouterr()
    found = values(capsys, place / "t5", "--out", "t5.pt2", "--fixed", "--batch", "2", "--seq-len", "5")
    assert found["export"]["inputs"] == {n: [2, 5] for n in ("input_ids", "decoder_input_ids", "attention_mask")}


def test_a_model_of_a_user(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["own_exports:net", "--input-shape", "1,3,4,4"]
    text = shown(capsys, *words, "--out", "n.onnx", "--int8", "static", "--data", "own_exports:images")
    assert "own_exports:net as onnx" in text
    assert "batch x 3 x 4 x 4" in text
    assert "bfloat16" not in text
    assert OnnxModel("n_int8.onnx")(torch.randn(5, 3, 4, 4)).shape == (5, 10)
    found = values(capsys, *words, "--out", "n.xml", "--half-weights")
    assert found["to"] == "openvino"
    assert 1e-6 < found["export"]["max_rel_error"] < 1e-2
    assert OpenvinoModel("n.xml")(torch.randn(5, 3, 4, 4)).shape == (5, 10)
    found = values(capsys, *words, "--out", "n.pt2", "--fixed")
    assert found["export"]["inputs"] == {"input": [1, 3, 4, 4]}
    assert "int8" not in found
    err = refused(capsys, *words, "--out", "o.onnx", "--int8", "static", "--data", "own_exports:columns")
    assert "o.onnx has no input 'image'" in err
    assert "known: input" in err
    assert "there is no INT8 file, the float file o.onnx is whole" in err
    err = refused(capsys, *words, "--out", "p.onnx", "--int8", "static", "--data", "own_exports:number")
    assert "--data own_exports:number returned a int, not batches" in err
    assert not Path("p.onnx").exists(), "data is read before a long export"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(place))
        values(capsys, *words, "--out", "~/q.onnx", "--int8", "static", "--data", "own_exports:images")
    assert (place / "q_int8.onnx").is_file()


NET_WORDS = ("own_exports:net", "--input-shape", "1,3,4,4", "--out", "m.onnx")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("own_exports:net", "--out", "m.onnx"), "is no Hugging Face model: give example inputs, --input-shape"),
        ((*NET_WORDS[:-1], "m.bin"), "--out m.bin must end in .onnx, .xml, .pt2, or say the --format"),
        ((*NET_WORDS, "--format", "openvino"), "m.onnx: an OpenVINO model must end in .xml"),
        ((*NET_WORDS[:-1], "m.pt2", "--int8", "dynamic"), "--int8 goes with --format onnx, not torch-export"),
        ((*NET_WORDS, "--half-weights"), "--half-weights goes with --format openvino, not onnx"),
        ((*NET_WORDS, "--backend", "cutlass"), "--backend goes with --format semi-structured, not onnx"),
        ((*NET_WORDS, "--cache", "--fixed"), "--fixed does not go with --cache"),
        ((*NET_WORDS, "--cache"), "and only those have a key/value cache: export it without the cache"),
        ((*NET_WORDS, "--batch", "2"), "--batch goes with --fixed: an open file takes any"),
        ((*NET_WORDS, "--seq-len", "2"), "--seq-len goes with --fixed or --data"),
        ((*NET_WORDS, "--fixed", "--batch", "2"), "--batch goes with token ids: the example inputs say all sizes"),
        ((*NET_WORDS, "--fixed", "--batch", "0"), "--batch must be at least 1, not 0"),
        ((*NET_WORDS, "--int8", "static"), "--int8 static needs --data"),
        ((*NET_WORDS, "--data", "own_exports:images"), "--data goes with --int8"),
        ((*NET_WORDS, "--exclude", "3.*"), "--exclude goes with --int8"),
        ((*NET_WORDS, "--int8", "dynamic", "--data", "own_exports:images"), "--data goes with --int8 static: dynamic"),
        ((*NET_WORDS, "--int8", "dynamic", "--exclude", "9.*"), "'9.*' matches no weight"),
        (("own_exports:bessel", "--input-shape", "2,4", "--out", "m.onnx"), "uses the operator prims.bessel_j0, which"),
        (("own_exports:branching", "--input-shape", "2,4", "--out", "m.onnx"), "branches on a tensor's value"),
        ((*NET_WORDS[:-1], "m.json"), "--out m.json must end in"),
        (("none", "--out", "m.onnx"), "none: no such model folder"),
        (("old.onnx", "--out", "m.onnx"), "old.onnx is an exported file: export starts from the model in torch"),
    ],
)
def test_bad_input_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    (place / "old.onnx").write_text("")
    assert message in refused(capsys, *words)
    left = {p.name for p in place.iterdir()} - {"own_exports.py", "old.onnx", "__pycache__"}
    assert left <= {"m.onnx"}, "a float file may be there when quantising fails"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_semi_structured_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*NET_WORDS[:-1], "m.json", "--format", "semi-structured"]
    assert "2:4 kernels need an NVIDIA GPU of Ampere or newer; torch says" in refused(capsys, *words)


def test_a_folder_too_large_for_memory_is_not_read(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(place / "model", tokenizer=False)
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    assert "exporting it as onnx needs about" in refused(capsys, model, "--out", "m.onnx")
