"""Models whose weights stay on disk: the same plan and weights as in memory, bit for bit, and after any kill."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCAB, tiny, tokens

import secateur
from secateur.choose.budget import Budget
from secateur.choose.plan import diff
from secateur.load.model import fingerprint, load_model
from secateur.load.store import Store, held, store_of
from secateur.load.streamed import load_streamed
from secateur.methods.verbs import Result

DRIVER = Path(__file__).with_name("kill_driver.py")
ROWS, EVAL = tokens(8, 16, seed=1), tokens(5, 16, seed=2)
THIN = {"hidden_size": 40, "intermediate_size": 48}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Checkpoints of several shards: plain, tied in bfloat16, with stacked experts, with a factor of hidden sizes."""
    top = tmp_path_factory.mktemp("checkpoints")
    made = {
        "llama": tiny("llama", dtype=torch.float32, num_hidden_layers=3),
        "tied": tiny("llama", dtype=torch.bfloat16, tie_word_embeddings=True),
        "mixtral": tiny("mixtral", dtype=torch.float32, num_local_experts=4),
        "gemma2": tiny("gemma2", dtype=torch.float32),
    }
    for name, model in made.items():
        model.save_pretrained(top / name, max_shard_size="60KB")
    return {name: top / name for name in made}


CASES: list[tuple[str, str, Any, dict[str, Any]]] = [
    ("mixtral", "wanda", "sparsity=50%", {}),
    ("llama", "sparsegpt", "n:m=2:4", {}),
    ("tied", "alps", "sparsity=60%", {}),
    ("llama", "magnitude", "sparsity=50%", {}),
    ("tied", "minitron", {**THIN, "num_attention_heads": 2, "num_key_value_heads": 2}, {}),
    ("mixtral", "minitron", {"num_local_experts": 3}, {"mend": "none"}),
    ("gemma2", "minitron", "params=80%", {"measure": False, "skip": ["layers"]}),
    ("tied", "minitron", {"num_hidden_layers": 1}, {"measure": False, "mend": "bias"}),
    ("tied", "flap", "params=85%", {}),
    ("tied", "obs", "params=85%", {"gradients": False}),
    ("tied", "depth", None, {"count": 1, "mend": "none", "proposals": 1}),
]


def both(folder: Path, work: Path, method: str, budget: Any, options: Mapping[str, Any]) -> tuple[Result, Result]:
    """The same run in memory and streamed."""
    dense, _, _ = load_model(folder)
    streamed, _, _ = load_streamed(folder, work=work)
    given: dict[str, Any] = {"method": method, "data": ROWS, "eval_data": EVAL, "batch_size": 3, **options}
    limit: Any = Budget() if budget is None else budget
    return secateur.prune(dense, limit, **given), secateur.prune(streamed, limit, **given)


def timeless(value: Any) -> Any:
    """A report without what takes time."""
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if key != "seconds"}
    return value


@pytest.mark.parametrize(
    ("name", "method", "budget", "options"), CASES, ids=[f"{c[1]}-{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_streamed_is_what_it_is_in_memory(
    folders: Mapping[str, Path], tmp_path: Path, name: str, method: str, budget: Any, options: dict[str, Any]
) -> None:
    memory, streamed = both(folders[name], tmp_path, method, budget, options)
    assert not diff(memory.plan, streamed.plan)
    assert memory.plan.origin == streamed.plan.origin  # the fingerprint, too
    assert timeless(memory.report) == timeless(streamed.report)
    store = store_of(streamed.model)
    assert store is not None
    with held(streamed.model):
        ours, theirs = dict(streamed.model.named_parameters()), dict(memory.model.named_parameters())
        assert ours.keys() == theirs.keys()
        assert [n for n in theirs if not torch.equal(ours[n], theirs[n])] == []
    assert fingerprint(streamed.model) == fingerprint(memory.model)
    with torch.no_grad():
        assert torch.equal(streamed.model(ROWS).logits, memory.model(ROWS).logits)


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """The most bytes of weights that were loaded at a time."""
    seen = {"now": 0, "most": 0}
    load, release = Store._load, Store._release

    def loaded(self: Store) -> int:
        return sum(self.parameters[name].nbytes for name in self._counts)

    def counted_load(self: Store, names: Any) -> None:
        before = loaded(self)
        load(self, names)
        seen["now"] += loaded(self) - before
        seen["most"] = max(seen["most"], seen["now"])

    def counted_release(self: Store, names: Any) -> None:
        before = loaded(self)
        release(self, names)
        seen["now"] += loaded(self) - before

    monkeypatch.setattr(Store, "_load", counted_load)
    monkeypatch.setattr(Store, "_release", counted_release)
    yield seen


@pytest.mark.parametrize(("method", "budget"), [("wanda", "sparsity=50%"), ("minitron", THIN)])
def test_no_more_is_loaded_than_a_block_of_each_model(
    tmp_path: Path, most: dict[str, int], method: str, budget: Any
) -> None:
    found = []
    for layers in (2, 4):
        folder = tmp_path / f"{layers}"
        tiny("llama", dtype=torch.float32, num_hidden_layers=layers).save_pretrained(folder)
        most |= {"now": 0, "most": 0}
        model, _, _ = load_streamed(folder, work=tmp_path / f"work{layers}")
        secateur.prune(model, budget, method=method, data=ROWS, batch_size=2)
        assert most["now"] == 0
        found.append(most["most"])
        store = store_of(model)
        assert store is not None
        block = sum(store.parameters[name].nbytes for name in store.units["model.layers.0"])
        assert found[-1] <= 2 * block + VOCAB * 48 * 4
    assert found[0] == found[1]


def command(folder: Path, out: Path, *words: str) -> list[str]:
    """A streamed run."""
    data = out.parent / "rows.npy"
    np.save(data, ROWS.numpy().astype(np.int32))
    reading = ["--data", str(data), "--seq-len", "16", "--batch-size", "3"]
    return ["prune", str(folder), "--out", str(out), *words, *reading, "--stream", "--json"]


@pytest.mark.parametrize(
    ("words", "kills"),
    [
        (["--method", "wanda", "--budget", "sparsity=50%"], 17),
        (["--method", "minitron", "--dims", json.dumps(THIN), "--no-measure"], 3),
    ],
)
def test_killed_anywhere_it_goes_on_to_the_same_files(
    folders: Mapping[str, Path], tmp_path: Path, words: list[str], kills: int
) -> None:
    out = tmp_path / "pruned"
    script = [
        sys.executable,
        str(DRIVER),
        json.dumps(command(folders["llama"], out, *words)),
        str(out),
        str(kills),
        "3",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, capture_output=True, text=True, env=environment, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] == kills
    assert found["differing"] == []
    assert min(found["again"]) < 0.8 * found["events"]  # a run that was nearly done is not done again
