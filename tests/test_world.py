"""Several processes as one job: the same plans as one process, clear ends, and what each takes of the data."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mixtures import mixture
from tiny import VOCAB, tiny, tokens
from world_jobs import JOBS, STAGED, Found, staged_batches, staged_model

from secateur import world
from secateur.errors import SecateurError
from secateur.load.batches import Batch, run, size_of
from secateur.load.model import load_model
from secateur.load.shared import shared
from secateur.load.through import Watcher, whole_passes
from secateur.methods.pipeline import layers_per_stage
from secateur.score.activation import activation_scores
from secateur.score.fluctuation import fluctuation
from secateur.score.grams import grams_through
from secateur.space import discover
from secateur.space.weights import maskable

HERE = Path(__file__).parent
LIMIT = 240
"""Seconds after which a job hangs; on a quiet machine none takes 40."""


def torchrun(count: int, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parent / 'src'}"}
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), *meet, *words]
    return subprocess.run(launch, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=LIMIT)


# Four processes against one


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes made of all jobs."""
    folder = tmp_path_factory.mktemp("together")
    done = torchrun(4, folder, str(HERE / "world_jobs.py"), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_four_processes_make_the_plan_of_one(name: str, together: Path) -> None:
    alone, found = JOBS[name](), torch.load(together / f"{name}.pt")
    assert {key: found.get(key) for key in ("kept", "dropped")} == {key: alone.get(key) for key in ("kept", "dropped")}
    for kind in ("masks", "weights"):
        assert found.get(kind, {}).keys() == alone.get(kind, {}).keys()
    for weight, mask in alone.get("masks", {}).items():
        off = int((mask != found["masks"][weight]).sum())
        assert off <= (0 if name == "magnitude" else 2), f"{off} of {mask.numel()} differ in {weight}"
    for weight, tensor in alone.get("weights", {}).items():
        if name == "magnitude":
            assert torch.equal(tensor, found["weights"][weight]), weight
        else:
            torch.testing.assert_close(found["weights"][weight], tensor, rtol=1e-4, atol=1e-5)
    _close(found.get("told", {}), alone.get("told", {}), name)


def _close(found: Any, alone: Any, place: str) -> None:
    if isinstance(alone, Mapping):
        assert found.keys() == alone.keys(), place
        for key in alone:
            if key != "seconds":
                _close(found[key], alone[key], f"{place}: {key}")
    elif isinstance(alone, float):
        assert found == pytest.approx(alone, rel=1e-4, abs=1e-7), place
    else:
        assert found == alone, place


def test_the_jobs_do_something(together: Path) -> None:
    for name in ("minitron", "minitron search", "behind a mask", "obs", "depth", "bias"):
        found: Found = torch.load(together / f"{name}.pt")
        assert found["kept"] or found["dropped"], name
    assert torch.load(together / "minitron of a mixture.pt")["told"]["mend"]["weights"]


def test_processes_tell_each_other_everything(together: Path) -> None:
    every = torch.load(together / "words.pt")
    assert len(every) == 4
    for found in every:
        assert found["sums"][0].tolist() == [10, 10, 10]
        assert torch.equal(found["sums"][1], 4 * torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T)
        assert int(found["sums"][2]) == 6
        assert list(found["named"]) == ["all", "own 0", "own 1", "own 2", "own 3"]
        assert {name: x.tolist() for name, x in found["named"].items()} == {
            "all": [4, 4], "own 0": [0.5], "own 1": [1.5], "own 2": [2.5], "own 3": [3.5]
        }  # fmt: skip
        assert [x.tolist() for x in found["sent"]] == [[[True, True]], [[2.0, 2.0], [2.0, 2.0]], []]
        assert found["owners"] == [0, 2, 1, 2, 3]
        assert found["jobs"] == [[job, owner] for job, owner in enumerate(found["owners"])]
        assert found["first"] == "made by 0"
        assert found["errors"] == [
            "the disk is full",
            "NaN here (process 3 of 4)",
            "the same everywhere",
            "a third of the number is 0 in process 0 and 1 in process 3: all must be given the same",
            "too hot (process 1 of 4)",
        ]


@pytest.mark.parametrize("name", STAGED)
def test_stages_of_layers_give_the_scores_of_one_process(name: str, together: Path) -> None:
    model = staged_model(name)
    alone = activation_scores(model, discover(model), staged_batches())
    every = torch.load(together / f"{name}.staged")
    for found in every:
        assert found["axes"].keys() == alone.axes.keys()
        assert all(torch.equal(found["axes"][axis], alone.axes[axis]) for axis in alone.axes)
        assert (found["blocks"], found["tokens"]) == (dict(alone.blocks), alone.tokens)
    counts = STAGED[name][1] or [len(alone.blocks) // 4] * 4
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in model.get_decoder().layers]
    assert len(set(layers)) == 1
    assert [found["read"] for found in every] == [count * layers[0] for count in counts]


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, token rows and losses of the user's own."""
    found = tmp_path_factory.mktemp("commands")
    tiny("llama", dtype=torch.float32, num_hidden_layers=1).save_pretrained(found / "dense")
    tiny("llama", dtype=torch.float32, num_hidden_layers=3).save_pretrained(found / "three")
    np.save(found / "ids.npy", tokens(12, 16).numpy().astype(np.int32))
    np.save(found / "two.npy", tokens(2, 16).numpy().astype(np.int32))
    (found / "dying.py").write_text(
        "import os, signal\n"
        "calls = []\n"
        "def loss(model, batch):\n"
        "    calls.append(0)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return model(input_ids=batch, labels=batch, use_cache=False).loss\n"
    )
    return found


def test_two_processes_print_and_write_once(folder: Path, say: Any) -> None:
    words = ["--method", "wanda", "--budget", "sparsity=50%", "--batch-size", "2", "--json"]
    data = ["--data", "ids.npy", "--eval-data", "ids.npy"]
    done = torchrun(2, folder, "-m", "secateur", "prune", "dense", "--out", "two", *data, *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    data = ["--data", str(folder / "ids.npy"), "--eval-data", str(folder / "ids.npy")]
    alone = json.loads(say("prune", folder / "dense", "--out", folder / "one", *data, *words))
    assert found["calibration"] == alone["calibration"] == {"samples": 12}
    _close(found["measured"], alone["measured"], "measured")
    _close(found["sparsity"], alone["sparsity"], "sparsity")
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    assert not list(folder.glob(".*"))


def test_more_processes_than_samples_are_refused_once(folder: Path) -> None:
    words = ["--method", "gradnas", "--budget", "params=80%", "--data", "two.npy"]
    done = torchrun(3, folder, "-m", "secateur", "prune", "dense", "--out", "none", *words)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("error: ") == 1
    assert "error: the calibration data has 2 samples for 3 processes, and each needs one: give more" in done.stderr
    assert not (folder / "none").exists()


def test_a_killed_process_ends_the_job(folder: Path) -> None:
    begin = time.perf_counter()
    words = ["--budget", "params=80%", "--data", "ids.npy", "--batch-size", "2", "--loss", "dying:loss"]
    done = torchrun(2, folder, "-m", "secateur", "prune", "dense", "--out", "none", "--method", "gradnas", *words)
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert not (folder / "none").exists()
    assert not list(folder.glob(".*"))
    assert time.perf_counter() - begin < LIMIT / 2


def test_a_command_of_one_process_says_so(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "size", lambda: 2)
    monkeypatch.setattr(world, "check_same", lambda *_: None)
    said = "error: inspect runs in one process, and torchrun has started 2: run it without; prune"
    assert refused("inspect", "dense").startswith(said)


STAGE_WORDS = ["--dims", '{"num_hidden_layers": 2, "ffn": 40}', "--no-measure", "--mend", "none"]


def test_two_processes_hold_a_model_together(folder: Path, say: Any) -> None:
    words = [
        "--dims",
        '{"num_hidden_layers": 2, "ffn": 40}',
        "--no-measure",
        "--mend",
        "none",
        "--batch-size",
        "2",
        "--json",
    ]
    more = ["--data", "ids.npy", "--layers-per-stage", "1,2"]
    done = torchrun(2, folder, "-m", "secateur", "prune", "three", "--out", "staged", *words, *more)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pipeline"] == {"layers_per_stage": [1, 2]}
    say("prune", folder / "three", "--out", folder / "whole", *words, "--data", folder / "ids.npy")
    one, two = (load_model(folder / name)[0].state_dict() for name in ("whole", "staged"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("size", "words", "said"),
    [
        (2, ["--pipeline-stages", "3"], "makes 3 pipeline stages, and there are 2 processes.*--nproc_per_node 3"),
        (2, ["--layers-per-stage", "1,2,1"], "makes 3 pipeline stages, and there are 2 processes"),
        (2, ["--layers-per-stage", "1,two"], "'1,two' is no list of numbers, such as 3,5,5,3"),
        (1, ["--pipeline-stages", "1"], "makes 1 pipeline stages: give 2 or more"),
        (2, ["--pipeline-stages", "2", "--method", "wanda"], "wanda has no way to go by pipeline stages"),
        (2, ["--pipeline-stages", "2", "--eval-data", "ids.npy"], "leave out --eval-data"),
        (2, ["--pipeline-stages", "2", "--mend", "bias"], "give --mend none"),
        (3, ["--pipeline-stages", "3", "--layers-per-stage", "1,1"], "names 2 stages, and --pipeline-stages says 3"),
    ],
)
def test_stages_that_cannot_be_are_refused(
    size: int, words: list[str], said: str, folder: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "size", lambda: size)
    monkeypatch.setattr(world, "check_same", lambda *_: None)
    monkeypatch.chdir(folder)
    budget = STAGE_WORDS if "--mend" not in words else STAGE_WORDS[:-2]
    budget = ["--budget", "sparsity=50%"] if "wanda" in words else budget
    assert re.search(said, refused("prune", "dense", "--out", "none", "--data", "ids.npy", *budget, *words))


def test_layers_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "size", lambda: 3)
    assert layers_per_stage(8, 3, ()) == [3, 3, 2]
    assert layers_per_stage(8, None, (1, 5, 2)) == [1, 5, 2]
    for layers, counts, said in (
        (8, (3, 3, 3), "--layers-per-stage 3,3,3 are 9 layers, and the model has 8"),
        (8, (4, 0, 4), "stages of 4,0,4 layers: each must hold at least one of the 8"),
        (2, (), "stages of 1,1,0 layers: each must hold at least one of the 2"),
        (8, (4, 4), "2 pipeline stages and 3 processes: .* --nproc_per_node 2"),
    ):
        with pytest.raises(SecateurError, match=said):
            layers_per_stage(layers, None if counts else 3, counts)


# What each process takes


class _Seat:
    """Stands in for one of several processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        self.number = 0
        monkeypatch.setattr(world, "size", lambda: size)
        monkeypatch.setattr(world, "rank", lambda: self.number)
        monkeypatch.setattr(world, "_SPLIT", ContextVar("split", default="data"))


@pytest.mark.parametrize("lengths", [[2, 2, 2, 1], [8], [1] * 5, [3, 1, 4, 1, 5, 9, 2, 6], [2, 3], [7, 1, 1]])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_shares_are_all_there_is(lengths: Sequence[int], size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(sum(lengths))
    batches: list[Batch] = [{"input_ids": part[:, None], "other": (part,)} for part in torch.split(ids, list(lengths))]
    seat = _Seat(monkeypatch, size)
    counts, seen = [], []
    for seat.number in range(size):
        own: list[Any] = list(shared(batches))
        assert all(torch.equal(batch["input_ids"][:, 0], batch["other"][0]) for batch in own)
        counts.append(sum(map(size_of, own)))
        seen += [int(x) for batch in own for x in batch["input_ids"]]
    assert sorted(seen) == ids.tolist()
    assert min(counts) >= 1
    if len(set(lengths[: len(lengths) // size * size])) == 1:
        assert max(counts) - min(counts) <= 1 + max(lengths) - min(lengths)


def test_too_few_samples_are_refused_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seat = _Seat(monkeypatch, 4)
    for seat.number in range(4):
        with pytest.raises(SecateurError, match=r"has 3 samples for 4 processes.*start at most 3"):
            shared([torch.zeros(2, 5), torch.zeros(1, 5)])


def test_jobs_are_dealt_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    _Seat(monkeypatch, 2)
    assert world.dealt([1.0, 8.0, 3.0, 4.0]) == [1, 0, 1, 1]
    assert world.dealt([]) == []


def test_alone_nothing_is_split() -> None:
    with world.joined(), world.splitting(), world.as_one():
        assert (world.size(), world.first(), world.split()) == (1, True, False)
        assert shared([torch.ones(1, 2)])[0].shape == (1, 2)
        assert world.dealt([3.0, 1.0]) == [0, 0]
    with pytest.raises(SecateurError, match=r"^there is \w+$"), world.as_one():
        raise SecateurError("there is trouble")


# Sums that are kept in the middle and put back


def interrupted(model: Any, batches: Sequence[Batch], watcher: Watcher) -> None:
    """All batches; in the middle the sums are kept, others come in, and they are put back."""
    middle = len(batches) // 2
    for index, batch in enumerate(batches):
        if index == middle:
            kept = {name: x.clone() for name, x in watcher.state().items()}
            for other in (0, index):
                watcher.at(other)
                run(model, batches[other])
            watcher.restore(kept)
        watcher.at(None)
        run(model, batches[0])
        watcher.at(index)
        run(model, batch)
    watcher.at(None)
    run(model, batches[0])


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_sums_go_on_where_they_were(name: str) -> None:
    model = mixture(name, dtype=torch.float32) if name == "mixtral" else tiny(name)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, 6:] = 0
    ids = [tokens(seed=seed) for seed in range(4)]
    batches: list[Any] = [ids[0], {"input_ids": ids[1], "attention_mask": mask}, ids[2], ids[3][:1]]
    assert all(int(x.max()) < VOCAB for x in ids)
    space = discover(model)
    plain, found = (activation_scores(model, space, batches, through=how) for how in (whole_passes, interrupted))
    assert plain.axes.keys() == found.axes.keys()
    assert all(torch.equal(plain.axes[axis], found.axes[axis]) for axis in plain.axes)
    assert (plain.blocks, plain.samples, plain.tokens) == (found.blocks, found.samples, found.tokens)
    axes = [axis for axis in space.axes if axis.kind in ("ffn", "kv_groups", "expert_ffn")]
    assert axes
    one, other = (fluctuation(model, space, batches, axes, through=how) for how in (whole_passes, interrupted))
    assert all(torch.equal(one[axis], other[axis]) for axis in one)
    weights, parameters = maskable(model, None).chosen, dict(model.named_parameters())
    for full in (False, True):
        reads, again = (
            grams_through(model, batches, weights, parameters, full=full, **how)
            for how in ({}, {"through": interrupted})
        )
        assert [[r.weight.name for r in group] for group in reads] == [
            [r.weight.name for r in group] for group in again
        ]
        for a, b in ((a[0].gram, b[0].gram) for a, b in zip(reads, again, strict=True)):
            assert a is not None
            assert b is not None
            assert (a.rows, a.sums) == (b.rows, b.sums)
            assert torch.equal(a.squares, b.squares)
            assert not full or torch.equal(a.full(), b.full())
