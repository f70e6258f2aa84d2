"""A result is a whole folder that stock transformers loads alone, or nothing."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import yaml
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from secateur.choose.plan import Kept, Plan
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.load.model import Source, fingerprint, load_model, meta_model, quiet_transformers
from secateur.ship import load, save
from secateur.ship.card import model_card
from secateur.ship.checkpoint import check_out, why_not_stock
from secateur.space import discover

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
BUNDLED = Path(__file__).resolve().parents[2] / "examples/models/pydoc-llama"
FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

results = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(12)[None] % model.config.vocab_size
    with torch.no_grad():
        logits = model(ids).logits
    written = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    results[folder] = {
        "class": type(model).__name__,
        "logits": logits,
        "written": written.shape[1],
        "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
        "tied": head.data_ptr() == embedding.data_ptr(),
    }
assert not any(name.split(".")[0] == "secateur" for name in sys.modules), "secateur was imported"
torch.save(results, sys.argv[1])
"""


def llama(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options})).eval()


def gpt2(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **options, "bos_token_id": 1, "eos_token_id": 2})).eval()


def cut(model: Any, share: float = 0.5) -> tuple[Any, Plan]:
    """The model with half of every layer's FFN units and without its second layer, and the plan."""
    space = discover(model)
    axes = space.of_kind("ffn")
    kept = {a.name: Kept(a.kind, a.size, tuple(range(0, a.size, int(1 / share)))) for a in axes}
    plan = Plan(kept, (space.layers()[1].name,))
    return apply(model, plan, space=space), plan


def stored(folder: Path) -> dict[str, tuple[str, str]]:
    """Tensor name -> (file, dtype) of a folder."""
    found: dict[str, tuple[str, str]] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safetensors.safe_open(file, "pt") as handle:
            found |= {name: (file.name, handle.get_slice(name).get_dtype()) for name in handle.keys()}  # noqa: SIM118
    return found


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


# Round trips


def test_a_fresh_process_with_stock_transformers_alone_gets_the_same_model(tmp_path: Path) -> None:
    with quiet_transformers():
        llama().save_pretrained(tmp_path / "source", max_shard_size=10_000)
    dense, _, source = load_model(tmp_path / "source")
    assert len(source.files) > 2
    models = {
        "tied": cut(llama())[0],
        "untied": cut(llama(tie_word_embeddings=False))[0],
        "bf16": cut(load(tmp_path / "source", dtype="bfloat16"))[0],
        "gpt2": cut(gpt2())[0],
        "shards": cut(dense)[0],
    }
    for name, model in models.items():
        save(model, tmp_path / name, source=source if name == "shards" else None)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", FRESH, "results.pt", *models]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for name, model in models.items():
        ids = torch.arange(12)[None] % model.config.vocab_size
        with torch.no_grad():
            expected = model(ids).logits
        assert torch.equal(results[name]["logits"], expected), name
        assert results[name]["class"] == type(model).__name__
        assert results[name]["written"] == 16
        assert results[name]["tied"] is (name != "untied")
        assert results[name]["dtypes"] == ["torch.bfloat16" if name == "bf16" else "torch.float32"]
        assert fingerprint(load(tmp_path / name)) == fingerprint(model)
    assert "lm_head.weight" not in stored(tmp_path / "tied")
    assert "lm_head.weight" in stored(tmp_path / "untied")
    assert {dtype for _, dtype in stored(tmp_path / "bf16").values()} == {"BF16"}
    assert not list((tmp_path / "tied").glob("*.index.json"))
    sharded = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert 1 < len(sharded) < len(source.files)
    headers = 1000  # the limit is for tensors alone
    assert max(file.stat().st_size for file in sharded) <= (source.shard_bytes or 0) + headers


def test_a_folder_holds_all_that_belongs_to_the_result(tmp_path: Path) -> None:
    dense, tokenizer, source = load_model(BUNDLED)
    space = discover(dense)
    pruned, plan = cut(dense)
    report = {"secateur": "0.1.0", "measured": {"perplexity": {"dense": 16.0, "pruned": float("inf")}}}
    out = tmp_path / "deep/er/out"
    assert save(pruned, out, plan=plan, space=space, source=source, tokenizer=tokenizer, report=report) == out
    assert names(out) == {
        *("config.json", "generation_config.json", "model.safetensors", "plan.json", "plan.safetensors"),
        *("report.json", "README.md", "tokenizer.json", "tokenizer_config.json", "LICENSE-PSF.txt"),
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE-PSF.txt"):
        assert (out / name).read_bytes() == (BUNDLED / name).read_bytes()
    assert Plan.load(out) == plan
    saved_report = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
    assert saved_report["measured"]["perplexity"] == {"dense": 16.0, "pruned": "inf"}
    assert (out / "report.json").read_text().startswith('{\n  "secateur"')
    assert (out / "README.md").read_text() == model_card(report)
    assert names(tmp_path / "deep/er") == {"out"}
    model, again, _ = load_model(out)
    assert again is not None
    assert again.encode("import os") == tokenizer.encode("import os")  # type: ignore[union-attr]
    assert fingerprint(model) == fingerprint(pruned)
    # The plan beside the weights makes the same cut again.
    assert fingerprint(apply(load_model(BUNDLED)[0], Plan.load(out))) == fingerprint(pruned)


def test_a_tokenizer_without_files_is_saved_by_itself(tmp_path: Path) -> None:
    _, tokenizer, _ = load_model(BUNDLED)
    save(llama(), tmp_path / "out", tokenizer=tokenizer, card="# Mine\n", report={"method": "x"})
    again = load_model(tmp_path / "out")[1]
    assert again is not None
    assert again.encode("import os") == tokenizer.encode("import os")  # type: ignore[union-attr]
    assert (tmp_path / "out/README.md").read_text() == "# Mine\n"


def test_the_generation_settings_are_those_of_the_model(tmp_path: Path) -> None:
    model = llama()
    model.generation_config.max_new_tokens = 7
    save(model, tmp_path / "out")
    loaded: Any = load(tmp_path / "out", dtype="float64")
    assert loaded.generation_config.max_new_tokens == 7
    assert next(loaded.parameters()).dtype == torch.float64


def test_a_larger_dtype_does_not_split_a_single_file(tmp_path: Path) -> None:
    save(llama().bfloat16(), tmp_path / "small")
    model, _, source = load_model(tmp_path / "small", dtype="float32")
    save(model, tmp_path / "large", source=source)
    assert (tmp_path / "large/model.safetensors").stat().st_size > (source.shard_bytes or 0)


def test_saving_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(llama(), tmp_path / "out")
    assert capfd.readouterr() == ("", "")


# What stock transformers cannot describe; `test_modeling` and `test_built` load it again


def test_what_is_stock_has_no_modeling_file(tmp_path: Path) -> None:
    model, _ = cut(llama())
    assert why_not_stock(model) is None
    save(model, tmp_path / "out")
    assert names(tmp_path / "out") == {"config.json", "generation_config.json", "model.safetensors"}


def test_why_a_result_is_not_stock() -> None:
    dense = llama()
    axis = discover(dense).of_kind("ffn")[1]
    uneven = apply(dense, Plan({axis.name: Kept("ffn", 48, tuple(range(30)))}))
    assert why_not_stock(uneven) == (
        "stock transformers cannot describe this result: model.layers.1.mlp.gate_proj.weight is [30, 32] in the model, "
        "and [48, 32] in a LlamaForCausalLM of its config"
    )
    dropped = apply(dense, Plan(dropped=("model.layers.1.self_attn",)))
    assert re.search(r"model\.layers\.1\.\S+ is not there in the model, and \[32", str(why_not_stock(dropped)))
    other = gpt2()
    other.config.n_embd = 30
    expected = r"cannot describe this result: GPT2LMHeadModel rejects its config \(.*divisible by num_heads"
    assert re.search(expected, str(why_not_stock(other)))


def test_other_models_are_refused(tmp_path: Path) -> None:
    class Mine(LlamaForCausalLM):  # type: ignore[misc]
        pass

    wrong = gpt2()
    wrong.config.n_embd = 30
    with pytest.raises(SecateurError, match=r"Linear is no Hugging Face model; .*constructor='module:callable'"):
        save(nn.Linear(2, 2), tmp_path / "out")
    with pytest.raises(SecateurError, match="stock transformers does not know Mine"):
        save(Mine(LlamaConfig(**SIZES)), tmp_path / "out")
    with pytest.raises(SecateurError, match="is on the meta device"):
        save(meta_model(BUNDLED), tmp_path / "out")
    with pytest.raises(SecateurError, match="GPT2LMHeadModel rejects the config of the dense model"):
        save(wrong, tmp_path / "out")
    assert names(tmp_path) == set()


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="the plan cuts axis 'nothing'"):
        save(llama(), tmp_path / "out", plan=Plan({"nothing": Kept("ffn", 4, (0,))}), space=discover(llama()))
    assert names(tmp_path) == set()


# All or nothing


def broken(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


STAGES = [
    ("transformers.modeling_utils.safe_save_file", OSError(28, "No space left on device"), "No space left"),
    ("transformers.modeling_utils.safe_save_file", safetensors.SafetensorError("I/O error"), "I/O error"),
    ("secateur.choose.plan.write_shard", OSError("disk on fire"), "disk on fire"),
    ("secateur.choose.plan.write_shard", KeyboardInterrupt(), None),
    ("secateur.ship.checkpoint.check_folder", SecateurError("cut short"), "^cut short"),
    ("secateur.ship.checkpoint._save_tokenizer", KeyError("unforeseen"), None),
]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("where", "error", "message"), STAGES)
def test_a_failure_in_the_middle_leaves_nothing_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException, message: str | None, old: bool
) -> None:
    out = tmp_path / "some/out" if not old else tmp_path / "out"
    if old:
        save(llama(seed=1), out)
    before = contents(out) if old else {}
    monkeypatch.setattr(where, broken(error))
    expected = type(error) if message is None else SecateurError
    with pytest.raises(expected, match=message):
        save(llama(), out, plan=Plan(), overwrite=True)
    assert names(tmp_path) == ({"out"} if old else set())
    assert not old or contents(out) == before


@pytest.mark.parametrize("error", [OSError("busy"), KeyboardInterrupt()])
def test_a_failing_rename_brings_the_old_result_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    out = save(llama(seed=1), tmp_path / "out")
    before = contents(out)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError):
        save(llama(), out, overwrite=True)
    assert names(tmp_path) == {"out"}
    assert contents(out) == before


def test_a_report_that_is_no_json_fails_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save(llama(), tmp_path / "out", report={"x": object()})
    assert names(tmp_path) == set()


# What is in the way


def test_an_old_result_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = save(llama(seed=1), tmp_path / "out", card="old")
    with pytest.raises(SecateurError, match="out: exists already; choose another name, or overwrite it"):
        save(llama(), out)
    assert (out / "README.md").read_text() == "old"
    save(llama(), out, overwrite=True)
    assert names(tmp_path) == {"out"}
    assert not (out / "README.md").exists()
    assert fingerprint(load(out)) == fingerprint(llama())


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    save(llama(), tmp_path / "out")
    assert names(tmp_path) == {"out"}
    load(tmp_path / "out")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    save(llama(seed=1), tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    save(llama(), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert fingerprint(load(tmp_path / "real")) == fingerprint(llama())


def test_nothing_else_is_ever_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, work, project = tmp_path / "home", tmp_path / "work", tmp_path / "project"
    for folder in (home / "x", work / "inside", project / "src"):
        folder.mkdir(parents=True)
        (folder.parent / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work / "inside")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "config.json").write_text('{"theme": "dark"}')
    file = tmp_path / "file"
    file.write_text("text")
    model = save(llama(), tmp_path / "model")
    with pytest.raises(SecateurError, match="holds the model that is being pruned; choose another name"):
        check_out(model, overwrite=True, source=load_model(model)[2])
    for out, message in [
        ("~", "~: will not be overwritten, because the home folder is in it"),
        (str(tmp_path), "because the home folder is in it"),
        (str(work), "because the working folder is in it"),
        (str(notes), "because it is no result"),
        (str(project), r"because it holds other folders \(src\)"),
        (str(file), "is a file, and a result is a folder"),
        (str(file / "out"), "cannot be made, because .*file is a file"),
    ]:
        with pytest.raises(SecateurError, match=message):
            check_out(Path(out), overwrite=True)
    assert check_out(model, overwrite=True) == model
    assert check_out(tmp_path / "new/er", overwrite=False) == tmp_path / "new/er"
    assert len(names(model)) == 3


def test_a_result_without_its_config_may_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    Plan().save(out)
    model = llama()
    save(model, out, overwrite=True)
    assert fingerprint(load(out)) == fingerprint(model)


def test_loading_what_is_no_result_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="no such model folder"):
        load(tmp_path / "nothing")


# The card


REPORT: dict[str, Any] = {
    "secateur": "0.1.0",
    "method": "minitron",
    "model": {"name": "some-org/some-model", "fingerprint": "ab" * 32},
    "budget": "params=70%",
    "options": {"samples": 128, "data": "/home/me/secret/calib.npy"},
    "sizes": {"hidden_size": {"dense": 192, "pruned": 160}, "num_hidden_layers": {"dense": 6, "pruned": None}},
    "dropped": ["model.layers.4", "model.layers.5"],
    "costs": {
        "params": {"dense": 2828736, "pruned": 1980000},
        "memory": {"dense": 2**21, "pruned": 2**20, "kv_batch": 1, "kv_seq_len": 4096},
    },
    "measured": {
        "tokens": 81920,
        "perplexity": {"dense": 15.9935, "pruned": 29.5171},
        "kl": 0.61234,
        "top1": 0.71239,
    },
    "data": {"calibration": "/home/me/calib_ids.npy", "evaluation": "val_ids.npy"},
    "seconds": {"total": 12.345},
}


def front_matter(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n\n# ", card, re.DOTALL)
    assert match is not None
    content: dict[str, Any] = yaml.safe_load(match[1])
    return content


def test_the_card_says_what_is_in_the_report() -> None:
    card = model_card(REPORT)
    assert front_matter(card) == {
        "library_name": "transformers",
        "tags": ["secateur", "pruned"],
        "base_model": "some-org/some-model",
    }
    for line in [
        "Nothing was trained after the cut.",
        "- budget: `params=70%`",
        "- options: `samples=128`, `data=calib.npy`",
        "- calibration data: `calib_ids.npy`",
        "- time: total 12.3 s",
        "| hidden_size | 192 | 160 | 83.3% |",
        "| num_hidden_layers | 6 |  |  |",
        "`model.layers.4`, `model.layers.5`",
        "| parameters | 2,828,736 | 1,980,000 | 70.0% |",
        "| memory (weights, and the KV cache of 1 x 4,096 tokens) | 2.0 MiB | 1.0 MiB | 50.0% |",
        "| perplexity | 15.99 | 29.52 |  |",
        "| KL from the dense model (nats per token) | | 0.6123 | |",
        "| same most likely token as the dense model | | 71.24% | |",
        "Quality was measured on 81,920 tokens of `val_ids.npy`.",
    ]:
        assert line in card.splitlines(), line
    assert "/home/me" not in card
    assert 'AutoModelForCausalLM.from_pretrained("path/to/this/folder")' in card
    assert "Nothing was trained" not in model_card({**REPORT, "training": {"steps": 10}})


def test_the_card_of_an_empty_report_claims_nothing() -> None:
    card = model_card({})
    assert front_matter(card) == {"library_name": "transformers", "tags": ["secateur", "pruned"]}
    assert "|" not in card
    assert "measured" not in card


def test_a_local_model_is_no_base_model() -> None:
    for name in (str(BUNDLED), "/some/where/pydoc-llama"):
        card = model_card({"model": {"name": name}})
        assert "base_model" not in front_matter(card)
        assert "`pydoc-llama`" in card
        assert str(BUNDLED.parent) not in card


@pytest.mark.parametrize("block", [0, 1])
def test_the_code_on_the_card_runs(block: int, tmp_path: Path) -> None:
    dense = save(llama(), tmp_path / "dense")
    pruned, plan = cut(load(dense))
    folder = save(pruned, tmp_path / "out", plan=plan, source=Source(str(dense)), report=REPORT)
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    code[block] = code[block].replace("path/to/this/folder", str(folder)).replace("path/to/the/dense/model", str(dense))
    scope: dict[str, Any] = {}
    exec(code[block], scope)
    assert fingerprint(scope["pruned" if block else "model"]) == fingerprint(pruned)
