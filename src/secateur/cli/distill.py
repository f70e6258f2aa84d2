"""``secateur distill --teacher A --student B --data ... --out C``: teach a pruned model what the dense one says."""

import dataclasses
import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from secateur import world
from secateur.choose.plan import Plan
from secateur.cli import tables
from secateur.cli.models import Building, batches_from, check_sources, open_model, stored_as
from secateur.cli.options import Common, Group, Interrupted, Reading, parse, settings_options
from secateur.cli.saving import save_with_page, tell_missing, tell_page
from secateur.errors import SecateurError
from secateur.load.built import STRUCTURE, Built
from secateur.load.functions import is_constructor, names_function
from secateur.load.model import Source, fingerprint
from secateur.methods.healing import Healed, cache_teacher, distill
from secateur.methods.reporting import provenance
from secateur.methods.verbs import batches_of
from secateur.ship.checkpoint import check_out
from secateur.train import sharded
from secateur.train.settings import Distillation, Training
from secateur.train.shares import check_rows

_Training = settings_options(Training, without=("seed",))
_Losses = settings_options(Distillation)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a pruned model to say what the dense one says, and save it."""

    student: str
    """Folder of the pruned model, or module:callable that builds any model."""
    out: Path
    """Folder to write; it appears whole or not at all. Beside it, in OUT.training, the run keeps its state: a run that
    was killed goes on from there when it is run again."""
    data: tuple[str, ...]
    """What to train on, as for prune; several sources are mixed by weight: reasoning.jsonl=0.7 web/=0.3."""
    teacher: str | None = None
    """The dense model; not needed where --cache is whole."""
    eval_data: str | None = None
    """Held-out data, on which the run is evaluated."""
    cache: Path | None = None
    """Folder for the teacher's logits: asked for once, so that no teacher is in memory in training."""
    teacher_dtype: str | None = None
    """Type that the teacher computes in, such as bfloat16."""
    restart: bool = False
    """Begin anew where a run was cut off."""
    overwrite: bool = False
    """Replace an existing result in --out."""
    making: Annotated[Building, Group] = dataclasses.field(default_factory=Building)
    training: Annotated[_Training, Group] = dataclasses.field(default_factory=_Training)  # type: ignore[valid-type]
    losses: Annotated[_Losses, Group] = dataclasses.field(default_factory=_Losses)  # type: ignore[valid-type]
    reading: Annotated[Reading, Group] = dataclasses.field(default_factory=Reading)
    common: Annotated[Common, Group] = dataclasses.field(default_factory=Common)


def run(words: Sequence[str]) -> None:
    """Run the verb."""
    arguments: Arguments = parse(Arguments, "distill", words)
    common = arguments.common
    options = {name: getattr(group, name) for group in (arguments.training, arguments.losses) for name in _names(group)}
    Training(**{name: getattr(arguments.training, name) for name in _names(arguments.training)}).check()
    Distillation(**{name: getattr(arguments.losses, name) for name in _names(arguments.losses)}).check()
    options |= dataclasses.asdict(arguments.reading) | {"seed": common.seed}
    sources = _sources(arguments.data)
    if arguments.eval_data == "self":
        raise SecateurError("--eval-data self would measure the model on its own words: give held-out data")
    if arguments.teacher is None and arguments.cache is None:
        raise SecateurError("give the --teacher, or a --cache of its logits")
    check_out(arguments.out, overwrite=arguments.overwrite)
    for name in sources:
        check_sources(arguments.student, data=name)
    check_sources(arguments.student, eval_data=arguments.eval_data)
    if not any(map(names_function, sources)):
        check_rows(arguments.reading.batch_size)
    work = _work(arguments)
    student, tokenizer, source = open_model(
        arguments.student, arguments.making, device=_device(common), dtype=common.dtype
    )
    check_out(arguments.out, overwrite=arguments.overwrite, source=source)
    teacher = _teacher(arguments, student, tokenizer)
    data = _data(sources)
    track = common.track()
    how = {**options, "tokenizer": tokenizer, "track": track, "teacher_dtype": arguments.teacher_dtype}
    if arguments.eval_data is not None:
        given = batches_from(arguments.eval_data, "--eval-data")
        reading = dataclasses.asdict(arguments.reading)
        how["eval_data"] = batches_of(student, given, tokenizer=tokenizer, seed=common.seed, track=track, **reading)
    if arguments.cache is not None and teacher is not None:
        cache_teacher(teacher, student, data, cache=arguments.cache, **how)
        teacher = None  # that is what the cache is for
    plan = _plan(arguments.student)
    try:
        healed = distill(teacher, student, data, plan=plan, cache=arguments.cache, work=work, **how)
    except KeyboardInterrupt:
        raise Interrupted(f"the state is in {work}: run the same command again, and it goes on") from None
    if world.first():
        report = _report(arguments, student, source, healed) | provenance(["secateur", "distill", *words])
        _save(arguments, healed, report, work, tokenizer, source, plan)
    if healed.report["diverged"]:
        raise SecateurError(f"{healed.report['stopped']}; {arguments.out} holds step {healed.report['best']}")


def _work(arguments: Arguments) -> Path:
    """The folder of the run's state."""
    work = arguments.out.with_name(f"{arguments.out.name}.training")
    if arguments.restart:
        world.from_first(lambda: shutil.rmtree(work) if work.exists() else None)
    return work


def _save(
    arguments: Arguments, healed: Healed, report: Mapping[str, Any], work: Path, tokenizer: Any, source: Source | None,
    plan: Plan | None,
) -> None:  # fmt: skip
    """Save the student, and show what came of it."""
    common = arguments.common
    stored_as(healed.model, source)
    logs = [work / "metrics.jsonl", *work.glob("tensorboard/*")]
    no_page = save_with_page(
        healed.model, arguments.out, plan=plan, source=source, tokenizer=tokenizer, report=report,
        overwrite=arguments.overwrite, files=logs, **_built(arguments),
    )  # fmt: skip
    shutil.rmtree(work)

    def draw(console: Console) -> None:
        _draw(console, report, arguments.out)
        tell_page(console, arguments.out, no_page)

    common.show({"out": str(arguments.out), **report}, draw)
    if common.json:
        tell_missing(no_page)


def _device(common: Common) -> str:
    """Where models are read to: several processes spread them over their devices block by block."""
    return common.device if world.size() == 1 else "cpu"


def _names(settings: Any) -> list[str]:
    return [entry.name for entry in dataclasses.fields(settings)]


def _sources(words: Sequence[str]) -> dict[str, float]:
    """Sources and their weights."""
    found: dict[str, float] = {}
    for word in words:
        name, sign, weight = word.rpartition("=")
        if not sign or Path(word).exists():
            name, weight = word, "1"
        try:
            found[name] = float(weight)
        except ValueError as error:
            raise SecateurError(f"--data {word}: the weight {weight!r} is no number") from error
        if name == "self" and len(words) > 1:
            raise SecateurError("--data self is not mixed with other sources")
        if names_function(name) and len(words) > 1:
            raise SecateurError(f"--data {name}: a function is not mixed with other sources: let it mix them itself")
    return found


def _data(sources: Mapping[str, float]) -> Any:
    return batches_from(next(iter(sources)), "--data") if len(sources) == 1 else dict(sources)


def _teacher(arguments: Arguments, student: Any, tokenizer: Any) -> Any:
    """The dense model, spread over the processes where there are several; None where it is not given."""
    if arguments.teacher is None:
        return None
    if world.size() == 1:
        return _checked_teacher(arguments, arguments.teacher, student, tokenizer)
    name = arguments.teacher
    return sharded.in_turns(lambda: sharded.shard(_checked_teacher(arguments, name, student, tokenizer)))


def _checked_teacher(arguments: Arguments, name: str, student: Any, tokenizer: Any) -> Any:
    """The dense model, once it is known to speak the student's tokens."""
    making = arguments.making if is_constructor(name) else Building()
    teacher, own, _ = open_model(name, making, device=_device(arguments.common), dtype=arguments.teacher_dtype)
    sizes = [getattr(getattr(model, "config", None), "vocab_size", None) for model in (teacher, student)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise SecateurError(
            f"the teacher {name} has {sizes[0]} tokens in its vocabulary, the student {arguments.student} "
            f"has {sizes[1]}: distilling needs one vocabulary"
        )
    if own is not None and tokenizer is not None and own.get_vocab() != tokenizer.get_vocab():
        raise SecateurError(
            f"the teacher {name} and the student {arguments.student} have other tokenizers: the same "
            "token means different text to them"
        )
    return teacher


def _plan(student: str) -> Plan | None:
    """The plan that lies beside the student."""
    folder = Path(student).expanduser()
    return Plan.load(folder) if (folder / "plan.json").is_file() else None


def _built(arguments: Arguments) -> dict[str, Any]:
    folder = Path(arguments.student).expanduser()
    if is_constructor(arguments.student):
        return {"constructor": arguments.student, "arguments": arguments.making.arguments}
    if (folder / STRUCTURE).is_file():
        built = Built.load(folder)
        return {"constructor": built.constructor, "arguments": dict(built.arguments)}
    return {}


def _report(arguments: Arguments, student: Any, source: Source | None, healed: Healed) -> dict[str, Any]:
    told = dict(healed.report)
    params = sum(p.numel() for p in healed.model.parameters())
    nonzero = sum(int(p.count_nonzero()) for p in healed.model.parameters())
    report: dict[str, Any] = {
        "secateur": importlib.metadata.version("secateur"),
        "method": told.pop("method"),
        "model": {"name": arguments.student, "fingerprint": fingerprint(student)},
        "teacher": {"name": arguments.teacher or f"logits in {arguments.cache}"},
        "training": True,
        "costs": {"params": {"pruned": params}, "nonzero": {"pruned": nonzero}},
        "data": {"training": list(arguments.data), "evaluation": arguments.eval_data},
        "seconds": {"total": told.pop("seconds")},
        "plan": "saved" if _plan(arguments.student) is not None else "not saved: the student has none",
    }
    if "after" in told:
        dense = told.pop("teacher", {})
        report["measured"] = {
            name: {"dense": dense[name], "pruned": value} if name in dense else value
            for name, value in told["after"].items()
        } | {"data": arguments.eval_data}
    if source is not None and source.unused:
        report["unused_tensors"] = list(source.unused)
    return report | {"distillation": told}


def _draw(console: Console, report: Mapping[str, Any], out: Path) -> None:
    told = report["distillation"]
    length = f"{told['steps']:,} steps" + (f", {told['tokens']:,} tokens" if told["tokens"] else "")
    title = f"Distilled: {length}, lr {told['lr']:.3g}, {report['seconds']['total']:.1f} s"
    if told["resumed"] is not None:
        console.print(f"went on from step {told['resumed']}")
    if "after" in told:
        rows = []
        for name, value in told["after"].items():
            entry = report["measured"][name]
            dense = f"{entry['dense']:.4g}" if isinstance(entry, Mapping) else ""
            rows.append((f"{name}, held out", f"{told['before'][name]:.4g}", f"{value:.4g}", dense))
        tables.table(console, title, ("", "before", "after", "teacher"), rows)
        console.print(f"the weights are those of step {told['best']}, the best; {told['stopped']}", soft_wrap=True)
    else:
        console.print(f"{title}; {told['stopped']}; nothing was measured (--eval-data)", soft_wrap=True)
    if told["masks"]:
        console.print(f"the zeros of {told['masks']} masked weights were held")
    board = f"; curves: tensorboard --logdir {out}" if "tensorboard" in told["logs"] else ""
    console.print(f"saved in {out} (report.json, metrics.jsonl){board}", soft_wrap=True)
