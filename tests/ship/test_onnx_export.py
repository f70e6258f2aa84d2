"""ONNX files: ONNX Runtime gives what torch gives, at other sizes too; and what cannot be exported is said so."""

import importlib
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from tiny import VOCAB, logits, random_plan, tiny, tokens
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import secateur
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.measure.onnx import OnnxModel
from secateur.ship import files
from secateur.ship.example import Example
from secateur.ship.onnx import OnnxExport, export_onnx
from secateur.space import discover

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, OnnxExport]:
    """A Llama whose layers were cut in different ways, and its file."""
    dense = tiny("llama", dtype=torch.float32, tie_word_embeddings=True)
    space = discover(dense)
    model = apply(dense, random_plan(space, ["ffn"]), space=space)
    plan = random_plan(discover(model), ["mlp"])
    model = apply(model, plan, space=discover(model))
    out = tmp_path_factory.mktemp("llama") / "new" / "llama.onnx"
    return model, out, export_onnx(model, tokens(), out)


def test_a_pruned_language_model_is_the_same_at_any_size(llama: Any) -> None:
    model, out, report = llama
    kept = [layer.mlp for layer in model.model.layers]
    assert not hasattr(kept[-1], "gate_proj"), "the last layer should have lost its MLP: shapes are not uniform"
    assert report.inputs == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
    assert report.outputs == {"logits": ["batch", "sequence", VOCAB]}
    assert report.checked == [{name: [3, 14] for name in report.inputs}, {name: [1, 5] for name in report.inputs}]
    assert 0 < report.max_abs_error < 1e-4
    assert 0 < report.max_rel_error < 1e-5
    assert report.bytes == out.stat().st_size
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    file = OnnxModel(out)
    for batch, length in ((1, 2), (4, 11), (3, 40)):
        ids = tokens(batch, length, seed=length)
        torch.testing.assert_close(file(ids), logits(model, ids), atol=1e-5, rtol=1e-4)


def test_padding_is_hidden_as_in_torch(llama: Any) -> None:
    model, out, _ = llama
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.int64)
    mask[0, 6:] = 0
    mask[2, :3] = 0
    ours = OnnxModel(out)(input_ids=ids, attention_mask=mask)
    expected = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ours[2, 3:], OnnxModel(out)(ids)[2, 3:])


def test_the_file_is_measured_like_the_model(llama: Any) -> None:
    model, out, _ = llama
    rows = tokens(4, 16, seed=3)
    found = secateur.evaluate(OnnxModel(out), rows, against=model)
    assert found["perplexity"] == pytest.approx(secateur.evaluate(model, rows)["perplexity"], rel=1e-4)
    assert found["top1"] == 1
    assert found["kl"] == pytest.approx(0, abs=1e-6)


def test_the_file_names_its_weights_and_holds_no_notes(llama: Any) -> None:
    model, out, _ = llama
    names = {tensor.name for tensor in onnx.load(out).graph.initializer}
    weights = {name for name, p in model.named_parameters() if p.dim() == 2}
    assert weights - names == {"model.embed_tokens.weight"}, "a tied weight has one of its names"
    content = out.read_bytes()
    assert b"stack_trace" not in content
    assert str(Path(torch.__file__).parent).encode() not in content


def test_a_classifier_of_token_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = BertForSequenceClassification(BertConfig(vocab_size=99, max_position_embeddings=20, **sizes)).train()
    report = export_onnx(model, None, tmp_path / "bert.onnx")
    assert model.training
    assert model.config.use_cache
    model.eval()
    assert report.outputs == {"logits": ["batch", 2]}
    rows = [{"input_ids": tokens(5, 20, seed=i) % 99, "labels": torch.arange(5) % 2} for i in range(2)]
    found = secateur.evaluate(OnnxModel(tmp_path / "bert.onnx"), rows, against=model)
    assert found["loss"] == pytest.approx(found["dense_loss"], rel=1e-5)
    assert (found["top1"], found["samples"]) == (1, 10)


def test_a_network_of_convolutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DIGITS))
    digits: Any = importlib.import_module("digits")
    model = digits.trained()
    report = export_onnx(model, torch.randn(1, 1, 24, 24), tmp_path / "cnn.onnx")
    assert report.inputs == {"x": ["batch", 1, 24, 24]}
    assert report.checked == [{"x": [2, 1, 24, 24]}, {"x": [1, 1, 24, 24]}]
    batch = digits.images("test", 100)
    found = secateur.evaluate(OnnxModel(tmp_path / "cnn.onnx"), [batch], against=model)
    assert found["accuracy"] == found["dense_accuracy"] > 0.8
    assert found["top1"] == 1


def test_images_need_no_table_of_tokens(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], num_labels=3)
    report = export_onnx(ResNetForImageClassification(config), None, tmp_path / "cnn.onnx")
    assert list(report.inputs) == ["pixel_values"]
    assert report.outputs == {"logits": ["batch", 3]}


def test_an_encoder_decoder_without_its_caches(tmp_path: Path) -> None:
    """Its attention has a bias that learns: with gradients torch would compute it in another way than in the trace."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    report = export_onnx(T5ForConditionalGeneration(T5Config(vocab_size=99, **sizes)), None, tmp_path / "t5.onnx")
    assert report.inputs["decoder_input_ids"] == ["batch", "decoder_sequence"]
    assert report.max_rel_error < 1e-5


def test_a_mixture_computes_its_experts_in_batches(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "num_local_experts": 3, "max_position_embeddings": 32}
    model: Any = MixtralForCausalLM(MixtralConfig(vocab_size=99, **sizes, **more))
    before = model.get_experts_implementation()
    report = export_onnx(model, None, tmp_path / "moe.onnx")
    assert report.max_rel_error < 1e-5
    assert model.get_experts_implementation() == before == {"": "grouped_mm"}


class Echo(nn.Module):
    """Gives back what it got."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, x


def test_an_input_that_comes_back_keeps_its_name(tmp_path: Path) -> None:
    report = export_onnx(Echo(), torch.randn(2, 6), tmp_path / "echo.onnx")
    assert report.inputs == {"x": ["batch", 6]}
    assert report.outputs == {"output_0": ["batch", 6], "output_1": ["batch", 6]}


class Mlp(nn.Module):
    """Something quick to export."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 40, dtype=dtype), nn.Linear(40, 3, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(torch.relu(self.up(x)))
        return result


class Two(Mlp):
    """Two inputs, two outputs."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        hidden = torch.relu(self.up(x)) * mask[..., None]
        return {"hidden": hidden, "scores": self.down(hidden)}


class Liar(Mlp):
    """Does something else while it is exported."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1.001 if torch.compiler.is_exporting() else 1)


class Bessel(Mlp):
    """Uses a function that ONNX has not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.special.bessel_j0(super().forward(x))
        return result


def test_several_inputs_and_outputs_by_name(tmp_path: Path) -> None:
    model = Two()
    example = {"x": torch.randn(2, 5, 6), "mask": torch.ones(2, 5)}
    dynamic = {"x": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}}
    report = export_onnx(model, example, tmp_path / "two.onnx", dynamic=dynamic)
    assert report.inputs == {"x": ["batch", "length", 6], "mask": ["batch", "length"]}
    assert report.outputs == {"hidden": ["batch", "length", 40], "scores": ["batch", "length", 3]}
    inputs = {"x": torch.randn(1, 8, 6), "mask": torch.tensor([[1.0] * 5 + [0.0] * 3])}
    found = OnnxModel(tmp_path / "two.onnx")(**inputs)
    for name, value in model(**inputs).items():
        torch.testing.assert_close(getattr(found, name), value)


def test_an_example_of_zeros_is_checked_with_other_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    for values in (torch.zeros(2, 6), torch.randn(2, 6) * 3 + 100):
        for trial in Example.of(Mlp(), values, dynamic=True).trials(generator):
            assert 0.3 < float(trial["x"].std()) < 6
            assert abs(float(trial["x"].mean() - values.mean())) < 4


def test_fixed_sizes(tmp_path: Path) -> None:
    model = Mlp()
    report = export_onnx(model, torch.randn(2, 6), tmp_path / "m.onnx", dynamic=False)
    assert report.inputs == {"x": [2, 6]}
    with pytest.raises(SecateurError, match=r"m.onnx: x has the shape \[3, 6\], and the file takes \[2, 6\]"):
        OnnxModel(tmp_path / "m.onnx")(torch.randn(3, 6))


def test_a_file_that_disagrees_is_not_written(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    out.write_text("old")
    with pytest.raises(SecateurError, match=r"Liar: output on x \[3, 6\] differs .* by .* nothing was written"):
        export_onnx(Liar(), torch.randn(2, 6), out, overwrite=True)
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]
    export_onnx(Liar(), torch.randn(2, 6), out, overwrite=True, tolerance=0.01)
    assert out.stat().st_size > 100


def test_an_operator_without_a_form_in_onnx_is_named(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=r"^Bessel uses the operator prims.bessel_j0, which has no form in ONNX"):
        export_onnx(Bessel(), torch.randn(2, 6), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": "m.bin"}, "must end in .onnx"),
        ({"out": "there.onnx"}, "there.onnx: exists already"),
        ({"out": "folder.onnx"}, "folder.onnx: is a folder"),
        ({"model": Mlp(torch.bfloat16)}, r"up.weight is bfloat16.* export model.float\(\)"),
        ({"model": Mlp().to("meta")}, "up.weight has no values"),
        ({"example": (torch.randn(2, 6), 1, 2)}, "the example does not fit Mlp.forward"),
        ({"example": {"y": torch.randn(2, 6)}}, "Mlp.forward has no input 'y'"),
        ({"example": {"x": [torch.randn(2, 6)]}}, "the input 'x' is a list of tensors"),
        ({"example": {}}, "the example holds no tensor"),
        ({"dynamic": {"z": {0: "batch"}}}, "dynamic names the input 'z'"),
        ({"dynamic": {"x": {2: "batch"}}}, r"dynamic names dim 2 of x, whose shape is \[2, 6\]"),
        ({"dynamic": {"x": {1: "width"}}}, "torch.export cannot trace Mlp.*"),
        ({"example": torch.randn(1, 6), "dynamic": {"x": {0: "rows"}}}, "the open size 'rows' is 1"),
    ],
)
def test_mistakes(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "there.onnx").write_text("")
    (tmp_path / "folder.onnx").mkdir()
    given: dict[str, Any] = {"model": Mlp(), "example": torch.randn(2, 6), "out": "m.onnx", **change}
    with pytest.raises(SecateurError, match=message):
        export_onnx(given.pop("model"), given.pop("example"), tmp_path / given.pop("out"), **given)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.onnx", "there.onnx"]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SecateurError, match=rf"needs {package} .*pip install 'secateur\[onnx\]'"):
        export_onnx(Mlp(), torch.randn(2, 6), tmp_path / "m.onnx")


def test_large_models_keep_their_tensors_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Mlp(), torch.randn(4, 6)
    out = tmp_path / "m.onnx"
    monkeypatch.setattr(files, "LIMIT", 100)
    report = export_onnx(model, x, out)
    names = ["m.onnx", "m.onnx.data"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert report.bytes == sum((tmp_path / name).stat().st_size for name in names)
    torch.testing.assert_close(OnnxModel(out)(x), model(x).detach())
    monkeypatch.undo()
    export_onnx(model, x, out, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"], "the old tensors would be waste"
    torch.testing.assert_close(OnnxModel(out)(x), model(x).detach())


def test_half_precision(tmp_path: Path) -> None:
    model, x = Mlp(torch.float16), torch.randn(4, 6)
    report = export_onnx(model, x.half(), tmp_path / "m.onnx")
    assert 1e-6 < report.max_rel_error < 1e-2
    assert OnnxModel(tmp_path / "m.onnx")(x).dtype == torch.float16, "floats are cast to what the file takes"


def test_wrong_calls_of_a_file(llama: Any, tmp_path: Path) -> None:
    file = OnnxModel(llama[1], threads=2)
    assert file.threads == 2
    assert str(llama[1]) in repr(file)
    ids = tokens()
    for args, kwargs, message in (
        ((ids, ids, ids), {}, r"takes 2 inputs \(input_ids, attention_mask\), not 3"),
        ((), {"input_idss": ids}, "has no input 'input_idss'; did you mean 'input_ids'"),
        ((ids,), {"input_ids": ids}, "input_ids is given twice"),
        ((), {}, "the input 'input_ids' is missing"),
        ((ids.float(),), {}, "input_ids is torch.float32, and the file takes torch.int64"),
        ((ids[0],), {}, r"input_ids has the shape \[11\], and the file takes \['batch', 'sequence'\]"),
        ((ids + VOCAB,), {}, r"ONNX Runtime cannot run it on input_ids \[2, 11\]"),
    ):
        with pytest.raises(SecateurError, match=message):
            file(*args, **kwargs)
    (tmp_path / "bad.onnx").write_text("no graph")
    for path, message in (("none.onnx", "there is no such file"), ("bad.onnx", "ONNX Runtime cannot load it")):
        with pytest.raises(SecateurError, match=message):
            OnnxModel(tmp_path / path)
    with pytest.raises(SecateurError, match="threads must be at least 1"):
        OnnxModel(llama[1], threads=0)


def test_a_mask_that_a_file_does_not_take_must_hide_nothing(tmp_path: Path) -> None:
    model = Mlp()
    export_onnx(model, torch.randn(2, 6), tmp_path / "m.onnx")
    file, x = OnnxModel(tmp_path / "m.onnx"), torch.randn(2, 6)
    ones = torch.ones(2, 6)
    torch.testing.assert_close(file(x, attention_mask=ones, labels=ones), model(x).detach())
    with pytest.raises(SecateurError, match="has no input 'attention_mask'"):
        file(x, attention_mask=ones * 0)
