"""A streamed model is saved unit by unit: stock transformers loads it, and it is what the model in memory gives."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from secateur.choose.plan import Kept, Plan
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.load.model import check_finite, fingerprint, load_model, quiet_transformers
from secateur.load.store import Store, copy_of, held, store_of
from secateur.load.streamed import load_streamed
from secateur.ship import save
from secateur.ship.checkpoint import why_not_stock
from secateur.space import discover

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).to(torch.bfloat16),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=8)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
}
FRESH = """
import json, sys
from transformers import AutoModelForCausalLM

found = {}
for folder in sys.argv[1:]:
    options = {"trust_remote_code": True} if folder.endswith("modeling") else {}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    found[folder] = [sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")]
assert not any(name.split(".")[0] == "secateur" for name in sys.modules), "secateur was imported"
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("dense")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        with quiet_transformers():
            make().save_pretrained(base / name, max_shard_size=30_000)
    return base


def every(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors = load_file(path)
        assert not set(tensors) & set(found)
        found |= tensors
    return found


def same(one: Path, other: Path) -> None:
    """Two checkpoints with the same tensors under the same names."""
    a, b = every(one), every(other)
    assert sorted(a) == sorted(b)
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []
    for name in ("config.json", "generation_config.json"):
        assert (one / name).read_text() == (other / name).read_text()


def change(model: nn.Module) -> None:
    """The same change of two blocks and of the embedding, in memory or not."""
    for number, path in enumerate(("model.layers.0", "model.layers.2", "model.embed_tokens")):
        with held(model, path), torch.no_grad():
            for parameter in model.get_submodule(path).parameters():
                parameter.mul_(1.5 + number)


@pytest.fixture(scope="module")
def saved(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each model, changed: saved from memory, streamed, and streamed as it was; one of them cut."""
    base = tmp_path_factory.mktemp("saved")
    for name in MODELS:
        whole, _, source = load_model(dense / name)
        model, _, _ = load_streamed(dense / name, work=base / f"{name}.work")
        save(model, base / f"{name}-dense", source=source)
        new = copy_of(model, "new")
        change(whole)
        change(new)
        save(whole, base / f"{name}-memory", source=source)
        save(new, base / f"{name}-streamed", source=source)
    for way in ("memory", "streamed"):
        if way == "memory":
            model, _, source = load_model(dense / "tied")
        else:
            model, _, source = load_streamed(dense / "tied", work=base / "modeling.work")
        space = discover(model)
        axes = space.of_kind("ffn")[:2]
        plan = Plan({a.name: Kept(a.kind, a.size, tuple(range(0, a.size, i + 2))) for i, a in enumerate(axes)})
        cut = apply(model, plan, space=space)
        assert why_not_stock(cut) is not None
        save(cut, base / f"{way}-modeling", plan=plan, source=source)
    return base


@pytest.mark.parametrize("name", MODELS)
def test_the_result_is_that_of_the_model_in_memory(saved: Path, dense: Path, name: str) -> None:
    same(saved / f"{name}-memory", saved / f"{name}-streamed")
    a, b = every(saved / f"{name}-dense"), every(dense / name)
    assert sorted(a) == sorted(b)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.mark.parametrize("name", MODELS)
def test_each_unit_has_a_file_that_the_index_names(saved: Path, name: str) -> None:
    folder = saved / f"{name}-streamed"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    count = {"llama": 6, "mixtral": 6}.get(name, 5)  # embedding, three layers, norm, and a head of its own
    assert files == [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    tensors = {file: set(load_file(folder / file)) for file in files}
    assert index["weight_map"] == {name: file for file in files for name in tensors[file]}
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert tensors[files[0]] == {"model.embed_tokens.weight"}
    assert all(name.startswith("model.layers.1.") for name in tensors[files[2]])
    model, _, _ = load_model(folder)
    assert index["metadata"] == {
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "total_size": sum(p.nbytes for p in model.parameters()),
    }


def test_a_cut_that_no_config_describes_gets_its_modelling_file(saved: Path) -> None:
    same(saved / "memory-modeling", saved / "streamed-modeling")
    assert {p.name for p in (saved / "streamed-modeling").iterdir()} >= {"modeling_secateur.py", "plan.json"}
    a, b = (load_model(saved / f"{way}-modeling")[0] for way in ("memory", "streamed"))
    assert fingerprint(a) == fingerprint(b)


def test_stock_transformers_loads_all_of_it_in_a_fresh_process(saved: Path) -> None:
    folders = [str(saved / f"{name}-streamed") for name in MODELS] + [str(saved / "streamed-modeling")]
    env = os.environ | {"HF_HOME": str(saved / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", FRESH, *folders]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {folder: [[], [], []] for folder in folders}


def test_what_rests_in_a_file_already_is_linked(dense: Path, tmp_path: Path) -> None:
    model, _, source = load_streamed(dense / "llama", work=tmp_path / "work")
    new = copy_of(model, "new")
    change(new)
    store = store_of(new)
    assert store is not None
    written = [unit for unit in store.units if store.is_written(unit)]
    assert written == ["model.embed_tokens", "model.layers.0", "model.layers.2"]
    before = {path: path.stat().st_ino for path in (tmp_path / "work/new").iterdir()}
    save(new, tmp_path / "out", source=source)
    inodes = {path.stat().st_ino for path in (tmp_path / "out").glob("*.safetensors")}
    assert set(before.values()) < inodes
    assert {path: path.stat().st_ino for path in before} == before
    assert inodes == {path.stat().st_ino for path in (tmp_path / "work/new").iterdir()}  # the others were written there


def test_a_file_on_another_disk_is_copied(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    model, _, source = load_streamed(dense / "llama", work=tmp_path / "work")
    new, whole = copy_of(model, "new"), load_model(dense / "llama")[0]
    change(new)
    change(whole)
    save(new, tmp_path / "out", source=source)
    assert fingerprint(load_model(tmp_path / "out")[0]) == fingerprint(whole)


def test_no_more_than_a_unit_is_in_memory(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MODELS:
        model, _, source = load_streamed(dense / name, work=tmp_path / name)
        new = copy_of(model, "new")
        store = store_of(new)
        assert store is not None
        most: list[set[str]] = []
        load = Store._load

        def seen(self: Store, names: Any, most: Any = most, load: Any = load) -> None:
            load(self, names)
            most.append(set(self._counts))

        monkeypatch.setattr(Store, "_load", seen)
        save(new, tmp_path / f"{name}-out", source=source)
        monkeypatch.setattr(Store, "_load", load)
        units = [set(names) for names in store.units.values()]
        assert most
        assert all(any(loaded <= unit for unit in units) for loaded in most)
        assert store._counts == {}


def test_a_fingerprint_needs_no_whole_model(dense: Path, tmp_path: Path) -> None:
    for name in MODELS:
        model, _, _ = load_streamed(dense / name, work=tmp_path / name)
        new, whole = copy_of(model, "new"), load_model(dense / name)[0]
        assert fingerprint(model) == fingerprint(whole)
        change(new)
        change(whole)
        assert fingerprint(new) == fingerprint(whole) != fingerprint(model)


def test_weights_that_are_not_finite_are_found_where_they_rest(dense: Path, tmp_path: Path) -> None:
    model, _, _ = load_streamed(dense / "llama", work=tmp_path / "work")
    new = copy_of(model, "new")
    check_finite(new, "it")
    with held(new, "model.layers.1"), torch.no_grad():
        new.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = torch.nan
    with pytest.raises(SecateurError, match=r"it: NaN in the weights: model.layers.1.mlp.up_proj.weight \(1 of 1,536"):
        check_finite(new, "it")


def test_a_save_that_fails_leaves_nothing(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, source = load_streamed(dense / "mixtral", work=tmp_path / "work")
    new = copy_of(model, "new")
    change(new)
    fsync, calls = os.fsync, []

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SecateurError, match="No space left on device"):
        save(new, tmp_path / "out", source=source)
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    monkeypatch.undo()
    save(new, tmp_path / "out", source=source)
    whole = load_model(dense / "mixtral")[0]
    change(whole)
    assert fingerprint(load_model(tmp_path / "out")[0]) == fingerprint(whole)


def test_a_streamed_model_takes_no_constructor(dense: Path, tmp_path: Path) -> None:
    model, _, _ = load_streamed(dense / "llama", work=tmp_path / "work")
    with pytest.raises(SecateurError, match="saved without a constructor"):
        save(model, tmp_path / "out", constructor="somewhere:build")
