"""Everything the zoo asks of one architecture: what can be cut, and whether each cut gives the right model."""

import importlib
import json
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import oracle
import torch
import transformers_zoo
from outputs import outputs
from safetensors.torch import save_file

import secateur
from secateur import SecateurError
from secateur.choose.plan import Kept, Plan
from secateur.cut.prove import discover
from secateur.space import Axis, Space
from secateur.space.inputs import example_inputs

BLOCK_KINDS = ("layers", "attention", "mlp")
SHARE = 0.25
PLAIN = "plain/"


def names() -> list[str]:
    """Everything in the zoo."""
    return [*(PLAIN + name for name in _plain_models()), *transformers_zoo.ARCHITECTURES]


def _plain_models() -> Mapping[str, Callable[[], tuple[Any, Any]]]:
    try:
        return importlib.import_module("plain_models").MODELS  # type: ignore[no-any-return]
    except ImportError:
        return {}


def examine(name: str, folder: Path | None = None, quick: bool = False) -> dict[str, Any]:
    """The record of one architecture: status, kinds, what is frozen, and a record for each cut.

    Args:
        name: of the architecture, with "plain/" before those that are not of transformers.
        folder: where cut models are saved for `reload`; None does not save.
        quick: try the kinds alone only where the cut of all at once fails.
    """
    record: dict[str, Any] = {"name": name, "status": "pass", "cuts": []}
    step = "build"
    try:
        if name.startswith(PLAIN):
            model, inputs = _plain_models()[name.removeprefix(PLAIN)]()
            model, given = model.eval(), True
        else:
            model, given = transformers_zoo.build(name), False
            inputs = example_inputs(model)
        record["parameters"] = sum(p.numel() for p in model.parameters())
        step = "discover"
        start = time.perf_counter()
        space = discover(model, inputs) if given else discover(model)
        record["discover_s"] = round(time.perf_counter() - start, 2)
    except SecateurError as error:
        return {**record, "status": "refused", "step": step, "message": str(error)}
    except Exception as error:  # noqa: BLE001  # a record, not a crash: the zoo goes on
        return {**record, "status": "error", "step": step, **_told(error)}
    record["kinds"] = {k: sorted({a.size for a in space.of_kind(k)}) for k in space.kinds()}
    record["kinds"] |= {k: [sum(b.kind == k for b in space.blocks)] for k in space.kinds() if k in BLOCK_KINDS}
    record["frozen"] = Counter(frozen.reason for frozen in space.frozen)
    real = randomised(inputs, model)
    record["faded"] = _faded(model, real, randomised(inputs, model, 6))
    for label, kinds in _cuts(space):
        plan = plan_for(space, kinds)
        if plan is None:
            continue
        if quick and label != "all" and record["cuts"] and record["cuts"][0]["status"] == "pass":
            break
        target = None if folder is None else folder / f"{name.replace('/', '+')}__{label}"
        record["cuts"].append({"cut": label, **_cut(name, model, space, plan, inputs if given else None, real, target)})
    worst = [c["status"] for c in record["cuts"]]
    record["status"] = next((s for s in ("wrong", "error", "refused") if s in worst), "pass" if worst else "nothing")
    return record


def _cuts(space: Space) -> Iterator[tuple[str, Sequence[str]]]:
    yield "all", space.kinds()
    if len(space.kinds()) > 1:
        yield from ((kind, [kind]) for kind in space.kinds())


def plan_for(space: Space, kinds: Sequence[str], seed: int = 1) -> Plan | None:
    """Cut a quarter of every axis of these kinds, and drop one block of each kind of block; None if nothing can go."""
    generator = torch.Generator().manual_seed(seed)
    kept = {
        a.name: Kept(a.kind, a.size, _units(a, generator)) for a in space.axes if a.kind in kinds and a.per_group > 1
    }
    dropped: list[str] = []
    for kind in kinds:
        own = [b for b in space.blocks if b.kind == kind and not b.name.startswith(tuple(f"{d}." for d in dropped))]
        if kind == "layers":
            stacks = Counter(b.stack for b in own)
            own = [b for b in own if stacks[b.stack] > 1]
        if kind in BLOCK_KINDS and own:
            dropped.append(own[-1 if kind == "mlp" else 0].name)  # of layers that are not the same
    return Plan(kept, tuple(dropped)) if kept or dropped else None


def _units(axis: Axis, generator: torch.Generator) -> tuple[int, ...]:
    keep = max(axis.per_group - max(1, round(axis.per_group * SHARE)), getattr(axis, "minimum", 1))
    units: list[int] = []
    for group in range(axis.groups):
        units += (torch.randperm(axis.per_group, generator=generator)[:keep] + group * axis.per_group).tolist()
    return tuple(sorted(units))


def _cut(
    name: str, model: Any, space: Space, plan: Plan, inputs: Any, real: Any, target: Path | None
) -> dict[str, Any]:
    result: dict[str, Any] = {"status": "pass", "axes": len(plan.kept), "dropped": len(plan.dropped)}
    step = "apply"
    try:
        start = time.perf_counter()
        cut = secateur.apply(model, plan, space=space, inputs=inputs)
        result["cut_s"] = round(time.perf_counter() - start, 2)
        result["parameters"] = sum(p.numel() for p in cut.parameters())
        step = "oracle"
        result["error"] = oracle.check(model, cut, space, plan, real)
        step = "backward"
        _backward(cut, model, real)
    except SecateurError as error:
        return {**result, "status": "refused", "step": step, "message": str(error)}
    except oracle.MismatchError as error:
        return {**result, "status": "wrong", "step": step, "message": str(error)}
    except Exception as error:  # noqa: BLE001  # a record, not a crash
        return {**result, "status": "error", "step": step, **_told(error)}
    if target is not None:
        result |= _saved(name, cut, plan, real, target)
    return result


def _saved(name: str, cut: Any, plan: Plan, real: Any, target: Path) -> dict[str, Any]:
    options = {"constructor": f"plain_models:{name.removeprefix(PLAIN)}"} if name.startswith(PLAIN) else {}
    try:
        secateur.save(cut, target, plan=plan, **options)  # type: ignore[arg-type]
    except SecateurError as error:
        return {"save": "refused", "save_message": str(error)}
    except Exception as error:  # noqa: BLE001  # a record, not a crash
        return {"save": "error", **{f"save_{k}": v for k, v in _told(error).items()}}
    expect = target.with_name(target.name + ".expect")
    expect.mkdir()
    with torch.no_grad():
        wanted = outputs(cut, real)
    given = real if isinstance(real, Mapping) else {str(i): v for i, v in enumerate(real)}
    tensors = {f"in:{k}": v for k, v in given.items() if isinstance(v, torch.Tensor)}
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, expect / "inputs.safetensors")
    save_file({str(i): v.contiguous().clone() for i, v in enumerate(wanted)}, expect / "outputs.safetensors")
    rest = {k: v for k, v in given.items() if not isinstance(v, torch.Tensor)}
    about = {"class": type(cut).__name__, "rest": rest, "positional": not isinstance(real, Mapping)}
    (expect / "about.json").write_text(json.dumps(about))
    return {"save": "saved"}


def _faded(model: Any, one: Any, other: Any) -> bool:
    """Whether the model gives the same for different inputs: then it says nothing about a cut."""
    with torch.no_grad():
        pairs = list(zip(outputs(model, one), outputs(model, other), strict=True))
    return all(bool((a - b).abs().max() <= 1e-5 * a.abs().max()) for a, b in pairs if a.shape == b.shape)


def _backward(cut: Any, dense: Any, real: Any) -> None:
    gradients = _gradients(cut, real)
    finite = all(bool(torch.isfinite(g).all()) for g in gradients)
    if not gradients or (not finite and all(bool(torch.isfinite(g).all()) for g in _gradients(dense, real))):
        raise oracle.MismatchError("the backward pass gives gradients that are not finite")


def _gradients(model: Any, real: Any) -> list[torch.Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = torch.stack([(x.double().clamp(-1e6, 1e6) ** 2).sum() for x in outputs(model, real)]).sum()
    return [g for g in torch.autograd.grad(loss, trained, allow_unused=True) if g is not None]


def _told(error: BaseException) -> dict[str, Any]:
    where = traceback.extract_tb(error.__traceback__)
    ours = next((f for f in reversed(where) if "secateur" in f.filename), where[-1])
    line = f"{Path(ours.filename).name}:{ours.lineno}"
    first = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
    return {"message": f"{type(error).__name__} at {line}: {first}", "trace": traceback.format_exc()[-3000:]}


def randomised(inputs: Any, model: Any, seed: int = 5) -> Any:
    """The same inputs with real contents: random tokens where there is no special one, random numbers."""
    generator = torch.Generator().manual_seed(seed)
    if not isinstance(inputs, Mapping):
        return tuple(_random("", value, model, generator) for value in inputs)
    return {name: _random(name, value, model, generator) for name, value in inputs.items()}


def _random(name: str, value: Any, model: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
    if name.endswith("input_ids"):
        config = getattr(model, "config", None)
        sizes = [getattr(c, "vocab_size", None) for c in (config, *vars(config).values()) if c is not None]
        most = min([s for s in sizes if isinstance(s, int)] or [100])
        special = {v for k, v in transformers_zoo.flat(config) if k.endswith(("_id", "_index")) and isinstance(v, int)}
        plain = torch.tensor([n for n in range(3, most) if n not in special])
        drawn = plain[torch.randint(0, len(plain), value.shape, generator=generator)]
        return torch.where(value == value.flatten()[0], drawn, value)
    if name == "bbox":
        corner = torch.randint(0, 50, (*value.shape[:-1], 2), generator=generator)
        return torch.cat([corner, corner + 10], -1)
    return value
