"""Prunes of tiny models, done alike by one process and by several; run by torchrun, it saves what came out."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mixtures import mixture
from tiny import tiny, tokens

from secateur import world
from secateur.errors import SecateurError
from secateur.load.store import store_of
from secateur.load.streamed import load_streamed
from secateur.methods.pipeline import Stages
from secateur.methods.verbs import Result, evaluate, prune
from secateur.score.activation import activation_scores
from secateur.space import discover
from secateur.walk import way

Found = dict[str, Any]
"""kept: axis -> units; dropped: blocks; masks, weights: by name; told: numbers of the report."""


def _found(result: Result, *told: str) -> Found:
    report: Any = result.report
    return {
        "kept": {name: list(kept.units) for name, kept in result.plan.kept.items()},
        "dropped": list(result.plan.dropped),
        "masks": {name: result.plan.masks[name].clone() for name in result.plan.masks},
        "weights": {name: p.detach().clone() for name, p in result.model.named_parameters()},
        "told": {name: report[name] for name in told},
    }


def _pruned(
    method: str,
    budget: str | dict[str, int],
    rows: int = 11,
    kind: str = "llama",
    told: tuple[str, ...] = (),
    **how: Any,
) -> Callable[[], Found]:
    def run() -> Found:
        model = mixture(kind, dtype=torch.float32) if kind == "mixtral" else tiny(kind, dtype=torch.float32)
        data = None if not rows else tokens(rows, 24)
        return _found(prune(model, budget, method=method, data=data, batch_size=2, **how), *told)

    return run


def _masked() -> Found:
    """Rows of different lengths, behind a mask, in batches of other sizes than the others."""
    ids, mask = tokens(5, 24), torch.ones(5, 24, dtype=torch.int64)
    mask[1, 20:], mask[4, 9:] = 0, 0
    batches = [{"input_ids": ids[a:b], "attention_mask": mask[a:b]} for a, b in ((0, 3), (3, 4), (4, 5))]
    model = tiny("llama", dtype=torch.float32)
    return _found(prune(model, {"ffn": 40, "layers": 1}, data=batches, mend="none", score_samples=5))


def _measured() -> Found:
    dense = tiny("llama", dtype=torch.float32)
    other = tiny("llama", dtype=torch.float32, seed=1)
    return {"told": evaluate(other, tokens(5, 24), against=dense, batch_size=2)}


JOBS: dict[str, Callable[[], Found]] = {
    "minitron": _pruned("minitron", {"ffn": 40, "hidden": 32, "heads": 2}, eval_data=tokens(6, 20, seed=9)),
    "minitron search": _pruned(
        "minitron",
        "params=75%",
        score_samples=6,
        divisors={"ffn": 8, "hidden": 8},
        mend="none",
        top_k=3,
    ),
    "minitron of a mixture": _pruned("minitron", {"experts": 4, "expert_ffn": 40}, kind="mixtral", told=("mend",)),
    "behind a mask": _masked,
    "wanda": _pruned("wanda", "sparsity=50%", told=("calibration",)),
    "wanda of a mixture": _pruned("wanda", "sparsity=50%", kind="mixtral", allocation="owl"),
    "obs": _pruned("obs", "params=80%", score_samples=6),
    "bias": _pruned("flap", "params=80%", mend="bias"),
    "depth": _pruned("depth", "params=80%", score_samples=6, told=("influence", "steps")),
    "magnitude": _pruned("magnitude", "sparsity=50%", rows=0),
    "evaluate": _measured,
}


STAGED: dict[str, tuple[dict[str, Any], list[int]]] = {
    "llama": ({"num_hidden_layers": 5}, [1, 2, 1, 1]),
    "mixtral": ({"num_hidden_layers": 4}, []),
}
"""Model -> options of its config, and layers of each of four stages; none = even."""


def staged_batches() -> list[Any]:
    """Of several shapes, one with a mask."""
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    ids = [tokens(2, 12, seed=seed) for seed in range(6)]
    return [*ids[:5], {"input_ids": ids[5], "attention_mask": mask}, tokens(1, 12, seed=20), tokens(2, 7, seed=21)]


def staged_model(name: str) -> Any:
    """A model that is to be shared out."""
    options: dict[str, Any] = STAGED[name][0]
    kind: Any = mixture if name == "mixtral" else tiny
    return kind(name, dtype=torch.float32, **options)


def staged(name: str, folder: Path) -> Found:
    """Scores of a model that the processes hold together, and the bytes of weights that this one has read."""
    if world.first():
        staged_model(name).save_pretrained(folder / name)
    world.check_all(None)
    model = load_streamed(folder / name, work=folder / f"work-{world.rank()}")[0]
    space = discover(model)
    with Stages(model, space, 4, STAGED[name][1]).opened():
        found = activation_scores(model, space, staged_batches(), through=way(model, "scores"))
    store: Any = store_of(model)
    return {"axes": dict(found.axes), "blocks": dict(found.blocks), "tokens": found.tokens, "read": store.read}


def words() -> Found:
    """What processes tell each other, of every kind."""
    rank = world.rank()
    sums = [torch.full((3,), rank + 1.0), torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T, torch.tensor(rank)]
    world.add_up(sums)
    named = {"all": torch.ones(2), f"own {rank}": torch.full((1,), rank + 0.5)}
    sent = [torch.tensor([[rank == 2, True]]), torch.full((2, 2), rank, dtype=torch.bfloat16).T, torch.empty(0)]
    world.send(sent, 2)
    with world.splitting():
        owners = world.dealt([5.0, 1.0, 4.0, 3.0, 3.0])
        own = {job: [torch.tensor([job, rank])] for job, owner in enumerate(owners) if owner == rank}
        jobs = [made[0].tolist() for made in world.handed_out(own, owners)]
    found = {"sums": sums, "named": world.add_up_named(named), "sent": sent, "owners": owners, "jobs": jobs}
    return found | {"first": world.from_first(lambda: f"made by {rank}"), "errors": _errors(rank)}


def _errors(rank: int) -> list[str]:
    def first() -> None:
        raise SecateurError("the disk is full")

    def each() -> None:
        with world.splitting(), world.as_one():
            if rank == 3:
                raise SecateurError("NaN here")

    def alike() -> None:
        with world.splitting(), world.as_one():
            raise SecateurError("the same everywhere")

    tried: list[Callable[[], None]] = [
        lambda: world.from_first(first),
        each,
        alike,
        lambda: world.check_same(rank // 3, "a third of the number"),
    ]
    tried.append(lambda: world.check_all("too hot" if rank in (1, 2) else None))
    told = []
    for trial in tried:
        try:
            trial()
        except SecateurError as error:
            told.append(str(error))
    return told


if __name__ == "__main__":
    torch.set_num_threads(1)
    with world.joined():
        if len(sys.argv) == 2:
            every = world.gathered(words())
            if world.first():
                torch.save(every, Path(sys.argv[1]) / "words.pt")
            for name in STAGED:
                every = world.gathered(staged(name, Path(sys.argv[1])))
                if world.first():
                    torch.save(every, Path(sys.argv[1]) / f"{name}.staged")
        for name, job in JOBS.items():
            if len(sys.argv) == 2 or name in sys.argv[2:]:
                found = job()
                same = [
                    torch.cat([x.double().flatten() for x in found.get("weights", {}).values()] or [torch.zeros(1)])
                ]
                world.check_same([x.sum().item() for x in same], f"the sum of all weights of {name}")
                if world.first():
                    torch.save(found, Path(sys.argv[1]) / f"{name}.pt")
