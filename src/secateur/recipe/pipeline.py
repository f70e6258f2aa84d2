"""A recipe that was checked: run step by step, saved whole or not at all."""

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.choose.plan import Plan
from secateur.errors import SecateurError
from secateur.load.constructor import build
from secateur.load.functions import call, is_constructor
from secateur.load.model import Source, fingerprint, load_model
from secateur.methods import MASKING
from secateur.progress import Track, quiet
from secateur.recipe.options import Calibration, HeldOut, Inputs, ModelName, at_least
from secateur.recipe.steps import STEPS, Made, Work, method_of
from secateur.ship import save
from secateur.ship.checkpoint import check_out


@dataclass(frozen=True)
class Step:
    """One step, checked.

    Attributes:
        name: In the table of steps.
        arguments: As its function takes them; what the whole recipe gives is filled in.
        said: The same as YAML values, for the report.
    """

    name: str
    arguments: Mapping[str, Any]
    said: Mapping[str, Any]


@dataclass(frozen=True)
class Finished:
    """What a recipe came to.

    Attributes:
        model: That of the last step, in evaluation mode.
        report: As report.json has it: model, each step with its options and what it reported, costs, seconds.
        plan: What stays of the dense model, where exactly one step prunes; it is saved beside the model.
    """

    model: nn.Module
    report: Mapping[str, Any]
    plan: Plan | None


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a recipe says beside its steps.

    Attributes:
        model: Folder or hub id of a Hugging Face model, or module:callable that builds any model.
        out: Folder to write.
        inputs: Example inputs for what is no Hugging Face model: module:function, or ``{shape: [[2, 3, 32, 32]]}``.
        data: Calibration data of all steps that say nothing else.
        eval_data: Held-out data, likewise.
        seed: Of everything that is drawn. Every step begins with it.
    """

    model: ModelName
    out: Path
    inputs: Inputs | None = None
    data: Calibration | None = None
    eval_data: HeldOut | None = None
    seed: Annotated[int, at_least(0)] = 0


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read and checked; see `load`.

    Attributes:
        head: What holds for all steps.
        steps: In their order.
        overwrite: Whether an old result may be replaced.
    """

    head: Head
    steps: Sequence[Step]
    overwrite: bool = False

    def run(self, *, track: Track = quiet, on_step: Callable[[Mapping[str, Any]], object] | None = None) -> Finished:
        """Run all steps, each on the model of the one before, and save the last model with the report.

        torch's random numbers start from the seed at every step, and are the caller's again afterwards.

        Args:
            track: shows progress.
            on_step: called with each step's entry of the report when it is done.

        Raises:
            SecateurError: for what only shows with the model at hand, as the steps do. Nothing is written then.
        """
        begin = time.perf_counter()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(self.head.seed)
            dense, tokenizer, source = _open(self.head.model)
            check_out(self.head.out, overwrite=self.overwrite, source=source)
            inputs = self._inputs(dense)
            model, entries, every = dense, [], []
            for number, step in enumerate(self.steps, start=1):
                torch.manual_seed(self.head.seed)
                start = time.perf_counter()
                work = Work(model, dense, self.head.model, self.head.seed, tokenizer, inputs, track)
                with _naming(number, step.name):
                    made = STEPS[step.name](work, **step.arguments)
                every.append((work, made))
                model = made.model.eval()
                seconds = time.perf_counter() - start
                told = {"step": step.name, "options": step.said, "size": _counts(model), **made.report}
                entries.append(told | {"seconds": seconds})
                if on_step is not None:
                    on_step(entries[-1])
            plans = [made.plan for _, made in every if made.plan is not None]
            plan = plans[0] if len(plans) == 1 and (plans[0].kept or plans[0].dropped or plans[0].masks) else None
            report = self._report(dense, every, entries, plan, source) | {
                "seconds": {"total": time.perf_counter() - begin}
            }
            scores = next((made.scores for _, made in every if made.scores is not None), None)
            built: dict[str, Any] = {"constructor": self.head.model, "arguments": {}} if source is None else {}
            save(
                model, self.head.out, plan=plan, scores=scores if plan is not None else None, source=source,
                tokenizer=tokenizer, report=report, overwrite=self.overwrite,
                **built,
            )  # fmt: skip
        return Finished(model, report, plan)

    def _inputs(self, model: nn.Module) -> Any:
        """Example inputs on the model's device and of its type; None where the model does without."""
        asked = self.head.inputs
        first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

        def placed(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return x.to(first.device, first.dtype if x.is_floating_point() else x.dtype)

        if asked is None:
            methods = {method_of(step.name, step.arguments) for step in self.steps} - {None, *MASKING}
            if methods and not hasattr(getattr(model, "config", None), "to_dict"):
                raise SecateurError(
                    f"{self.head.model} is no Hugging Face model, and {min(map(str, methods))} traces it: give the "
                    "recipe example inputs, such as inputs: {shape: [[1, 3, 32, 32]]}"
                )
            return None
        if isinstance(asked, str):
            return pytree.tree_map(placed, call(asked, "inputs", "my_data:example"))
        return tuple(placed(torch.zeros(tuple(shape))) for shape in asked["shape"])

    def _report(
        self,
        dense: nn.Module,
        every: Sequence[tuple[Work, Made]],
        entries: Sequence[Mapping[str, Any]],
        plan: Plan | None,
        source: Source | None,
    ) -> dict[str, Any]:
        """What was done, under the names that model cards and other reports have for it."""
        head, measured = self.head, None
        for work, made in every:
            if made.model is not work.model:
                measured = None  # it was about another model
            if made.model is work.model or work.model is dense:
                measured = made.report.get("measured", measured)
        pruned = [i for i, (_, made) in enumerate(every, start=1) if made.plan is not None]
        before, after = _counts(dense), entries[-1]["size"]
        report: dict[str, Any] = {
            "secateur": importlib.metadata.version("secateur"),
            "method": f"recipe: {', '.join(step.name for step in self.steps)}",
            "model": {"name": head.model, "fingerprint": fingerprint(dense)},
            "seed": head.seed,
            "steps": list(entries),
            "plan": "saved" if plan is not None else _why_no_plan(pruned),
            "training": any(made.trained for _, made in every),
            "costs": {name: {"dense": before[name], "pruned": after[name]} for name in before},
        }
        data = {"calibration": head.data, "evaluation": head.eval_data}
        report["data"] = {name: value for name, value in data.items() if value is not None}
        if plan is not None:
            report["budget"] = plan.origin["budget"]
        if measured is not None:
            report["measured"] = measured
        if source is not None and source.unused:
            report["unused_tensors"] = list(source.unused)
        return report


def _why_no_plan(pruned: Sequence[int]) -> str:
    if not pruned:
        return "not saved: no step prunes"
    if len(pruned) == 1:
        return "not saved: nothing was cut"
    return f"not saved: steps {', '.join(map(str, pruned))} prune, and their plans are not joined into one"


def _open(name: str) -> tuple[nn.Module, Any, Source | None]:
    if is_constructor(name):
        return build(name).eval(), None, None
    return load_model(name)


@contextmanager
def _naming(number: int, name: str) -> Iterator[None]:
    """Say which step an error is of."""
    try:
        yield
    except SecateurError as error:
        raise SecateurError(f"step {number}, {name}: {error}") from error


def _counts(model: nn.Module) -> dict[str, int]:
    counts = [(p.numel(), int(p.count_nonzero())) for p in model.parameters()]
    return {"params": sum(n for n, _ in counts), "nonzero": sum(n for _, n in counts)}
