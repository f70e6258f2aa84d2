"""Models are checked before and after they are loaded; fingerprints see every bit."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
)
from transformers.utils import logging

from secateur.errors import SecateurError
from secateur.load import pieces
from secateur.load.model import (
    check_finite,
    fingerprint,
    fingerprint_data,
    load_model,
    meta_model,
    model_config,
    quiet_transformers,
    sliding_window,
)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BUNDLED = Path(__file__).resolve().parents[2] / "examples/models/pydoc-llama"


def llama(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options})).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in one file, and the same in shards beside it."""
    base = tmp_path_factory.mktemp("models")
    with quiet_transformers():
        llama().save_pretrained(base / "whole")
        llama().save_pretrained(base / "shards", max_shard_size=20_000)
    return base


@pytest.fixture
def whole(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "whole", tmp_path / "whole"))


@pytest.fixture
def shards(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "shards", tmp_path / "shards"))


def edit(path: Path, **values: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# Loading


def test_a_folder_gives_the_model_and_where_it_came_from(saved: Path) -> None:
    model, tokenizer, source = load_model(saved / "whole")
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert tokenizer is None
    assert source.name == str(saved / "whole")
    assert source.folder == saved / "whole"
    assert source.files == (saved / "whole/model.safetensors",)
    assert source.shard_bytes == source.files[0].stat().st_size
    assert (source.hub_id, source.unused, source.dtype) == (None, (), torch.float32)
    assert fingerprint(model) == fingerprint(llama())


def test_shards_give_the_same_model(saved: Path) -> None:
    model, _, source = load_model(str(saved / "shards"))
    assert len(source.files) > 2
    assert source.shard_bytes == max(file.stat().st_size for file in source.files)
    assert fingerprint(model) == fingerprint(llama())


def test_the_bundled_model_comes_with_its_tokenizer_and_its_own_dtype() -> None:
    model, tokenizer, source = load_model(BUNDLED)
    assert next(model.parameters()).dtype == source.dtype == torch.bfloat16
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("def f(x):")) == "def f(x):"


def test_the_dtype_can_be_chosen(saved: Path) -> None:
    for dtype in ("bfloat16", "torch.bfloat16", torch.bfloat16):
        model, _, source = load_model(saved / "whole", dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert source.dtype == torch.float32


def test_the_dtype_of_a_config_without_one_is_that_of_the_weights(whole: Path) -> None:
    edit(whole / "config.json", dtype=None)
    tensors = {name: t.bfloat16() for name, t in load_file(whole / "model.safetensors").items()}
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    model, _, source = load_model(whole)
    assert next(model.parameters()).dtype == source.dtype == torch.bfloat16


def test_tensors_that_the_model_does_not_use_are_told(whole: Path) -> None:
    edit(whole / "config.json", num_hidden_layers=1)
    source = load_model(whole)[2]
    assert len(source.unused) == 9
    assert all(name.startswith("model.layers.1.") for name in source.unused)


def test_config_and_meta_model_need_no_weights(whole: Path) -> None:
    (whole / "model.safetensors").unlink()
    edit(whole / "config.json", dtype="bfloat16", tie_word_embeddings=True)
    assert model_config(whole).hidden_size == 32
    model: Any = meta_model(str(whole))
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training


# What is wrong with the name or the folder


def test_a_mistyped_folder_names_the_nearest(saved: Path) -> None:
    with pytest.raises(SecateurError, match=r"whle: no such model folder; did you mean 'whole'\?"):
        load_model(saved / "whle")


def test_a_bare_name_is_no_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SecateurError, match="gpt2: no such model folder; a hub id has the form org/name"):
        load_model("gpt2")


def test_a_file_is_no_model(saved: Path) -> None:
    with pytest.raises(SecateurError, match=r"a model is a folder, and this is a file; give .*whole$"):
        load_model(saved / "whole/model.safetensors")


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SecateurError) as caught:
        load_model("some-org/some-model")
    assert "some-org/some-model: no such local folder, and the hub cannot be reached" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(SecateurError, match="the hub cannot be reached"):
        model_config("some-org/some-model")


def test_of_a_hub_id_only_the_files_that_are_read_are_fetched(monkeypatch: pytest.MonkeyPatch, shards: Path) -> None:
    asked: list[list[str]] = []

    def snapshot(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert (name, ignore_patterns) == ("some-org/some-model", ["*/*"])
        asked.append(allow_patterns)
        return str(shards)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model, _, source = load_model("some-org/some-model")
    assert fingerprint(model) == fingerprint(llama())
    assert (source.hub_id, source.name, source.folder) == ("some-org/some-model", "some-org/some-model", shards)
    assert "*.json" in asked[0]
    assert not any("safetensors" in pattern for pattern in asked[0])
    assert asked[1] == [file.name for file in source.files]
    model_config("some-org/some-model")
    assert asked[2:] == [["config.json"]]


Change = Callable[[Path], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"whole: no config\.json, so this is no transformers model"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json: not readable as JSON"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json: must be a JSON object, not list"),
        (lambda f: edit(f / "config.json", model_type=None), r"config\.json: has no model_type"),
        (lambda f: edit(f / "config.json", model_type="lama"), "cannot load this model: .* model type `lama`"),
        (lambda f: edit(f / "config.json", hidden_size=33), r"cannot load this model: .*hidden size \(33\)"),
        (lambda f: edit(f / "config.json", model_type="vit"), "cannot load this model: Unrecognized configuration"),
        (lambda f: edit(f / "config.json", quantization_config={"bits": 4}), "the weights are quantized"),
        (
            lambda f: edit(f / "config.json", intermediate_size=40),
            r"down_proj.weight is \[32, 48\].* asks for \[32, 40",
        ),
        (lambda f: edit(f / "config.json", num_hidden_layers=3), r"lack model\.layers\.2\.\S+ and 8 more"),
        (lambda f: (f / "model.safetensors").unlink(), r"no weights: neither model\.safetensors nor"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            r"only safetensors is read.* pytorch_model\.bin; convert .*save_pretrained\(new_folder\)",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "consolidated.safetensors"),
            r"the folder has consolidated\.safetensors",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors: cut short"),
        (
            lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1"),
            "a Git LFS pointer, not the weights; run 'git lfs pull'",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"nope"),
            "no safetensors file: its header is damaged",
        ),
        (lambda f: (f / "tokenizer.json").write_text('{"a": 1}'), "cannot load the tokenizer: "),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(whole: Path, change: Change, message: str) -> None:
    change(whole)
    with pytest.raises(SecateurError, match=message) as caught:
        load_model(whole)
    assert "\n" not in str(caught.value)
    assert str(whole) in str(caught.value)


def test_the_folder_above_points_to_the_model(whole: Path) -> None:
    with pytest.raises(SecateurError, match=r"no config\.json.*did you mean .*whole\?"):
        load_model(whole.parent)


def test_an_adapter_is_no_model(whole: Path) -> None:
    (whole / "config.json").rename(whole / "adapter_config.json")
    with pytest.raises(SecateurError, match="this is an adapter, not a model; merge it"):
        load_model(whole)


def test_a_cut_short_shard_is_named_with_both_sizes(shards: Path) -> None:
    shard = sorted(shards.glob("*.safetensors"))[1]
    size = shard.stat().st_size
    for kept, message in [
        (size - 10, f"{shard}: cut short: it must have {size} bytes, and it has {size - 10}"),
        (50, f"{shard}: cut short, or no safetensors"),
    ]:
        shard.write_bytes(shard.read_bytes()[:kept])
        with pytest.raises(SecateurError) as caught:
            load_model(shards)
        assert message in str(caught.value)


def test_a_missing_shard_is_named(shards: Path) -> None:
    files = sorted(shards.glob("*.safetensors"))
    files[1].unlink()
    with pytest.raises(SecateurError, match=f"1 of the {len(files)} weight files .* are missing: {files[1].name}"):
        load_model(shards)


def test_an_index_must_be_right(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    files = sorted(set(weight_map.values()))
    tensor = next(name for name, file in weight_map.items() if file == files[0])
    edit(index, weight_map={**weight_map, tensor: files[1]})
    with pytest.raises(SecateurError, match=f"says that {tensor} is in {files[1]}, but it is not"):
        load_model(shards)
    edit(index, weight_map={**weight_map, tensor: "../outside.safetensors"})
    with pytest.raises(SecateurError, match=r"'\.\./outside\.safetensors' is no name of a file in this folder"):
        load_model(shards)
    edit(index, weight_map=None)
    with pytest.raises(SecateurError, match="has no weight_map"):
        load_model(shards)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_weights_that_are_not_finite_are_named(whole: Path, value: float, word: str) -> None:
    tensors = load_file(whole / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value
    tensors["model.norm.weight"][0] = value
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SecateurError, match=rf"{word} in the weights: model\.layers\.1\.mlp\.down_proj\.weight \(1 of"):
        load_model(whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_finite_weights_of_every_dtype_pass(dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(3, 3).to(dtype)
    check_finite(layer, "it")
    layer.weight.data.view(torch.uint8)[0, -1] = 0x7F  # all exponent bits: infinity or NaN
    if dtype != torch.float8_e4m3fn:
        layer.weight.data[0, 0] = float("-inf")
    with pytest.raises(SecateurError, match=r"it: (NaN|infinity) in the weights: weight"):
        check_finite(layer, "it")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float17"}, "dtype 'float17' is unknown; did you mean 'float1"),
        ({"dtype": "bf16"}, "did you mean 'bfloat16'"),
        ({"dtype": torch.int64}, "dtype torch.int64 is no type of weights"),
        ({"device": "cdua"}, "device 'cdua' is unknown; did you mean 'cuda'"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available here .*use 'cpu'"),
        ({"device": "meta"}, "use meta_model"),
    ],
)
def test_dtypes_and_devices_are_checked(saved: Path, options: Any, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        load_model(saved / "whole", **options)


# Silence


def test_loading_is_silent(shards: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit(shards / "config.json", num_hidden_layers=1)  # transformers reports unused tensors
    load_model(shards)
    assert capfd.readouterr() == ("", "")


def test_quiet_transformers_restores_what_was_set() -> None:
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub = are_progress_bars_disabled()
    try:
        logging.set_verbosity_info()
        for ours in (False, True):
            (logging.enable_progress_bar if ours else logging.disable_progress_bar)()
            for hubs in (False, True):
                (enable_progress_bars if hubs else disable_progress_bars)()
                with pytest.raises(KeyError), quiet_transformers():
                    assert not logging.is_progress_bar_enabled()
                    assert are_progress_bars_disabled()
                    raise KeyError
                assert logging.is_progress_bar_enabled() is ours
                assert are_progress_bars_disabled() is not hubs
                assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(level)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        (disable_progress_bars if hub else enable_progress_bars)()


# Fingerprints


def test_the_fingerprint_is_of_the_weights_not_of_where_they_are(saved: Path, tmp_path: Path) -> None:
    with quiet_transformers():
        llama(tie_word_embeddings=True).bfloat16().save_pretrained(tmp_path / "elsewhere")
    first = fingerprint(load_model(tmp_path / "elsewhere")[0])
    assert first == fingerprint(llama(tie_word_embeddings=True).bfloat16())
    assert len(first) == 64
    assert len({first, fingerprint(llama().bfloat16()), fingerprint(llama()), fingerprint(llama(seed=1))}) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bit_changes_the_fingerprint(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    before = fingerprint(model)
    assert fingerprint(model) == before
    model.model.layers[1].mlp.up_proj.weight.data.view(torch.uint8)[5, 7] ^= 1
    assert fingerprint(model) != before
    model.model.layers[1].mlp.up_proj.weight.data.view(torch.uint8)[5, 7] ^= 1
    assert fingerprint(model) == before


def test_the_fingerprint_sees_buffers_the_config_and_any_memory_layout() -> None:
    norm = torch.nn.BatchNorm1d(4)
    before = fingerprint(norm)
    assert norm.running_mean is not None
    norm.running_mean[2] = 1.0
    assert fingerprint(norm) != before
    one, other = llama(rms_norm_eps=1e-5), llama(rms_norm_eps=1e-6)
    assert fingerprint(one) != fingerprint(other)
    transposed = llama(rms_norm_eps=1e-5)
    weight = transposed.lm_head.weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    assert fingerprint(transposed) == fingerprint(one)


def test_a_long_tensor_goes_through_the_hash_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fingerprint(llama())
    monkeypatch.setattr(pieces, "_PIECE", 7)
    assert fingerprint(llama()) == whole


def test_there_is_no_fingerprint_without_values(saved: Path) -> None:
    with pytest.raises(SecateurError, match="is on the meta device"):
        fingerprint(meta_model(saved / "whole"))


def test_the_fingerprint_of_data_sees_values_order_and_shape() -> None:
    a, b = torch.arange(6), torch.ones(2, 3)
    known = [
        fingerprint_data(batches)
        for batches in ([a, b], [b, a], [a], [a.view(2, 3), b], [a.int(), b], [{"x": a, "y": b}], [{"x": b, "y": a}])
    ]
    assert len(set(known)) == len(known)
    assert fingerprint_data([{"y": b, "x": a}]) == fingerprint_data([{"x": a, "y": b}])
    assert fingerprint_data(x for x in [a.clone(), b.clone()]) == known[0]
    assert fingerprint_data([torch.zeros(0)]) != fingerprint_data([])
    assert fingerprint_data([torch.tensor(3.0)]) != fingerprint_data([torch.tensor(4.0)])


# Windows


def test_the_window_of_each_attention() -> None:
    gemma = sliding_window(
        Gemma2Config(num_hidden_layers=4, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
    )
    assert [gemma(f"model.layers.{i}.self_attn") for i in range(4)] == [8, None, 8, None]
    assert gemma("model.norm") is None
    assert gemma("model.layers.9.self_attn") is None
    assert sliding_window(MistralConfig(sliding_window=16))("model.layers.3.self_attn") == 16
    assert sliding_window(MistralConfig(sliding_window=None))("model.layers.3.self_attn") is None
    assert sliding_window(LlamaConfig())("model.layers.3.self_attn") is None
    assert sliding_window(GPT2Config())("transformer.h.3.attn") is None
    # Qwen2 brings a window in its config that is off unless it is asked for, and begins at a layer.
    assert sliding_window(Qwen2Config(sliding_window=16))("model.layers.3.self_attn") is None
    qwen = sliding_window(
        Qwen2Config(sliding_window=16, use_sliding_window=True, max_window_layers=2, num_hidden_layers=4)
    )
    assert [qwen(f"model.layers.{i}.self_attn") for i in range(4)] == [None, None, 16, 16]


def test_the_window_inside_of_a_multimodal_config() -> None:
    config = AutoConfig.for_model("gemma3", text_config={"num_hidden_layers": 6, "sliding_window": 12})
    window = sliding_window(config)
    assert [window(f"model.language_model.layers.{i}.self_attn") for i in (0, 5)] == [12, None]


def test_gpt2_loads_with_its_tied_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)).eval()
    with quiet_transformers():
        model.save_pretrained(tmp_path / "gpt2")
    loaded: Any = load_model(tmp_path / "gpt2")[0]
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert fingerprint(loaded) == fingerprint(model)
