"""The steps of a recipe as calls on an object, for notebooks: each runs at once, on live models and data."""

import inspect
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.choose.plan import Plan
from secateur.errors import SecateurError, nearest
from secateur.methods.reporting import provenance
from secateur.progress import Track, quiet
from secateur.recipe.options import typed
from secateur.recipe.read import known_options
from secateur.recipe.steps import STEPS, TRAINING
from secateur.recipe.work import Work, counts
from secateur.ship import save
from secateur.ship.checkpoint import json_values


class Pipeline:
    """A model, and the steps that were done to it, each a call that returns the pipeline.

    The steps and their options are those of recipes (docs/recipes.md), with live objects in place of names: a model as
    `teacher`, batches or a data loader as `data`, functions as `loss` and `evaluate`. The model that it is given stays
    as it is. A step that fails leaves the pipeline as it was.

    Attributes:
        model: The model now, in evaluation mode.
        dense: The model that it began with.
        history: What each step reported, in order.
        plan: What is left of the dense model, where exactly one step has cut it; else None.
    """

    def __init__(
        self, model: nn.Module, *, data: Any = None, eval_data: Any = None, tokenizer: Any = None, inputs: Any = None,
        name: str = "", seed: int = 0, track: Track = quiet,
    ) -> None:  # fmt: skip
        """Begin with a model.

        Args:
            model: the dense model.
            data: of all steps that are told nothing else: see `batches_of`.
            eval_data: held-out data, likewise.
            tokenizer: for text.
            inputs: arguments of one forward pass (a tensor, a tuple, a mapping), for what is no Hugging Face model.
            name: of the model, for the report.
            seed: every step begins with it.
            track: shows progress.
        """
        self.dense = self.model = model
        self.history: list[Mapping[str, Any]] = []
        self.plan: Plan | None = None
        self._cuts = 0
        self._given = {"data": data, "eval_data": eval_data}
        self._tools: dict[str, Any] = {"tokenizer": tokenizer, "inputs": inputs, "seed": seed, "track": track}
        self._name = name or type(model).__name__
        self._folder = tempfile.TemporaryDirectory(prefix="secateur-")
        self._files: dict[str, Path] = {}
        self._exported: nn.Module | None = None

    # --- steps ---

    def prune(self, **options: Any) -> "Pipeline":
        """Cut once: `budget`, `method` and its options."""
        return self._do("prune", options)

    def iterative(self, **options: Any) -> "Pipeline":
        """Cut and train by a function of yours, in steps."""
        return self._do("iterative", options)

    def distill(self, **options: Any) -> "Pipeline":
        """Learn from the dense model, or from `teacher`."""
        return self._do("distill", options)

    def finetune(self, **options: Any) -> "Pipeline":
        """Train on the data's targets, or by `loss`."""
        return self._do("finetune", options)

    def sparsify(self, **options: Any) -> "Pipeline":
        """Train while more and more weights become zero."""
        return self._do("sparsify", options)

    def adapt_batch_norm(self, **options: Any) -> "Pipeline":
        """Estimate the statistics of batch norms anew."""
        return self._do("adapt_batch_norm", options)

    def evaluate(self, **options: Any) -> "Pipeline":
        """Measure the model beside the dense one; the last entry of `history` has the result."""
        return self._do("evaluate", options)

    def export(self, path: str | Path, **options: Any) -> "Pipeline":
        """Write the model as an .onnx file."""
        self._written("export", path, options)
        self._exported = self.model
        return self

    def quantize(self, path: str | Path, **options: Any) -> "Pipeline":
        """Make an INT8 file of what was exported."""
        if self._exported is not self.model:
            why = "there is none" if self._exported is None else "the model is another one now"
            raise SecateurError(f"quantize takes the file of an export, and {why}: call export before")
        return self._written("quantize", path, options)

    def save(self, out: str | Path, *, overwrite: bool = False, **saved: Any) -> "Pipeline":
        """Write the model, the report, and the plan where there is one, as a folder that `secateur.load` loads.

        Args:
            out: the folder to make.
            overwrite: replace an old result.
            saved: for `secateur.save`: `source`, or `constructor` and `arguments`.

        Raises:
            SecateurError: as `secateur.save`.
        """
        save(
            self.model, Path(out), plan=self.plan, report=self.report, tokenizer=self._tools["tokenizer"],
            overwrite=overwrite, **saved,
        )  # fmt: skip
        return self

    @property
    def report(self) -> dict[str, Any]:
        """All steps with their options and what they reported, costs and seconds; JSON values."""
        before, after = counts(self.dense), counts(self.model)
        plans = {0: "not saved: no step prunes", 1: "not saved: nothing was cut"}
        several = f"not saved: {self._cuts} steps prune, and their plans are not joined into one"
        return {
            **provenance(),
            "method": f"pipeline: {', '.join(entry['step'] for entry in self.history)}",
            "model": {"name": self._name},
            "steps": list(self.history),
            "plan": "saved" if self.plan is not None else plans.get(self._cuts, several),
            "training": any(entry["step"] in (*TRAINING, "iterative") for entry in self.history),
            "costs": {key: {"dense": before[key], "pruned": after[key]} for key in before},
            "seconds": {"total": sum(entry["seconds"] for entry in self.history)},
        }

    # --- how ---

    def _written(self, step: str, path: str | Path, options: Mapping[str, Any]) -> "Pipeline":
        """Do a step that writes one file, and put it where it is wanted."""
        target = Path(path).expanduser()
        if target.suffix != ".onnx" or target.exists():
            why = "exists already" if target.exists() else "must end in .onnx"
            raise SecateurError(f"{path}: {why}; choose another name")
        if not target.parent.is_dir():
            raise SecateurError(f"{path}: there is no folder {target.parent}")
        self._do(step, {**options, "file": target.name})
        for made in (Path(self._folder.name) / "files").iterdir():  # its tensors may lie in a file of their own
            self._files[made.name] = Path(shutil.move(made, target.with_name(made.name)))
        return self

    def _do(self, step: str, options: Mapping[str, Any]) -> "Pipeline":
        known = known_options(step, options)
        for option in options:
            if option not in known:
                raise SecateurError(f"{step} has no option {option!r}{nearest(option, known)}")
        # Plain values are checked as those of a recipe; live objects are what they are.
        plain = {n: v for n, v in options.items() if isinstance(v, bool | int | float | str)}
        told = {**options, **{name: typed(name, value, known[name].annotation) for name, value in plain.items()}}
        for name, value in self._given.items():
            own = name == "eval_data" and step in TRAINING and told.get("evaluate") is not None
            if name in known and told.get(name) is None and value is not None and not own:
                told[name] = value
        for name, parameter in known.items():
            if parameter.default is inspect.Parameter.empty and told.get(name) is None:
                raise SecateurError(f"{step} needs {name}")
        files = Path(self._folder.name) / "files"
        shutil.rmtree(files, ignore_errors=True)
        files.mkdir()
        tools = self._tools
        work = Work(
            self.model, self.dense, self._name, tools["seed"], tools["tokenizer"], tools["inputs"], tools["track"],
            files, None, self.history, self._files, self.plan,
        )  # fmt: skip
        begin = time.perf_counter()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(tools["seed"])
            made = STEPS[step](work, **told)
        entry = {"number": len(self.history) + 1, "step": step, "options": _said(options), "size": counts(made.model)}
        self.history.append({**entry, **json_values(made.report), "seconds": time.perf_counter() - begin})
        self._files |= {path.name: path for path in files.iterdir()}
        if made.plan is not None:
            self._cuts += 1
            whole = bool(made.plan.kept or made.plan.dropped or made.plan.masks)
            self.plan = made.plan if self._cuts == 1 and whole else None
        self.model = made.model.eval()
        return self


def _said(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a report can hold them."""
    return {name: _plain(value) for name, value in options.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and all(isinstance(entry, bool | int | float | str) for entry in value):
        return list(value)
    return str(getattr(value, "__name__", None) or (value if isinstance(value, Path) else f"a {type(value).__name__}"))
