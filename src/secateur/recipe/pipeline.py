"""A recipe that was checked: run step by step, each step kept, saved whole or not at all."""

import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.choose.plan import Plan
from secateur.errors import SecateurError
from secateur.load.functions import call
from secateur.load.model import Source, fingerprint
from secateur.methods import MASKING
from secateur.methods.reporting import provenance, weight_bytes, zeros_of
from secateur.progress import Track, quiet
from secateur.recipe.folders import Folders, Mark, Record, as_user_error, identity, mark_of, save_into
from secateur.recipe.options import Calibration, HeldOut, Inputs, ModelName, at_least
from secateur.recipe.steps import STEPS, method_of
from secateur.recipe.work import Made, Work, counts, open_model
from secateur.ship import load
from secateur.ship.checkpoint import check_out, json_values, whole_folder

SOURCES = ("model", "data", "eval_data", "teacher", "inputs")
"""Options that say where something is read."""
Tell = Callable[[Mapping[str, Any]], object]
Note = Callable[[str], object]


def _unheard(note: str) -> None:
    """What is told to nobody."""
    del note


@dataclass(frozen=True)
class Step:
    """One step, checked.

    Attributes:
        name: In the table of steps.
        arguments: As its function takes them; what the whole recipe gives is filled in.
        said: The same as YAML values, for the report.
        round: "2 of 3" in a repeat.
        lands: (measure, share of the first model): the cut that the budget is set for when its time has come.
    """

    name: str
    arguments: Mapping[str, Any]
    said: Mapping[str, Any]
    round: str = ""
    lands: tuple[str, float] | None = None


@dataclass(frozen=True)
class Finished:
    """What a recipe came to.

    Attributes:
        model: That of the last step, in evaluation mode.
        report: As report.json has it: model, each step with its options and what it reported, costs, seconds.
        plan: What stays of the dense model, where exactly one step prunes; it is saved beside the model.
        new: Whether it was made now; the same recipe may have made it before.
    """

    model: nn.Module
    report: Mapping[str, Any]
    plan: Plan | None
    new: bool = True


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


@dataclass
class Progress:
    """How far a run is: the model, and what the steps until now have left."""

    model: nn.Module
    dense: nn.Module
    records: list[Record] = field(default_factory=list)

    @property
    def entries(self) -> list[Mapping[str, Any]]:
        """What the steps reported."""
        return [record.entry for record in self.records]

    @property
    def files(self) -> dict[str, Path]:
        """What the steps wrote; of two files of one name the later one."""
        return {name: path for record in self.records for name, path in record.paths().items()}

    @property
    def plan(self) -> Plan | None:
        """The plan of the one step that cut something; None where there is none, or several."""
        cut = [record for record in self.records if record.cuts]
        return cut[0].load_plan() if len(cut) == 1 and cut[0].plan else None


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read and checked; see `load`.

    Attributes:
        head: What holds for all steps.
        steps: In their order; rounds of a repeat one after the other.
        overwrite: Whether an old result may be replaced.
        fresh: Whether steps that are done already are done again.
    """

    head: Head
    steps: Sequence[Step]
    overwrite: bool = False
    fresh: bool = False

    def marks(self) -> list[Mark]:
        """What the result of each step depends on."""
        found: list[Mark] = []
        head = {"seed": self.head.seed, "inputs": self.head.inputs}
        for number, step in enumerate(self.steps, start=1):
            texts = {n: v for n, v in step.said.items() if n in SOURCES or isinstance(step.arguments.get(n), Path)}
            texts |= {n: v for n, v in step.said.items() if callable(step.arguments.get(n))}
            if number == 1:
                texts["model"] = self.head.model
            if isinstance(self.head.inputs, str):
                texts["inputs"] = self.head.inputs
            sources = {name: _identities(value) for name, value in texts.items() if value is not None}
            told = {"options": step.said, "lands": step.lands, "sources": sources, **head}
            found.append(mark_of(number, step.name, found[-1] if found else None, **json_values(told)))
        return found

    def folders(self) -> Folders:
        """Where its steps are kept."""
        return Folders(self.head.out, self.marks(), fresh=self.fresh)

    def made(self) -> Mapping[str, Any] | None:
        """The report of a result that this very recipe has written already; None where there is none."""
        try:
            report = json.loads((self.head.out.expanduser() / "report.json").read_text(encoding="utf-8"))
            same = report["recipe"]["fingerprint"] == self.marks()[-1].fingerprint
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return report if same and not self.fresh else None

    def run(
        self, *, track: Track = quiet, on_step: Tell | None = None, on_note: Note = _unheard,
        command: Sequence[str] | None = None,
    ) -> Finished:  # fmt: skip
        """Run all steps, each on the model of the one before, and save the last model with the report.

        Steps that a run before has done are not done again, and a training that was cut off goes on: what each step
        left is in a folder beside `out`, ``<out>.steps``. torch's random numbers start from the seed at every step, and
        are the caller's again afterwards.

        Args:
            track: shows progress.
            on_step: called with each step's entry of the report when it is done.
            on_note: called with a line on what is not done again, and why other things are.
            command: that asked for it, for the report.

        Raises:
            SecateurError: for what only shows with the model at hand, as the steps do. `out` stays as it was then, and
                the steps before stay in their folders.
        """
        old = None if self.overwrite else self.made()
        if old is not None:
            on_note(f"{self.head.out} was made by this very recipe: there is nothing to do")
            has_plan = old["plan"] == "saved"
            plan = Plan.load(self.head.out.expanduser()) if has_plan else None
            return Finished(load(self.head.out), old, plan, new=False)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(self.head.seed)
            dense, tokenizer, source = open_model(self.head.model)
            target = check_out(self.head.out, overwrite=self.overwrite, source=source)
            inputs = self.example(dense)
            folders = self.folders()
            folders.clean()
            far = Progress(dense, dense, folders.done())
            self._tell(folders, far, on_note)
            for number in range(len(far.records) + 1, len(self.steps) + 1):
                self._step(number, far, folders, (tokenizer, source, inputs, track), on_note)
                if on_step is not None:
                    on_step(far.entries[-1])
            report = self._report(dense, far, folders.marks[-1].fingerprint, source, command)
            without = self._save(far, target, report, tokenizer, source, str(folders.root))
            if without is not None:
                on_note(without)
        return Finished(far.model, report, far.plan)

    def _tell(self, folders: Folders, far: Progress, on_note: Note) -> None:
        """Say what is done already, and take the model from there."""
        count = len(far.records)
        if count:
            which = "step 1 is" if count == 1 else f"steps 1 to {count} are"
            on_note(f"{which} done already, in {folders.root}")
            last = next((record for record in reversed(far.records) if record.changed), None)
            far.model = far.dense if last is None else last.load_model().eval()
        if count < len(self.steps) and not self.fresh:
            why = folders.why_again(count + 1)
            if why is not None:
                on_note(f"step {count + 1}, {self.steps[count].name}, is done again: {why}")

    def _step(self, number: int, far: Progress, folders: Folders, tools: tuple[Any, ...], on_note: Note) -> None:
        """Do one step, and keep it."""
        tokenizer, source, inputs, track = tools
        step = self.steps[number - 1]
        said, arguments = dict(step.said), dict(step.arguments)
        torch.manual_seed(self.head.seed)
        start = time.perf_counter()
        with _naming(number, step.name):
            state, cut_off = folders.state(number)
            if cut_off:
                on_note(f"step {number}, {step.name}, goes on from where it was cut off")
            if step.lands is not None:
                said["budget"] = arguments["budget"] = landing(step.lands, far)
            work = Work(
                far.model, far.dense, self.head.model, self.head.seed, tokenizer, inputs, track,
                state / "files", state, far.entries, far.files, far.plan,
            )  # fmt: skip
            made = STEPS[step.name](work, **arguments)
            entry = {"number": number, "step": step.name, **({"round": step.round} if step.round else {})}
            entry |= {"options": said, "size": counts(made.model), **made.report}
            changed = made.model is not far.model
            record = _record(entry, made, changed, time.perf_counter() - start, work.files)
            saved = self._saved(tokenizer, source)
            if record["plan"]:
                saved |= {"plan": made.plan, "scores": made.scores}
            far.records.append(
                folders.keep(number, made.model if changed else None, record, **saved if changed else {})
            )
        far.model = made.model.eval()

    def _saved(self, tokenizer: Any, source: Source | None) -> dict[str, Any]:
        """What `ship.save` is told about every model of the recipe."""
        built: dict[str, Any] = {"constructor": self.head.model, "arguments": {}} if source is None else {}
        return {"source": source, "tokenizer": tokenizer, **built}

    def _save(
        self, far: Progress, target: Path, report: Mapping[str, Any], tokenizer: Any, source: Source | None, root: str
    ) -> str | None:
        """The result: the last model, the report and its page, the plan where there is one, the files of the steps.

        Returns why there is no page; None where there is one.
        """
        from secateur.report import add_page

        plan = far.plan
        scores = next((r.load_scores() for r in far.records if r.scores), None) if plan is not None else None
        saved = {**self._saved(tokenizer, source), "plan": plan, "scores": scores, "report": report}
        with as_user_error(self.head.out, f"the steps are in {root}"), whole_folder(target) as partial:
            save_into(partial, self.head.out, far.model, **saved)
            for name, path in far.files.items():
                shutil.copyfile(path, partial / name)
            return add_page(partial, self.head.out)

    def example(self, model: nn.Module) -> Any:
        """Example inputs on the model's device and of its type; None where the model does without."""
        asked = self.head.inputs
        first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

        def placed(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return x.to(first.device, first.dtype if x.is_floating_point() else x.dtype)

        if asked is None:
            methods = {method_of(step.name, step.arguments) for step in self.steps} - {None, *MASKING}
            methods |= {step.name for step in self.steps if step.name == "export"}
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
        self, dense: nn.Module, far: Progress, mark: str, source: Source | None, command: Sequence[str] | None
    ) -> dict[str, Any]:
        """What was done, under the names that model cards and other reports have for it."""
        report = summary(self.head.model, dense, far, command) | {
            "recipe": {"fingerprint": mark},
            "seed": self.head.seed,
        }
        report["bytes"] = {"dense": weight_bytes(dense, source)}
        data = {"calibration": self.head.data, "evaluation": self.head.eval_data}
        report["data"] = {name: value for name, value in data.items() if value is not None}
        if source is not None and source.unused:
            report["unused_tensors"] = list(source.unused)
        return report


def summary(name: str, dense: nn.Module, far: Progress, command: Sequence[str] | None = None) -> dict[str, Any]:
    """What the steps did to a model, as report.json has it.

    Args:
        name: of the dense model.
        dense: what the steps began with.
        far: the steps.
        command: that ran them.
    """
    measured, at_dense = None, True
    for record in far.records:
        if record.changed:
            measured = None  # it was about another model
        if not record.changed or at_dense:
            measured = record.entry.get("measured", measured)
        at_dense = at_dense and not record.changed
    before, after = counts(dense), counts(far.model)
    plan = far.plan
    report: dict[str, Any] = {
        "secateur": importlib.metadata.version("secateur"),
        **provenance(command),
        "method": f"recipe: {', '.join(entry['step'] for entry in far.entries)}",
        "model": {"name": name, "fingerprint": fingerprint(dense)},
        "steps": far.entries,
        "plan": "saved" if plan is not None else _why_no_plan(far.records),
        "training": any(record.trained for record in far.records),
        "costs": {name: {"dense": before[name], "pruned": after[name]} for name in before},
        "seconds": {"total": sum(entry["seconds"] for entry in far.entries)},
    }
    if plan is not None:
        report["budget"] = plan.origin["budget"]
        report |= {"sparsity": zeros_of(plan)} if plan.masks else {}
    if measured is not None:
        report["measured"] = measured
    return report


def landing(lands: tuple[str, float], far: Progress) -> str:
    """The budget of a cut that is to come out at a share of what the first model costs.

    Args:
        lands: measure, and the share.
        far: what was cut already; of other measures than params, that is the product of what the cuts reported.
    """
    measure, share = lands
    if measure == "params":
        return f"params={int(share * counts(far.dense)['params'])}"
    left = 1.0
    for entry in far.entries:
        cost = entry.get("costs", {}).get("macs" if measure == "flops" else measure)
        left *= cost["pruned"] / cost["dense"] if cost else 1.0
    return f"{measure}={100 * min(1.0, share / left):.6g}%"


def _record(entry: Mapping[str, Any], made: Made, changed: bool, seconds: float, files: Path) -> dict[str, Any]:
    """What is kept of a step, as JSON values."""
    plan = made.plan
    kept = plan is not None and bool(plan.kept or plan.dropped or plan.masks)
    written = sorted(path.name for path in files.iterdir())
    sizes = {name: (files / name).stat().st_size for name in written}
    whole = {**entry, **({"files": sizes} if sizes else {}), "seconds": seconds}
    return {
        "entry": json.loads(json.dumps(json_values(whole))),
        "changed": changed,
        "cuts": plan is not None,
        "trained": made.trained,
        "plan": kept,
        "scores": kept and made.scores is not None,
        "files": written,
    }


def _identities(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): identity(str(name)) for name in value}
    return identity(value) if isinstance(value, str) else value


def _why_no_plan(records: Sequence[Record]) -> str:
    cut = [record.entry["number"] for record in records if record.cuts]
    if not cut:
        return "not saved: no step prunes"
    if len(cut) == 1:
        return "not saved: nothing was cut"
    return f"not saved: steps {', '.join(map(str, cut))} prune, and their plans are not joined into one"


@contextmanager
def _naming(number: int, name: str) -> Iterator[None]:
    """Say which step an error is of."""
    try:
        yield
    except SecateurError as error:
        raise SecateurError(f"step {number}, {name}: {error}") from error
