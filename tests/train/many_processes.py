"""Training on several processes, for test_sharded_training: torchrun many_processes.py JOB FOLDER."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.fsdp import fully_shard

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

import heal  # noqa: E402  # from the folder above

from secateur import world  # noqa: E402
from secateur.cli import main as cli  # noqa: E402
from secateur.errors import SecateurError  # noqa: E402
from secateur.load.feed import feed_of  # noqa: E402
from secateur.methods.healing import cache_teacher, distill, finetune  # noqa: E402
from secateur.train import Cubic, sparsify  # noqa: E402

STEPS, STOP = 8, 5


def student(**options: Any) -> Any:
    """A smaller one than the teacher."""
    return heal.llama(seed=4, hidden_size=8, num_attention_heads=2, num_key_value_heads=1, **options)


def masked() -> Any:
    """A student with zeros."""
    model = student()
    with torch.no_grad():
        for p in model.model.layers.parameters():
            p.mul_(torch.rand(p.shape, generator=torch.Generator().manual_seed(3)) > 0.5)
    return model


def taught(model: Any = None, teacher: Any = None, **options: Any) -> Any:
    """Distil: 13 rows in batches of 5, held-out rows in one batch of 4 and one of 1."""
    given: dict[str, Any] = {"steps": 6, "lr": 0.01, "batch_size": 5, "eval_every": 3, **options}
    data = given.pop("data", None)
    held = list(torch.split(heal.rows(5, seed=9), 4))
    return distill(
        teacher or heal.llama(), model or student(), heal.rows(13) if data is None else data, eval_data=held, **given
    )


def tuned(model: Any, data: Any, **options: Any) -> Any:
    """Fine-tune."""
    return finetune(model, data, **{"steps": 4, "lr": 0.01, **options})


def cached(folder: Path | None) -> Any:
    """Distil from logits on disk."""
    place = Path(os.environ["CACHES"]) / str(world.size()) if folder is None else folder
    cache_teacher(heal.llama(), student(), heal.rows(13), cache=place, steps=6, batch_size=5)
    return distill(None, student(), heal.rows(13), cache=place, steps=6, lr=0.01, batch_size=5)


def heal_feed(count: int, batch_size: int) -> Any:
    """Rows of tokens in an order of their own."""
    return feed_of(heal.rows(count), batch_size=batch_size, seed=0)


def uneven() -> list[Any]:
    """Batches with padding, of other lengths each."""
    return [heal.padded(heal.rows(3, 6, seed=3)), heal.padded(heal.rows(4, 9, seed=5))]


class Experts(torch.nn.Module):
    """Each row goes to one of several layers; those that get none do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(75, 7) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, 7] of [B, 75]."""
        which = x[:, :5].argmax(1).tolist()
        return torch.stack([self.experts[number](row) for number, row in zip(which, x, strict=True)])


class Classifier(torch.nn.Module):
    """A classifier of pictures without batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Sequential(Experts(), torch.nn.Tanh())])
        self.fc = torch.nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> Any:
        """Logits [B, 5] of pictures [B, 3, 5, 5]."""
        return self.fc(self.blocks[0](x.flatten(1)))


def pictures() -> Any:
    """A random classifier."""
    torch.manual_seed(0)
    return Classifier()


SAME: dict[str, Callable[[], Any]] = {
    "adamw": taught,
    "hidden": lambda: taught(hidden=0.5, accumulate=2, recompute=True),
    "attention and ce": lambda: taught(attention=0.3, ce=0.5, clip=0.2),
    "tied": lambda: taught(student(tie_word_embeddings=True), optimizer="sgd", top_k=5),
    "lora": lambda: taught(**{"lora": 2}),
    "masked": lambda: taught(masked()),
    "half": lambda: taught(student().bfloat16(), heal.llama().bfloat16()),
    "experts": lambda: tuned(pictures(), [heal.pictures(3, seed=s) for s in range(4)], weight_decay=0.1),
    "cached": lambda: cached(None),
    "padded": lambda: tuned(student(), uneven(), eval_data=uneven()),
    "loader": lambda: tuned(pictures(), heal.loader(noisy=True), eval_data=[heal.pictures(6, seed=8)]),
    "muon": lambda: taught(optimizer="muon", steps=3),
    "bfloat16": lambda: taught(precision="bfloat16"),
}
"""Runs that end alike on any number of processes."""


class Stop:
    """A progress bar that ends the run at a step: by SIGKILL in the last process, or by a Ctrl-C in all."""

    def __init__(self, at: int | None, *, kills: Path | None = None) -> None:
        self.at, self.kills = at, kills

    def __call__(self, items: Any, what: str) -> Any:
        """Go on to the end, or not."""
        for item in items:
            if self.at is not None and what in ("training", "distilling") and item == self.at:
                if self.kills is None:
                    raise KeyboardInterrupt
                if world.rank() == world.size() - 1:
                    self.kills.write_text(str(time.time()))
                    os.kill(os.getpid(), signal.SIGKILL)
            yield item


def best_early(folder: Path | None, track: Any) -> Any:
    """A run whose best weights are those of step 2; whoever goes on later sees no better ones."""
    seen = []

    def evaluate(model: Any) -> float:
        del model
        seen.append(1)
        return float(len(seen) == 2 and not resumed)

    resumed = folder is not None and folder.exists()
    return finetune(
        student(), heal.rows(13), steps=STEPS, lr=0.01, batch_size=5, evaluate=evaluate, eval_every=2, work=folder,
        track=track, save_every=1,
    )  # fmt: skip


def stated(folder: Path | None, track: Any, **options: Any) -> Any:
    """A run with a state, maps between features, and an optimiser that knows of them."""
    return taught(**{"hidden": 0.5, "steps": STEPS, "work": folder, "track": track, "save_every": 1, **options})


def dropping(folder: Path | None, track: Any) -> Any:
    """The same with dropout."""
    return stated(folder, track, model=student(attention_dropout=0.2))


STATES: dict[str, Callable[[Path | None, Any], Any]] = {"stated": stated, "best": best_early}
"""Runs that go on on other numbers of processes."""


def command(folder: Path, out: Path) -> list[str]:
    """Distil from the command line."""
    said: dict[str, object] = {"teacher": folder / "teacher", "student": folder / "student", "out": out}
    said |= {"data": folder / "rows.npy", "eval-data": folder / "rows.npy", "batch-size": 3, "steps": 4}
    said |= {"seq-len": 8, "lr": 0.01}
    return ["distill", *(str(word) for name, value in said.items() for word in (f"--{name}", value)), "--json"]


def kept(healed: Any) -> Any:
    """What a test looks at."""
    state = healed.model.state_dict()
    return {"model": state if world.first() else {n: t.is_meta for n, t in state.items()}, "report": healed.report}


def refused(run: Callable[[], Any]) -> str:
    """The error of a run that must not begin."""
    try:
        run()
    except SecateurError as error:
        return str(error)
    return "nothing was said"


# --- jobs ---


def stop(folder: Path) -> None:
    """Runs that are cut off, the last one by the death of a process."""
    for name, run in STATES.items():
        try:
            run(folder / name, Stop(STOP))
        except KeyboardInterrupt:
            sys.stdout.write(f"cut off: {name}\n")
    try:
        dropping(folder / "dropping", Stop(STOP, kills=folder / "killed"))
    except SecateurError as error:
        (folder / "survivor").write_text(str(error))
        sys.exit(2)


def go_on(folder: Path) -> dict[str, Any]:
    """Run those that were cut off, by other numbers of processes or by as many."""
    return {name: kept(run(folder / str(world.size()) / name, Stop(None))) for name, run in STATES.items()}


def full(own: Path, where: Any, name: str, rank: int) -> str:
    """The error where the disk of a process is full."""
    with pytest.MonkeyPatch.context() as patch:
        if world.rank() == rank:
            patch.setattr(where, name, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        return refused(lambda: stated(own, Stop(None)))


def errors(folder: Path) -> dict[str, str]:
    """What is refused."""
    own = folder / "own"
    world.from_first(lambda: shutil.copytree(folder / "stopped" / "stated", own) and None)
    found = {"another lr": refused(lambda: stated(own, Stop(None), lr=0.02))}
    found["full disk"] = full(own, torch, "save", 0)
    found["full disk of another"] = full(own, FileSystemWriter, "write_data", 1)
    found["left"] = " ".join(sorted(path.name for path in own.iterdir()))
    world.from_first(lambda: (own / "state-5" / ".metadata").write_bytes(b"no") and None)
    found["damaged"] = refused(lambda: stated(own, Stop(None)))
    found["few rows"] = refused(lambda: taught(batch_size=1))
    found["few rows in a batch"] = refused(lambda: tuned(student(), [heal.rows(1), heal.rows(3, 5)]))
    found["few rows of a loader"] = refused(lambda: tuned(pictures(), heal.loader(batch_size=11)))
    found["batch norm"] = refused(lambda: tuned(heal.net(), heal.loader()))
    moving = sparsify(model := student(), "sparsity=50%", schedule=Cubic(begin=1, end=4))
    found["moving masks"] = refused(lambda: finetune(model, heal.rows(), sparsity=moving))
    found["wrapped"] = refused(lambda: taught(fully_shard(student())))
    found["other students"] = refused(lambda: taught(student(rms_norm_eps=1.0 + world.rank())))
    found["cached batches"] = refused(lambda: distill(heal.llama(), student(), uneven(), cache=folder / "no", steps=2))
    return found


def main() -> None:
    """Run a job."""
    torch.set_num_threads(1)
    job, folder = sys.argv[1], Path(sys.argv[2])
    with world.joined():
        if job == "stop":
            stop(folder)
            return
        found: dict[str, Any] = {"on": go_on(folder)}
        if job == "all":
            found["from one"] = {n: kept(run(folder / "one" / n, Stop(None))) for n, run in STATES.items()}
            found["dropping"] = kept(dropping(folder / "2" / "dropping", Stop(None)))
            found["undisturbed"] = kept(dropping(None, Stop(None)))
            found["same"] = {name: kept(run()) for name, run in SAME.items()}
            found["errors"] = errors(folder)
            found["command"] = cli(command(folder, folder / "by-two"))
        torch.save(found, folder / f"{world.size()}-{world.rank()}.pt")


if __name__ == "__main__":
    main()
