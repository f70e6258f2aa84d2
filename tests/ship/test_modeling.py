"""Cuts that no stock config describes: the folder alone gives the model back, with secateur and without."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import logits, random_plan, tiny, tokens
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
)

from secateur.choose.plan import Kept, Plan
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.load.model import fingerprint, load_model, meta_model
from secateur.ship import load, save
from secateur.ship.checkpoint import why_not_stock
from secateur.space import discover

BUNDLED = Path(__file__).resolve().parents[2] / "examples/models/pydoc-llama"
FRESH = """
import json, sys, torch
sys.modules["secateur"] = None  # whoever imports it fails
import transformers

results = {}
for number, (folder, auto, dtype) in enumerate(json.loads(sys.argv[1])):
    options = {"trust_remote_code": True} | ({} if dtype is None else {"dtype": getattr(torch, dtype)})
    kind = getattr(transformers, auto)
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    ids = torch.arange(12)[None] % model.config.vocab_size
    with torch.no_grad():
        result = {"logits": model(input_ids=ids).logits}
    if model.can_generate():
        written = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        result["cached"] = model.generate(ids, **written)
        result["uncached"] = model.generate(ids, use_cache=False, **written)
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        result["tied"] = head.data_ptr() == embedding.data_ptr()
    result["buffers"] = dict(model.named_buffers())
    result["class"] = type(model).__name__
    result["model_type"] = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type
    model.save_pretrained(f"again{number}")
    again = kind.from_pretrained(f"again{number}", **options)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, result["logits"])
    for refused in (kind, transformers.AutoConfig):
        try:
            refused.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            raise AssertionError("loaded without trust")
    results[f"{folder} {dtype}"] = result
torch.save(results, "results.pt")
"""


def fresh(folder: Path, asked: Sequence[tuple[str, str, str | None]]) -> dict[str, Any]:
    """What a process without secateur gets: (folder, auto class, dtype) -> results."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home")}
    env.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", FRESH, json.dumps(asked)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = torch.load(folder / "results.pt", weights_only=True)
    return results


def cut(model: Any, kinds: Sequence[str] = (), dropped: Sequence[str] = (), seed: int = 1) -> Any:
    plan = random_plan(discover(model), kinds, seed)
    return apply(model, Plan(plan.kept, (*plan.dropped, *dropped)))


def uneven(model: Any) -> Plan:
    """Another number of FFN units in each layer, and one layer gone."""
    space = discover(model)
    axes = space.of_kind("ffn")
    kept = {a.name: Kept(a.kind, a.size, tuple(range(3, a.size - 7 * i - 10))) for i, a in enumerate(axes)}
    return Plan(kept, (space.layers()[1].name,))


def small(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return tiny(name, dtype=dtype, **options)


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=80, num_labels=3)).eval()
    for layer, width in zip(model.bert.encoder.layer, (30, 40, 50), strict=True):
        layer.intermediate.dense = nn.Linear(48, width)
        layer.output.dense = nn.Linear(width, 48)
    return model


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a llama without the MLP of its last layer."""
    return save(cut(small("llama"), ["mlp"]), tmp_path_factory.mktemp("saved") / "out")


def test_a_process_without_secateur_gets_the_same_model(tmp_path: Path) -> None:
    layers = small("llama", num_hidden_layers=4, tie_word_embeddings=True)
    gemma = small("gemma2", num_hidden_layers=2)
    models: dict[str, Any] = {
        "sublayers": cut(small("llama"), ["attention", "mlp"]),
        "gpt2": cut(small("gpt2"), ["hidden"]),
        "uneven": apply(layers, uneven(layers)),
        "all": cut(small("llama", num_hidden_layers=3), ["hidden", "heads"], ["model.layers.0", "model.layers.2.mlp"]),
        "gemma": cut(gemma, ["hidden", "mlp"]),
        "bert": bert(),
    }
    for name, pruned in models.items():
        save(pruned, tmp_path / name)
    models["half"] = load(tmp_path / "uneven", dtype="float16")
    save(models["half"], tmp_path / "half")
    autos = dict.fromkeys(models, "AutoModelForCausalLM") | {"bert": "AutoModelForSequenceClassification"}
    asked: list[tuple[str, str, str | None]] = [(name, auto, None) for name, auto in autos.items()]
    results = fresh(tmp_path, [*asked, ("uneven", "AutoModelForCausalLM", "bfloat16")])
    assert len(results) == 8
    for key, result in results.items():
        name, dtype = key.split()
        model: Any = models[name] if dtype == "None" else load(tmp_path / name, dtype=dtype)
        ids = torch.arange(12)[None]
        with torch.no_grad():
            assert torch.equal(result["logits"], model(input_ids=ids).logits), key
        assert result["class"] == f"Secateur{type(model).__name__.removeprefix('Secateur')}"
        assert result["model_type"] == f"secateur_{model.config.model_type.removeprefix('secateur_')}"
        buffers = dict(model.named_buffers())
        assert result["buffers"].keys() == buffers.keys()
        assert all(torch.equal(buffers[n], b) and buffers[n].dtype == b.dtype for n, b in result["buffers"].items())
        if name == "bert":
            with torch.no_grad():
                assert torch.equal(load(tmp_path / name)(input_ids=ids).logits, result["logits"])
            continue
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        assert torch.equal(result["cached"], model.generate(ids, **options)), key
        assert torch.equal(result["cached"], result["uncached"]), key
        assert result["tied"] is (name in ("uneven", "half", "gpt2", "gemma"))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", ["attention", "mlp"]),
        ("gpt2", ["hidden", "layers"]),
        ("gemma3_text", ["mlp", "hidden"]),
        ("phi3", ["attention"]),
        ("gptj", ["head_dim"]),
        ("gpt_neox", ["hidden"]),  # its rotary tables follow the hidden size
    ],
)
def test_secateur_loads_what_it_saved(name: str, kinds: list[str], tmp_path: Path) -> None:
    model = cut(small(name), kinds)
    save(model, tmp_path / "out")
    again: Any = load(tmp_path / "out")
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    assert fingerprint(again) == fingerprint(model)
    ours, theirs = dict(model.named_buffers()), dict(again.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    meta = meta_model(tmp_path / "out")
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_a_loaded_result_is_cut_and_saved_again(tmp_path: Path) -> None:
    first = cut(small("llama", num_hidden_layers=5), ["ffn"], ["model.layers.1", "model.layers.3.self_attn"])
    save(first, tmp_path / "first")
    loaded: Any = load(tmp_path / "first")
    second = cut(loaded, ["ffn", "hidden"], ["model.layers.0", "model.layers.3.mlp"], seed=3)
    save(second, tmp_path / "second")
    record = json.loads((tmp_path / "second/config.json").read_text())["secateur"]
    assert record["layers"] == {"model.layers": [2, 3, 4]}
    assert record["config"] == {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 5}
    assert record["model"].endswith(":LlamaForCausalLM")
    again: Any = load(tmp_path / "second")
    assert torch.equal(logits(again, tokens()), logits(second, tokens()))
    direct = cut(first, ["ffn"], seed=3)  # twice in memory
    save(direct, tmp_path / "direct")
    assert torch.equal(logits(load(tmp_path / "direct"), tokens()), logits(direct, tokens()))


def test_a_loaded_result_can_save_itself(tmp_path: Path, result: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded: Any = load(result)
    save(loaded, tmp_path / "first")
    assert capfd.readouterr() == ("", "")
    loaded.config.use_cache = False
    loaded.resize_token_embeddings(330)
    loaded.save_pretrained(tmp_path / "second")
    again: Any = load(tmp_path / "second")
    assert again.config.use_cache is False
    assert again.lm_head.weight.shape == (330, 48)
    assert torch.equal(logits(again, tokens()), logits(loaded, tokens()))
    texts = {(folder / "modeling_secateur.py").read_text() for folder in (result, *tmp_path.iterdir())}
    assert len(texts) == 1
    assert "type: ignore" not in texts.pop()


def test_the_code_on_the_card_loads_it(tmp_path: Path, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    model = load(result)
    save(model, tmp_path / "out", report={"method": "x"})
    code = re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL)[0]
    assert "trust_remote_code=True" in code
    scope: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(tmp_path / "out")), scope)
    assert torch.equal(logits(scope["model"], tokens()), logits(model, tokens()))


def test_shards_and_dtypes_are_as_before(tmp_path: Path) -> None:
    dense: Any
    dense, tokenizer, _ = load_model(BUNDLED, dtype="bfloat16")
    dense.save_pretrained(tmp_path / "source", max_shard_size=2_000_000)
    model, _, source = load_model(tmp_path / "source")
    new: Any = cut(model, ["ffn"], ["model.layers.2.self_attn"])
    for name, parameter in new.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    save(new, tmp_path / "out", source=source, tokenizer=tokenizer)
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert 1 < len(files) < len(source.files)
    again, words, _ = load_model(tmp_path / "out", dtype="float32")
    assert words is not None
    ours, theirs = dict(new.named_parameters()), dict(again.named_parameters())
    assert all(torch.equal(ours[key].float(), theirs[key]) for key in ours)
    assert load(tmp_path / "out", dtype="float16").dtype == torch.float16


def test_a_stock_class_does_not_take_the_folder(result: Path) -> None:
    """Asked by name, the stock class would warn, and fill what is missing with random numbers."""
    with pytest.raises(FileNotFoundError, match="this_model_needs_trust_remote_code"):
        LlamaForCausalLM.from_pretrained(result)


def test_buffers_that_are_not_computed_are_stored(tmp_path: Path, result: Path) -> None:
    """Rotary tables follow the config, unless someone changed them."""
    model: Any = load(result)
    plain = model.model.rotary_emb.inv_freq.clone()
    model.model.rotary_emb.inv_freq.mul_(0.9)
    save(model, tmp_path / "out")
    again: Any = load(tmp_path / "out")
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    stored = [json.loads((f / "config.json").read_text())["secateur"]["stored"] for f in (tmp_path / "out", result)]
    assert stored == [["model.rotary_emb.inv_freq"], []]
    wide: Any = load(result, dtype="float64")
    assert torch.equal(wide.model.rotary_emb.inv_freq, plain)


def test_configs_that_parts_of_a_model_have_of_their_own(tmp_path: Path) -> None:
    """T5's encoder reads a copy of the config."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
    model: Any = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    part = model.encoder.block[1].layer[1].DenseReluDense
    part.wi, part.wo = nn.Linear(32, 20, bias=False), nn.Linear(20, 32, bias=False)
    model.encoder.config.d_ff = 20
    save(model, tmp_path / "out")
    record = json.loads((tmp_path / "out/config.json").read_text())["secateur"]
    assert record["configs"] == {"encoder.config": {"d_ff": 20}}
    again: Any = load(tmp_path / "out")
    assert (again.encoder.config.d_ff, again.decoder.config.d_ff, again.config.d_ff) == (20, 48, 48)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (model, again))
    assert torch.equal(ours, theirs)


def test_numbers_that_no_tensor_shows_are_kept(tmp_path: Path) -> None:
    """Surgery that leaves all shapes as in the stock class of the config, and one factor that is another."""
    whole: Any = apply(small("llama"), Plan(masks={"lm_head.weight": torch.rand(320, 48) > 0.5}))
    assert why_not_stock(whole) is None
    whole._secateur_origin = {"config": whole.config.to_dict(), "layers": {}}
    assert why_not_stock(whole) is None
    whole.model.layers[1].self_attn.scaling = 0.5
    assert "model.layers.1.self_attn (scaling)" in str(why_not_stock(whole))
    save(whole, tmp_path / "out")
    again: Any = load(tmp_path / "out")
    assert again.model.layers[1].self_attn.scaling == 0.5
    assert torch.equal(logits(again, tokens()), logits(whole, tokens()))


def test_position_tables_that_transformers_would_compute_anew(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 98}
    wide = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model: Any = MarianMTModel(MarianConfig(**sizes, **wide, decoder_start_token_id=98)).eval()
    assert why_not_stock(model) is None
    with torch.no_grad():
        model.model.encoder.embed_positions.weight.copy_(model.model.encoder.embed_positions.weight.flip(1))
    assert "model.encoder.embed_positions.weight is another" in str(why_not_stock(model))
    save(model, tmp_path / "out")
    again: Any = load(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    class Mine(LlamaForCausalLM):  # type: ignore[misc]
        pass

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    other = small("llama")
    other.model.layers[1].mlp = nn.Linear(48, 48)
    for model, message in [
        (Mine(LlamaConfig(**sizes, num_attention_heads=4)), "stock transformers does not know Mine, a class of"),
        (other, r"model\.layers\.1\.mlp is a Linear, and a LlamaMLP in the dense model: that cannot be recorded"),
    ]:
        with pytest.raises(SecateurError, match=message):
            save(model, tmp_path / "new/out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, r"config\.json: the structure is of format 9, and not of 1"),
        ({"model": "os:system"}, r"config\.json: os:system is no class of the installed transformers"),
        ({"model": "transformers.nowhere:Model"}, "transformers.nowhere:Model is no class"),
        ({"tensors": {"model.nothing.weight": [1]}}, "out: transformers cannot load this model: .*nothing"),
        ({"modules": {}}, r"out: the weight files lack model\.layers\.1\.mlp"),
    ],
)
def test_a_damaged_record_is_an_error(change: dict[str, Any], message: str, tmp_path: Path, result: Path) -> None:
    shutil.copytree(result, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["secateur"] |= change
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(SecateurError, match=message):
        load(tmp_path / "out")
