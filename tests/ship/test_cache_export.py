"""Language models with their key/value cache: steps give what one pass over the whole row gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, logits, random_plan, tiny, tokens
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import secateur
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.measure.onnx import OnnxModel
from secateur.measure.onnx_cache import OnnxGenerator
from secateur.ship import cache
from secateur.ship.onnx import OnnxExport, export_onnx
from secateur.ship.quantize import quantize_onnx
from secateur.space import discover


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, OnnxExport]:
    """A Llama with other heads in each layer, and a layer without attention, as it comes back from its folder."""
    folder = tmp_path_factory.mktemp("cached")
    dense = tiny("llama", dtype=torch.float32, num_hidden_layers=3, num_key_value_heads=4)
    space = discover(dense)
    plan = random_plan(space, ["heads", "kv_groups", "ffn", "attention"])
    assert plan.dropped
    secateur.save(apply(dense, plan, space=space), folder / "model", plan=plan)
    model = secateur.load(folder / "model")
    out = folder / "llama.onnx"
    return model, out, export_onnx(model, None, out, cache=True)


def test_the_names_are_those_of_optimum(llama: Any) -> None:
    model, out, report = llama
    assert report.cache
    assert [p.name for p in out.parent.iterdir() if p.suffix == ".onnx"] == ["llama.onnx"]
    names = [f"{i}.{part}" for i in range(3) for part in ("key", "value")]
    ids = ["input_ids", "attention_mask", "position_ids"]
    assert list(report.inputs) == [*ids, *(f"past_key_values.{name}" for name in names)]
    assert list(report.outputs) == ["logits", *(f"present.{name}" for name in names)]
    assert report.inputs["attention_mask"] == ["batch", "past_sequence + sequence"]
    assert report.outputs["logits"] == ["batch", "sequence", VOCAB]
    found = model(tokens(2, 4)).past_key_values.layers
    for index, layer in enumerate(found):
        _, heads, _, numbers = layer.keys.shape
        assert report.inputs[f"past_key_values.{index}.key"] == ["batch", heads, "past_sequence", numbers]
        assert report.outputs[f"present.{index}.value"] == ["batch", heads, "past_sequence + sequence", numbers]
    assert len({layer.keys.shape for layer in found}) > 1, "the layers should not be alike"
    assert 0 < report.max_rel_error < 1e-5
    assert report.checked == [{"input_ids": [rows, 9]} for rows in (3, 1, 2)]


def test_steps_are_one_pass(llama: Any) -> None:
    model, out, _ = llama
    file = OnnxGenerator(out, threads=1)
    ids = tokens(2, 15)
    expected = logits(model, ids)
    torch.testing.assert_close(file.start(ids[:, :6]), expected[:, :6], atol=1e-5, rtol=1e-4)
    for i in range(6, 12):
        torch.testing.assert_close(file.step(ids[:, i : i + 1]), expected[:, i : i + 1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(file.step(ids[:, 12:]), expected[:, 12:], atol=1e-5, rtol=1e-4)
    assert (file.positions, file.threads) == (15, 1)
    numbers = sum(x.numel() for layer in model(ids).past_key_values.layers for x in (layer.keys, layer.values))
    assert file.cache_bytes == 4 * numbers
    again = file.start(ids[:1, :3])
    torch.testing.assert_close(again, expected[:1, :3], atol=1e-5, rtol=1e-4)
    assert file.positions == 3


def test_padding_on_the_left(llama: Any) -> None:
    model, out, _ = llama
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    file = OnnxGenerator(out)
    alone = logits(model, ids[:1, 3:])
    torch.testing.assert_close(file.start(ids[:, :6], mask[:, :6])[:1, 3:], alone[:, :3], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(file.step(ids[:, 6:])[:1], alone[:, 3:], atol=1e-5, rtol=1e-4)


def test_a_whole_call_begins_with_an_empty_cache(llama: Any) -> None:
    model, out, _ = llama
    rows = tokens(3, 12)
    found = secateur.evaluate(OnnxModel(out), rows, against=model)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["top1"] == 1


def test_int8_with_a_cache(llama: Any, tmp_path: Path) -> None:
    model, out, _ = llama
    ids = tokens(2, 10)
    for mode in ("dynamic", "static"):
        rows = [tokens(4, 12, seed=9)] if mode == "static" else None
        report = quantize_onnx(out, tmp_path / f"{mode}.onnx", mode=mode, calibration=rows)
        assert len(report.quantized) > 10
        file = OnnxGenerator(tmp_path / f"{mode}.onnx")
        found = torch.cat([file.start(ids[:, :7]), file.step(ids[:, 7:])], 1)
        expected = logits(model, ids)
        assert float((found - expected).abs().max() / expected.abs().max()) < 0.1


@pytest.mark.parametrize(
    ("name", "options"), [("gpt2", {}), ("gemma2", {}), ("gpt2", {"dtype": torch.float16, "n_layer": 1})]
)
def test_other_models(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Gemma-2 has a window of 5 tokens in one of its layers, and the rows are longer."""
    model = tiny(name, **{"dtype": torch.float32, **options})
    report = export_onnx(model, None, tmp_path / "m.onnx", cache=True)
    assert report.max_rel_error < (1e-2 if options else 1e-5)
    if not options:
        ids = tokens(2, 14)
        file = OnnxGenerator(tmp_path / "m.onnx")
        found = torch.cat([file.start(ids[:, :9]), file.step(ids[:, 9:10]), file.step(ids[:, 10:])], 1)
        torch.testing.assert_close(found, logits(model, ids), atol=1e-5, rtol=1e-4)
        mask = torch.ones(2, 9, dtype=torch.int64)
        mask[0, :4] = 0  # GPT-2 counts positions from the first token that is none of the padding
        padded, alone = file.start(ids[:, :9], mask), logits(model, ids[:1, 4:])
        torch.testing.assert_close(padded[:1, 4:], alone[:, :5], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(file.step(ids[:, 9:])[:1], alone[:, 5:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("newest key", r"logits on input_ids \[3, 1\] after 5 tokens differs between ONNX Runtime and torch"),
        ("padding", r"logits on input_ids \[2, 5\] after 0 tokens differs between ONNX Runtime and torch"),
    ],
)
def test_a_file_that_forgets_is_not_written(
    what: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepping = cache._stepping

    def forgetful(model: nn.Module, names: list[str]) -> Any:
        step = stepping(model, names)

        def wrong(**inputs: Any) -> Any:
            if what == "padding":
                inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
            found, past = step(**inputs)
            return found, [(key.roll(1, 2) if what == "newest key" else key, value) for key, value in past]

        setattr(wrong, "__signature__", step.__signature__)  # noqa: B010
        return wrong

    monkeypatch.setattr(cache, "_stepping", forgetful)
    with pytest.raises(SecateurError, match=message):
        export_onnx(tiny("gpt2", dtype=torch.float32, n_layer=1), None, tmp_path / "m.onnx", cache=True)
    assert not list(tmp_path.iterdir())


def made(kind: str, builder: Any = AutoModelForCausalLM, **options: Any) -> Any:
    return builder.from_config(AutoConfig.for_model(kind, vocab_size=99, **options)).eval()


BAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
BAMBA |= {"num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
REFUSED = [
    (lambda: made("t5", AutoModelForSeq2SeqLM, **T5), "has an encoder and a decoder"),
    (lambda: made("bamba", attn_layer_indices=[1], **BAMBA), "BambaForCausalLM keeps LinearAttentionLayer in layer 0"),
    (lambda: made("bert", **BERT), "BertLMHeadModel gives back no key/value cache"),
    (lambda: nn.Linear(6, 6), "Linear is no Hugging Face model"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED)
def test_other_caches_are_refused(build: Any, message: str, tmp_path: Path) -> None:
    model = build()
    example = None if hasattr(model, "config") else torch.randn(2, 6)
    with pytest.raises(SecateurError, match=rf"{message}.*: export it without the cache"):
        export_onnx(model, example, tmp_path / "m.onnx", cache=True)
    assert not list(tmp_path.iterdir())


def test_wrong_calls(llama: Any, tmp_path: Path) -> None:
    model, out, _ = llama
    with pytest.raises(SecateurError, match="has open sizes: leave dynamic out"):
        export_onnx(model, None, tmp_path / "m.onnx", cache=True, dynamic=False)
    file = OnnxGenerator(out)
    calls: list[tuple[Any, str]] = [
        (lambda: file.step(tokens(2, 1)), "step comes after start"),
        (lambda: file.start(tokens(2, 3)[0]), r"token ids are whole numbers \[batch, tokens\], not torch.int64 \[3\]"),
        (lambda: file.start(tokens(2, 3) + VOCAB), r"cannot run it on ids \[2, 3\] after 0 positions"),
        (lambda: file.start(tokens(2, 3), torch.ones(2, 2)), r"the mask is \[2, 2\], and the ids are \[2, 3\]"),
    ]
    for call, message in calls:
        with pytest.raises(SecateurError, match=message):
            call()
    file.start(tokens(2, 3))
    with pytest.raises(SecateurError, match="the cache holds 2 rows, and step was given 3"):
        file.step(tokens(3, 1))
    plain = tmp_path / "plain.onnx"
    export_onnx(nn.Linear(6, 3), torch.randn(2, 6), plain)
    with pytest.raises(SecateurError, match=r"plain.onnx: has no key/value cache \(no input past_key_values.0.key\)"):
        OnnxGenerator(plain)
