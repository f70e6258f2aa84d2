"""The training loop: its arithmetic, what it keeps, and that a killed run goes on as if nothing had been."""

import copy
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import heal
import killed_runs
import pytest
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.load.batches import default_loss
from secateur.load.feed import feed_of
from secateur.train import Cubic, sparsify
from secateur.train.loop import Fitted, Work, fit, recomputing
from secateur.train.objective import Plain
from secateur.train.optimize import optimizers_of, rate_at
from secateur.train.settings import Training


def fitted(model: nn.Module, data: Any, steps: int, *, batch_size: int = 4, loss: Any = None, **options: Any) -> Fitted:
    given = {name: options.pop(name) for name in list(options) if name in Work.__dataclass_fields__}
    settings = Training(**{"lr": 0.01, "warmup": 0, **options})
    work = Work(settings=settings, steps=steps, rate=settings.lr or 0.0, **given)
    return fit(model, Plain(loss or default_loss), feed_of(data, batch_size=batch_size, seed=settings.seed), work)


def close(a: nn.Module, b: nn.Module, tolerance: float = 1e-6) -> bool:
    return all(
        torch.allclose(p, q, atol=tolerance, rtol=1e-4) for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


def test_accumulation_is_a_larger_batch() -> None:
    one, two = heal.llama(), heal.llama()
    fitted(one, heal.rows(12), 3, batch_size=4, optimizer="sgd")
    done = fitted(two, heal.rows(12), 3, batch_size=2, accumulate=2, optimizer="sgd")
    assert done.steps == 3
    assert close(one, two)
    assert not close(one, heal.llama(), 1e-4)


def test_one_step_by_hand() -> None:
    """AdamW with clipping, in plain torch."""
    model, other, ids = heal.llama(), heal.llama(), heal.rows(4)
    done = fitted(model, ids, 1, clip=0.1, weight_decay=0.5)
    loss = other(ids, labels=ids).loss
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in other.parameters()))
    assert done.history[-1]["train"]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert done.history[-1]["train"]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    with torch.no_grad():
        for name, p in other.named_parameters():
            g = p.grad * 0.1 / norm
            if p.dim() > 1 and "embed" not in name and "lm_head" not in name:
                p.mul_(1 - 0.01 * 0.5)
            p.sub_(0.01 * g / (g.abs() + 1e-8))
    assert close(model, other, 1e-5)


def test_rates_by_hand() -> None:
    linear = Training(warmup=3, lr_end=0.2)
    assert [rate_at(s, 8, linear) for s in range(8)] == pytest.approx([0.25, 0.5, 0.75, 1, 0.8, 0.6, 0.4, 0.2])
    cosine = Training(warmup=0, lr_end=0.0, decay="cosine")
    assert [rate_at(s, 5, cosine) for s in range(5)] == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0])
    constant = Training(warmup=1, decay="constant")
    assert [rate_at(s, 3, constant) for s in range(3)] == [0.5, 1, 1]
    assert rate_at(0, 1, Training()) == 0.5
    own = [rate_at(s, 2000, Training()) for s in range(2000)]  # warm-up of 100 by default
    assert own.index(max(own)) == 100
    assert own[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_what_is_decayed(optimizer: Any) -> None:
    model, extra = heal.llama(), nn.Linear(2, 2)
    found = optimizers_of(model, extra, [], Training(optimizer=optimizer, weight_decay=0.1), 1e-3, 0.0)
    groups = [group for one in found for group in one.param_groups]
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    free = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names == {n for n, p in model.named_parameters() if p.dim() > 1 and ".layers." in n}
    assert decayed | free == {id(p) for p in [*model.parameters(), *extra.parameters()]}
    assert not decayed & free
    if optimizer == "muon":
        assert {id(p) for p in found[0].param_groups[0]["params"]} == decayed


def test_muon_without_matrices() -> None:
    model = heal.llama()
    for p in model.parameters():
        p.requires_grad_(p.dim() == 1)
    with pytest.raises(SecateurError, match="muon is for matrices"):
        optimizers_of(model, None, [], Training(optimizer="muon"), 1e-3, 0.0)
    model.requires_grad_(requires_grad=False)
    with pytest.raises(SecateurError, match="no parameter of the model takes gradients"):
        optimizers_of(model, None, [], Training(), 1e-3, 0.0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_helps(optimizer: Any, precision: Any) -> None:
    model, ids = heal.llama(), heal.rows(4)
    done = fitted(model, ids, 12, optimizer=optimizer, precision=precision, eval_every=1)
    losses = [entry["train"]["loss"] for entry in done.history[1:]]
    assert losses[-1] < losses[0] - 0.05
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "net"])
def test_recomputing_changes_nothing(kind: str) -> None:
    models = [heal.llama() if kind == "llama" else heal.net() for _ in range(2)]
    data: Any = heal.rows(8) if kind == "llama" else [heal.pictures(8)]
    for model, recompute in zip(models, (False, True), strict=True):
        fitted(model, data, 3, recompute=recompute)
    one, two = (m.state_dict() for m in models)  # running statistics too: they are taken once
    assert all(torch.allclose(one[n].double(), two[n].double(), atol=1e-6) for n in one)


def test_recomputing_keeps_no_activations_and_leaves_no_trace() -> None:
    model = heal.net().train()
    calls = []
    own = model.blocks[0].forward

    def before(x: torch.Tensor) -> Any:
        calls.append(1)
        return own(x)

    model.blocks[0].forward = before
    with recomputing(model):
        model(heal.pictures()[0]).sum().backward()
    assert len(calls) == 2
    assert model.blocks[0].forward is before
    assert "forward" not in model.blocks[1].__dict__


def metric(values: list[float]) -> dict[str, Any]:
    """A measure that gives one value after the other."""
    left = iter(values)
    return {"measure": lambda model: {"m": next(left)}, "key": lambda: "m", "eval_every": 1}


@pytest.mark.parametrize(("keep", "best"), [("best", 2), ("last", 5)])
def test_the_best_or_the_last_is_kept(keep: Any, best: int) -> None:
    model, ids = heal.llama(), heal.rows(4)
    done = fitted(model, ids, 5, keep=keep, **metric([9, 8, 1, 7, 6, 5]))
    assert (done.best, done.steps, done.stopped) == (best, 5, "all 5 steps are done")
    assert [entry["held_out"]["m"] for entry in done.history] == [9, 8, 1, 7, 6, 5]
    other = heal.llama()
    snapshots: list[Any] = []
    fitted(other, ids, 5, **noting(snapshots))
    assert heal.same(model, snapshots[best])
    higher = heal.llama()
    done = fitted(higher, ids, 5, **metric([0, 8, 1, 9, 6, 5]), higher_is_better=lambda: True)
    assert done.best == 3


def test_patience() -> None:
    done = fitted(heal.llama(), heal.rows(4), 9, patience=2, **metric([9, 3, 4, 2, 5, 2, 1, 0]))
    assert (done.steps, done.best, done.diverged) == (5, 3, False)
    assert done.stopped == "step 5: 2 evaluations without a better one"


def test_evaluations_are_where_they_were_asked_for() -> None:
    done = fitted(heal.llama(), heal.rows(4), 7, **{**metric([9.0] * 9), "eval_every": 3})
    assert [entry["step"] for entry in done.history] == [0, 3, 6, 7]


def test_growing_sparsity_is_not_undone_by_a_dense_best() -> None:
    model = heal.net()
    sparsity = sparsify(model, "sparsity=50%", schedule=Cubic(begin=1, end=4))
    done = fitted(model, [heal.pictures(8)], 6, sparsity=sparsity, **metric([0, 1, 2, 3, 7, 6, 8]))
    assert done.best == 5
    sparsity.finalize()
    weights = [p for name, p in model.named_parameters() if p.dim() > 1]
    zeros = sum(int((p == 0).sum()) for p in weights)
    assert zeros == pytest.approx(0.5 * sum(p.numel() for p in weights), abs=len(weights))


def spoilt(what: str) -> Any:
    """A loss whose fourth value or gradient is not finite."""
    count = 0

    def loss(model: Any, batch: Any) -> Any:
        nonlocal count
        count += 1
        found = default_loss(model, batch)
        if count == 4 and what == "loss":
            return found * math.nan
        if count == 4 and what == "gradient":  # the slope of a square root at 0
            return found + (model.fc.weight * 0).sum().sqrt()
        return found

    return loss


@pytest.mark.parametrize(
    ("what", "best", "says"),
    [
        ("loss", 2, "step 4 of 6: the loss is nan"),
        ("gradient", 2, "step 4 of 6: the gradient is nan"),
        ("weights", 0, "step 2 of 6: there are weights that are not finite"),
        ("held-out", 2, "step 4 of 6: m on held-out data is nan"),
    ],
)
@pytest.mark.parametrize("folder", [True, False])
def test_divergence_leaves_the_best(what: str, best: int, says: str, folder: bool, tmp_path: Path) -> None:
    model = heal.net()
    extra: dict[str, Any] = {"folder": tmp_path if folder else None}
    if what == "weights":
        for p in model.parameters():
            p.requires_grad_(p is model.fc.weight)
        extra |= {"lr": 1e35, "weight_decay": 1e9, "decay": "constant", "loss": lambda m, b: m.fc.weight.tanh().sum()}
    if what == "held-out":
        extra |= metric([2, 1, math.nan])
    done = fitted(model, [heal.pictures(8)], 6, **{"loss": spoilt(what), **extra, "eval_every": 2})
    assert done.stopped == f"{says}, the training has diverged: take a smaller lr"
    assert (done.diverged, done.best) == (True, best)
    assert all(p.grad is None for p in model.parameters())
    kept: list[Any] = []
    other = heal.net()
    if best:
        fitted(other, [heal.pictures(8)], 6, **noting(kept))
        assert heal.same(model, kept[2])
    else:
        assert heal.same(model, other)


def noting(kept: list[Any]) -> dict[str, Any]:
    """A measure that copies the model at every step."""

    def measure(model: Any) -> dict[str, float]:
        kept.append(copy.deepcopy(model))
        return {"m": 0.0}

    return {"measure": measure, "key": lambda: "m", "eval_every": 1}


# --- states ---


def stopped_at(folder: Path, step: int, model: nn.Module | None = None, **options: Any) -> Any:
    """A run that ends before its time, with its state in the folder."""

    def loss(own: nn.Module, batch: Any) -> torch.Tensor:
        loss.left -= 1  # type: ignore[attr-defined]
        if loss.left < 0:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return default_loss(own, batch)

    loss.left = step  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        fitted(model or heal.net(), heal.loader(), 6, folder=folder, loss=loss, save_every=1, **options)


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    stopped_at(tmp_path, 3, identity={"lr": 0.01, "data": "a", "steps": 6})
    with pytest.raises(SecateurError) as error:
        fitted(heal.net(), heal.loader(), 6, folder=tmp_path, identity={"lr": 0.01, "data": "b", "steps": 7})
    assert str(error.value) == (
        f'{tmp_path} holds a run that was cut off, with data "a", and this one has "b": run it as it was, or remove '
        "that folder to begin anew"
    )
    done = fitted(heal.net(), heal.loader(), 6, folder=tmp_path, identity={"lr": 0.01, "data": "a", "steps": 6})
    assert (done.resumed, done.steps) == (3, 6)


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
@pytest.mark.parametrize("name", ["state.pt", "best.pt"])
def test_a_damaged_state_is_told(name: str, damage: str, tmp_path: Path) -> None:
    given = metric([2, 1, 3, 4, 5, 6, 7, 8, 9])
    stopped_at(tmp_path, 3, **given)
    content = (tmp_path / name).read_bytes()
    new = {"cut": content[: len(content) // 2], "noise": b"noise" + content[5:900], "empty": b""}[damage]
    (tmp_path / name).write_bytes(new)
    with pytest.raises(
        SecateurError, match=rf"{name}: the state of the run cannot be read, the file is damaged"
    ) as error:
        fitted(heal.net(), heal.loader(), 6, folder=tmp_path, save_every=1, **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_full_disk_leaves_the_state_before(kind: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_at(tmp_path, 3)
    before = (tmp_path / "state.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(kind))
        with pytest.raises(SecateurError, match="the state of the run cannot be saved") as error:
            fitted(heal.net(), heal.loader(), 6, folder=tmp_path, save_every=1)
    assert "make room and run it again" in str(error.value)
    assert (tmp_path / "state.pt").read_bytes() == before
    assert not list(tmp_path.rglob("*.new"))
    assert fitted(heal.net(), heal.loader(), 6, folder=tmp_path, save_every=1).resumed == 3


_FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import heal, torch
from secateur.errors import SecateurError
from secateur.methods.healing import finetune
folder = Path(sys.argv[1])
given = dict(steps=6, lr=0.01, work=folder, save_every=1, loss=None)
class Stop(Exception): pass
def track(items, what):
    for item in items:
        if item == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        yield item
try:
    finetune(heal.net(), heal.loader(), track=track, **given)
except SecateurError as error:
    print("said:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("left:", sorted(p.name for p in folder.rglob("*.new")))
print("resumed:", finetune(heal.net(), heal.loader(), **given).report["resumed"])
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _FULL, str(tmp_path / "run"), str(Path(heal.__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "said:" in done.stdout
    assert "cannot be saved" in done.stdout
    assert "left: []\nresumed: 3" in done.stdout


def test_metrics_are_lines_of_json_and_a_board(tmp_path: Path) -> None:
    reader: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")

    stopped_at(tmp_path, 4, **metric([2, 1, 3, 4, 5, 6]))
    done = fitted(heal.net(), heal.loader(), 6, folder=tmp_path, save_every=1, **metric([6, 7, 8, 9]))
    assert done.resumed == 4
    assert done.logs == ["tensorboard"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(done.history)
    assert [line["step"] for line in lines] == list(range(7))
    board = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    events = {name: {e.step: e.value for e in board.Scalars(name)} for name in board.Tags()["scalars"]}
    assert set(events) == {"train/loss", "train/lr", "train/grad_norm", "held-out/m"}
    assert events["held-out/m"] == {0: 2, 1: 1, 2: 3, 3: 4, 4: 5, 5: 6, 6: 7}
    assert events["train/loss"][2] == pytest.approx(lines[2]["train"]["loss"], rel=1e-6)


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SecateurError, match="wandb=prunes: Weights & Biases is not installed; pip install wandb"):
        fitted(heal.net(), heal.loader(), 2, wandb="prunes")
    (tmp_path / "wandb.py").write_text(
        "seen = []\n"
        "class Run:\n"
        "    def log(self, numbers, step): seen.append((step, numbers))\n"
        "    def finish(self): seen.append('finished')\n"
        "def init(**given): seen.append(given); return Run()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    done = fitted(heal.net(), heal.loader(), 2, wandb="prunes", **metric([3, 2, 1]))
    seen = sys.modules.pop("wandb").seen
    assert seen[0]["project"] == "prunes"
    assert (0, {"held-out/m": 3}) in seen
    assert [s for s, n in seen[1:-1] if "train/loss" in n or "loss" in n] == [1, 2]
    assert seen[-1] == "finished"
    assert done.logs == ["wandb"]


# --- killed runs ---


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of all runs that were killed and run again."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, str(Path(killed_runs.__file__)), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", killed_runs.CASES)
def test_a_killed_run_ends_as_an_undisturbed_one(case: str, killed: Path) -> None:
    """Killed by SIGKILL, once or twice; the run that nothing disturbs is this process's."""
    folder = killed / str(list(killed_runs.CASES).index(case))
    kills = len(killed_runs.KILLS.get(case, [5]))
    assert (folder / "ended").read_text() == " ".join(["-9"] * kills + ["0"])
    found = torch.load(folder / "result.pt", weights_only=False)
    assert found["report"]["resumed"]
    expected = killed_runs.CASES[case](None, None)
    assert found["report"]["history"] == expected.report["history"]
    state = expected.model.state_dict()
    assert list(found["model"]) == list(state)
    assert all(torch.equal(found["model"][name], state[name]) for name in state)
