"""Training on several processes: as one would, states that any number goes on from, one end for all when one dies."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import heal
import many_processes as many
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from secateur.cli import main
from secateur.errors import SecateurError
from secateur.train.shares import check_rows, rounds, shared

TIMEOUT = 240


def torchrun(processes: int, job: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a job of many_processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--monitor-interval", more.pop("poll", "1")]
    command = [*launch, str(Path(many.__file__)), job, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CACHES": str(folder / "caches"), **more}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """States of runs that were cut off, in one process and in two; of the latter a copy is kept in `stopped`."""
    base = tmp_path_factory.mktemp("sharded")
    for name, run in many.STATES.items():
        with pytest.raises(KeyboardInterrupt):
            run(base / "one" / name, many.Stop(many.STOP))
    heal.llama().save_pretrained(base / "teacher")
    many.student().save_pretrained(base / "student")
    np.save(base / "rows.npy", heal.rows(13).numpy())
    done = torchrun(2, "stop", base / "stopped", poll="5")
    (base / "death.json").write_text(json.dumps([done.returncode, done.stdout, done.stderr, time.time()]))
    for number in ("1", "2", "3"):
        shutil.copytree(base / "stopped", base / number)
    return base


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Any]:
    """What each of two processes ends with."""
    done = torchrun(2, "all", folder)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"2-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """What undisturbed runs in one process end with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHES", str(folder / "caches"))
        found = {name: many.kept(run()) for name, run in many.SAME.items()}
        return found | {name: many.kept(run(None, many.Stop(None))) for name, run in many.STATES.items()}


def check_close(found: Any, expected: Any, tolerance: float) -> None:
    """Weights, losses and measurements agree."""
    assert list(found["model"]) == list(expected["model"])
    for name, tensor in expected["model"].items():
        assert found["model"][name].dtype == tensor.dtype
        assert torch.allclose(found["model"][name], tensor, atol=tolerance, rtol=0), name
    for mine, theirs in zip(found["report"]["history"], expected["report"]["history"], strict=True):
        assert mine["step"] == theirs["step"]
        for part in ("train", "held_out"):
            assert mine.get(part, {}) == pytest.approx(theirs.get(part, {}), rel=100 * tolerance, abs=100 * tolerance)
    for key in ("lr", "steps", "best", "tokens", "settings", "masks"):
        assert found["report"][key] == expected["report"][key]


# Muon's iterations are in bfloat16, and so is a run in that precision; each sum is rounded in another order.
TOLERANCE = {"muon": 3e-3, "bfloat16": 2e-2, "half": 8e-3}


@pytest.mark.parametrize("case", many.SAME)
def test_two_processes_are_one(case: str, two: list[Any], alone: dict[str, Any]) -> None:
    check_close(two[0]["same"][case], alone[case], TOLERANCE.get(case, 3e-6))
    assert all(two[1]["same"][case]["model"].values())  # on the meta device


def test_zeros_are_held_and_dtypes_kept(two: list[Any]) -> None:
    before, after = many.masked().state_dict(), two[0]["same"]["masked"]["model"]
    names = [name for name, tensor in before.items() if ".layers." in name and tensor.dim() > 1]
    assert all(bool((after[name][before[name] == 0] == 0).all()) for name in names)
    assert two[0]["same"]["half"]["model"]["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", many.STATES)
@pytest.mark.parametrize("way", ["two on two", "one on two", "two on one", "two on three"])
def test_a_state_goes_on_on_any_number(
    way: str, name: str, folder: Path, two: list[Any], three: Any, alone: dict[str, Any]
) -> None:
    if way == "two on one":
        found = many.kept(many.STATES[name](folder / "1" / name, many.Stop(None)))
    else:
        found = {"two on two": two[0]["on"], "one on two": two[0]["from one"], "two on three": three}[way][name]
    assert found["report"]["resumed"] == many.STOP
    check_close(found, alone[name], 3e-6)
    assert found["report"]["best"] == (2 if name == "best" else many.STEPS)


@pytest.fixture(scope="module")
def three(folder: Path) -> Any:
    """What three processes end with that go on from two."""
    done = torchrun(3, "on", folder)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "3-0.pt", weights_only=False)["on"]


def test_the_command_on_two_processes(folder: Path, two: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert [found["command"] for found in two] == [0, 0]
    assert main(many.command(folder, folder / "by-one")) == 0
    assert json.loads(capsys.readouterr().out)["distillation"]["steps"] == 4
    found, expected = (load_file(folder / name / "model.safetensors") for name in ("by-two", "by-one"))
    assert list(found) == list(expected)
    assert all(torch.allclose(found[name], tensor, atol=3e-6, rtol=0) for name, tensor in expected.items())
    assert not torch.equal(
        found["lm_head.weight"], load_file(folder / "student" / "model.safetensors")["lm_head.weight"]
    )
    names = [{p.name.partition(".2")[0] for p in (folder / name).iterdir()} for name in ("by-two", "by-one")]
    assert {n.partition("tfevents")[0] for n in names[0]} == {n.partition("tfevents")[0] for n in names[1]}
    assert not (folder / "by-two.training").exists()


def test_as_many_processes_go_on_to_the_same_bits(two: list[Any]) -> None:
    """With dropout, after the death of one of them."""
    found, expected = two[0]["dropping"], two[0]["undisturbed"]
    assert found["report"]["resumed"] == many.STOP
    assert found["report"]["history"] == expected["report"]["history"]
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in expected["model"].items())


def test_folders_of_states_are_whole_and_few(folder: Path, two: list[Any]) -> None:
    del two
    stopped = {path.name for path in (folder / "stopped" / "best").iterdir()}
    assert stopped == {"state-5", "best-2", "metrics.jsonl", "tensorboard"}
    assert {path.name for path in (folder / "one" / "best").iterdir()} >= {"state-8", "best.pt", "metrics.jsonl"}
    assert not (folder / "one" / "best" / "state.pt").exists()
    lines = (folder / "stopped" / "best" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 4]


def test_the_death_of_a_process_ends_all(folder: Path) -> None:
    code, out, err, ended = json.loads((folder / "death.json").read_text())
    assert code != 0
    assert "cut off: best" in out
    assert "exitcode  : -9" in err
    assert ended - float((folder / "stopped" / "killed").read_text()) < 30
    said = (folder / "stopped" / "survivor").read_text()
    assert said.startswith(
        "process 0 of 2 waits for another one that has ended or hangs; look at the error of that one"
    )


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("another lr", "holds a run that was cut off, with lr 0.01, and this one has 0.02"),
        ("damaged", "state-5: the state of the run cannot be read, it is damaged"),
        (
            "full disk",
            "the state of the run cannot be saved ([Errno 28] No space left on device); the one saved before",
        ),
        ("full disk of another", "the state of the run cannot be saved ([Errno 28] No space left on device); the one"),
        ("left", "best-3 metrics.jsonl state-5 tensorboard"),
        ("wrapped", "the student is a FSDPLlamaForCausalLM, set up for several processes already: give the plain"),
        ("few rows", "a batch of 1 row is smaller than the number of processes, 2, and each of them needs a row: give"),
        ("few rows in a batch", "a batch of 1 row is smaller than the number of processes, 2"),
        ("few rows of a loader", "a batch of 1 row is smaller than the number of processes, 2"),
        ("batch norm", "blocks.0.1 is a batch norm, whose statistics would be of the rows of one process alone"),
        ("moving masks", "masks that move need whole weights"),
        ("other students", "model is not the same in all processes"),
        ("cached batches", "cache: batches of different shapes are cached whole"),
    ],
)
def test_what_is_refused(what: str, says: str, two: list[Any]) -> None:
    for rank in range(2):
        assert says in two[rank]["errors"][what]


def test_shares_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    feed: Any = many.heal_feed(13, 5)
    assert shared(feed) is feed
    assert rounds(3) == [(0, True), (1, True), (2, True)]
    whole: list[Any] = [next(feed.batches(n)) for n in range(6)]
    found: list[Any] = [[] for _ in whole]
    for rank in range(3):
        monkeypatch.setattr("secateur.world.size", lambda: 3)
        monkeypatch.setattr("secateur.world.rank", lambda rank=rank: rank)
        batches: Any = shared(feed).batches(2)
        for own in found[2:]:
            own.append(next(batches))
        assert rounds(4) == [(rank, True), (3, rank == 0)]
        assert rounds(2) == [(min(rank, 1), rank < 2)]
    for (rows, numbers), own in zip(whole[2:], found[2:], strict=True):
        assert torch.equal(torch.cat([part for part, _ in own]), rows)
        assert sum((part for _, part in own), ()) == numbers
        assert [len(part) for part, _ in own] == [1, 2, 2]
    with pytest.raises(SecateurError, match="a batch of 2 rows is smaller than the number of processes, 3"):
        check_rows(2)
