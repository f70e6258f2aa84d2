"""``secateur prune MODEL --out DIR --budget params=70%``: cut a model and save the smaller one."""

import contextlib
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from secateur import world
from secateur.choose import Budget
from secateur.cli import tables
from secateur.cli.models import Making, batches_from, check_sources, inputs_of, open_model, stored_as
from secateur.cli.options import Common, Group, Reading, method_options, parse
from secateur.cli.piping import Piped, Piping, piped
from secateur.cli.saving import save_with_page, tell_missing, tell_page
from secateur.cli.streaming import Streamed, Streaming, streamed
from secateur.errors import SecateurError, nearest
from secateur.load.functions import find_function, is_constructor
from secateur.load.model import Source
from secateur.measure.choice import load_questions
from secateur.measure.quality import choice_metric, load_metric, perplexity_metric
from secateur.methods import MASKING, METHODS
from secateur.methods.reporting import provenance, weight_bytes
from secateur.methods.verbs import Result, batches_of, check_repair, needs_data, prune
from secateur.ship.checkpoint import check_out, why_not_stock


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How candidates of a search are scored."""

    score: str = "kl"
    """kl (to the dense model), perplexity, choice (multiple-choice accuracy), or module:function (higher is better)."""
    questions: Path | None = None
    """For choice: .jsonl or .parquet in MMLU's layout (question, choices, answer, subject)."""
    shots: int = 0
    """For choice: examples shown before each question."""
    fraction: float = 1.0
    """For choice: share of the questions to ask."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Cut a model to a budget and save the smaller one, with a report of what it cost."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder or hub id of a Hugging Face model, or module:callable that builds any model."""
    out: Path
    """Folder to write; it appears whole or not at all."""
    budget: tuple[str, ...] = ()
    """What the result may cost: params=70%, params=6B, memory=8GiB...; all of several must hold."""
    dims: str | None = None
    """Exact sizes in place of a budget, as JSON: '{"hidden_size": 192, "num_hidden_layers": 7}'."""
    method: str = "minitron"
    """The algorithm."""
    data: str | None = None
    """Calibration data: .txt, .jsonl, .parquet, .npy token ids, a folder of them, a hub id, self (written by
    the model), or module:function that returns batches. Minitron takes self where nothing is given."""
    eval_data: str | None = None
    """Held-out data to measure the model on before and after; nothing is measured without."""
    mend: str | None = None
    """How a structural cut is repaired on --data: least_squares, bias or none. least_squares where there is data,
    unless the method says otherwise."""
    adapt_batch_norm: bool = False
    """Estimate the statistics of batch norms anew, on --data, after the cut: CNNs need it."""
    overwrite: bool = False
    """Replace an existing result in --out."""
    loss: str | None = None
    """module:function that is called with (model, batch) and returns the loss, for criteria with gradients."""
    making: Annotated[Making, Group] = dataclasses.field(default_factory=Making)
    reading: Annotated[Reading, Group] = dataclasses.field(default_factory=Reading)
    scoring: Annotated[Scoring, Group] = dataclasses.field(default_factory=Scoring)
    streaming: Annotated[Streaming, Group] = dataclasses.field(default_factory=Streaming)
    piping: Annotated[Piping, Group] = dataclasses.field(default_factory=Piping)
    common: Annotated[Common, Group] = dataclasses.field(default_factory=Common)


def run(words: Sequence[str]) -> None:
    """Run the verb."""
    method = _method(words)
    taken = inspect.signature(METHODS[method]).parameters
    parsed = parse(_options(method), "prune", words)
    arguments: Arguments = parsed.arguments
    options = {f.name: getattr(parsed.options, f.name) for f in dataclasses.fields(parsed.options)}
    common, reading, scoring = arguments.common, arguments.reading, arguments.scoring
    budget = _check(arguments, method)
    ask = _scorer(scoring, has_search=bool(budget.limits))
    used = arguments.data or ("self" if needs_data(method) else None)
    stream = _streamed(arguments, method, options, budget, used)
    model, tokenizer, source = open_model(
        arguments.model, arguments.making, device=common.device, dtype=common.dtype,
        work=None if stream is None else stream.folder,
    )  # fmt: skip
    if source is None and not is_constructor(arguments.model):
        raise SecateurError(
            f"{arguments.model} was saved with a constructor: give that, and its weights with --weights"
        )
    inputs = inputs_of(model, arguments.making, arguments.model, needed=method not in MASKING)
    if scoring.score == "choice" and tokenizer is None:
        raise SecateurError(f"--score choice needs a tokenizer, and {arguments.model} has none")
    check_out(arguments.out, overwrite=arguments.overwrite, source=source)
    track = common.track()
    how = {"tokenizer": tokenizer, "seed": common.seed, "track": track, **dataclasses.asdict(reading)}
    rows = None if used is None else batches_of(model, batches_from(used, "--data"), **how)
    given = batches_from(arguments.eval_data, "--eval-data")
    held_out = None if given is None else batches_of(model, given, **how)
    if ask is not None:
        options["score"] = ask(model, tokenizer, rows or [], int(options.get("score_samples", 64)))
    if arguments.loss is not None:
        options["loss"] = find_function(arguments.loss, "--loss", "my_training:loss")
    if "seed" in taken:
        options["seed"] = common.seed
    if "stored_dtype" in taken and source is not None:
        options["stored_dtype"] = source.dtype
    settings = {**options, "mend": arguments.mend, "dtype": common.dtype, "seed": common.seed}
    data = {"calibration": rows, "evaluation": held_out}
    with contextlib.nullcontext() if stream is None else stream.running(model, budget, method, settings, data):
        result = prune(
            model, budget, method=method, data=rows, eval_data=held_out, inputs=inputs, name=arguments.model,
            track=track, mend=arguments.mend, adapt_batch_norm=arguments.adapt_batch_norm, **options,
        )  # fmt: skip
        report = _report(result, arguments, words, model, source, used)
        if stream is not None:
            report["pipeline" if isinstance(stream, Piped) else "streamed"] = stream.told(model, result.model)
        no_page = world.from_first(lambda: _save(result, arguments, report, source, tokenizer))
    how_to_load = _loading(result.model, constructed=source is None)
    if stream is not None:
        stream.finish()

    def draw(console: Console) -> None:
        _draw(console, report, arguments.out, how_to_load)
        tell_page(console, arguments.out, no_page)

    common.show({"out": str(arguments.out), **report}, draw)
    if common.json:
        tell_missing(no_page)


def _options(method: str) -> type[Any]:
    """All options: those of the verb, and those of the method."""
    without = ("score", "stored_dtype", "track", "inputs", "loss", "seed", "clock")
    own = method_options(METHODS[method], without=without)
    whole = dataclasses.make_dataclass(
        "Whole",
        [
            ("arguments", Annotated[Arguments, Group]),
            ("options", Annotated[own, Group], dataclasses.field(default_factory=own)),
        ],
        frozen=True,
    )
    whole.__doc__ = Arguments.__doc__
    return whole


def _save(
    result: Result, arguments: Arguments, report: Mapping[str, Any], source: Source | None, tokenizer: Any
) -> str | None:
    """Write the result; returns why it has no page, None where it has one."""
    stored_as(result.model, source)
    built: dict[str, Any] = (
        {"constructor": arguments.model, "arguments": arguments.making.arguments} if source is None else {}
    )
    return save_with_page(
        result.model, arguments.out, plan=result.plan, scores=result.scores, source=source, tokenizer=tokenizer,
        report=report, overwrite=arguments.overwrite, **built,
    )  # fmt: skip


def _streamed(
    arguments: Arguments, method: str, options: Mapping[str, Any], budget: Budget, used: str | None
) -> Streamed | Piped | None:
    """Whether the model is streamed, or held by several processes; what cannot be is said before it is loaded."""
    common, score = arguments.common, arguments.scoring.score
    settings = {**options, "loss": arguments.loss, "adapt_batch_norm": arguments.adapt_batch_norm, "data": used}
    settings |= {"score": None if score == Scoring.score else score}
    more = {"mend": arguments.mend, "evaluation": arguments.eval_data}
    found = piped(arguments.piping, arguments.model, method, settings | more, budget, device=common.device)
    return found or streamed(
        arguments.streaming, arguments.model, arguments.out, method=method, budget=budget, device=common.device,
        settings=settings, dtype=common.dtype,
    )  # fmt: skip


def _report(
    result: Result, arguments: Arguments, words: Sequence[str], model: Any, source: Source | None, used: str | None
) -> dict[str, Any]:
    """What was cut, from what, by which command."""
    report = {**result.report, **provenance(["secateur", "prune", *words])}
    report |= {
        "bytes": {"dense": weight_bytes(model, source)},
        "data": {"calibration": used, "evaluation": arguments.eval_data},
    }
    if source is not None and source.unused:
        report["unused_tensors"] = list(source.unused)
    report["options"] = {**report["options"], **_shown(arguments)}
    return report


def _check(arguments: Arguments, method: str) -> Budget:
    """The budget; raise SecateurError at once for what cannot be, before a model is loaded."""
    check_out(arguments.out, overwrite=arguments.overwrite)
    budget = Budget.parse(arguments.budget, arguments.dims)
    if bool(arguments.budget) == (arguments.dims is not None):
        raise SecateurError("give either --budget, such as params=70%, or exact --dims")
    if arguments.eval_data == "self":
        raise SecateurError("--eval-data self would measure the model on its own words: give held-out data")
    check_repair(arguments.mend, method, has_data=arguments.data is not None)
    check_sources(arguments.model, data=arguments.data, eval_data=arguments.eval_data)
    taken = inspect.signature(METHODS[method]).parameters
    if is_constructor(arguments.model) and "inputs" not in taken:
        raise SecateurError(
            f"{method} prunes Hugging Face language models; for {arguments.model} give --method structural"
        )
    if arguments.loss is not None and "loss" not in taken:
        raise SecateurError(f"--loss does not go with the method {method}")
    if arguments.scoring != Scoring() and "score" not in taken:
        raise SecateurError(f"--score, --questions, --shots and --fraction do not go with the method {method}")
    return budget


def _loading(model: Any, *, constructed: bool) -> str:
    if constructed:
        return "a model that secateur.load loads"
    if why_not_stock(model) is None:
        return "a model that stock transformers loads"
    return "a model that stock transformers loads with trust_remote_code=True"


def _method(words: Sequence[str]) -> str:
    """The value of --method, which decides what other options there are."""
    for i, word in enumerate(words):
        name, sign, value = word.partition("=")
        if name == "--method":
            method = value if sign else words[i + 1] if i + 1 < len(words) else ""
            if method not in METHODS:
                raise SecateurError(f"--method: there is no method {method!r}{nearest(method, METHODS)}")
            return method
    return "minitron"


def _scorer(scoring: Scoring, has_search: bool) -> Any:
    """A function that makes the metric once the model and its data are there; None for the method's own."""
    if scoring.score != "choice" and (scoring.questions is not None or scoring.shots or scoring.fraction != 1.0):
        raise SecateurError(f"--questions, --shots and --fraction go with --score choice, not {scoring.score}")
    if not has_search and scoring.score != "kl":
        raise SecateurError(f"--score {scoring.score} has no use with exact --dims: there are no candidates to score")
    if scoring.score == "kl":
        return None
    if scoring.score == "perplexity":
        return lambda model, _, rows, count: perplexity_metric(_some(rows, count))
    if scoring.score == "choice":
        if scoring.questions is None:
            raise SecateurError("--score choice needs --questions, a .jsonl or .parquet file")
        questions = load_questions(scoring.questions, scoring.fraction)
        return lambda model, tokenizer, *_: choice_metric(tokenizer, questions, shots=scoring.shots)
    if ":" not in scoring.score:
        raise SecateurError(
            f"--score: there is no score {scoring.score!r}{nearest(scoring.score, ['kl', 'perplexity', 'choice'])}"
            " (or module:function)"
        )
    metric = load_metric(scoring.score)
    return lambda *_: metric


def _some(rows: Sequence[Any], count: int) -> list[Any]:
    joined = torch.cat(list(rows))[:count]
    return list(torch.split(joined, len(rows[0])))


def _shown(arguments: Arguments) -> dict[str, Any]:
    common, making = arguments.common, arguments.making
    shown = {"seed": common.seed, "device": common.device, "dtype": common.dtype}
    shown |= {**dataclasses.asdict(arguments.reading), **dataclasses.asdict(making), "loss": arguments.loss}
    return {key: str(value) if isinstance(value, Path) else value for key, value in shown.items() if value}


def _draw(console: Console, report: dict[str, Any], out: Path, how_to_load: str) -> None:
    if "search" in report:
        tables.candidates(console, report["search"])
    if "levels" in report:
        tables.front(console, report)
    rows = _masks(report) if "sparsity" in report else _sizes(report) + _costs(report["costs"])
    if "measured" in report:
        rows += _measured(report["measured"])
    tables.table(console, "What was cut, and what it cost", ("", "dense", "pruned", "share"), rows)
    if "unused_tensors" in report:
        first, count = report["unused_tensors"][0], len(report["unused_tensors"])
        console.print(f"left out: {count} tensors of the checkpoint that the model has no place for, such as {first}")
    if report["dropped"]:
        console.print(f"dropped: {', '.join(report['dropped'])}")
    for name in report.get("unreached", [])[:3]:
        console.print(f"no calibration data was seen at {name}: it was masked by magnitude")
    if len(report.get("unreached", [])) > 3:
        console.print(f"and {len(report['unreached']) - 3} weights more (report.json names them)")
    if report.get("more_damping"):
        worst = max(report["more_damping"].values())
        console.print(f"{len(report['more_damping'])} weights took more damping than asked for, up to {worst:g}")
    if report.get("mend", {}).get("method", "none") != "none":
        console.print(_mended(report["mend"]), soft_wrap=True)
    if "batch_norms_adapted" in report:
        console.print(f"the statistics of {report['batch_norms_adapted']} batch norms were estimated anew")
    if "sparsity" in report:
        console.print(
            "Zeros make the compressed file smaller, not the model faster (2:4 alone speeds up large layers, on GPUs "
            "that have it).",
            soft_wrap=True,
        )
    teacher = report["model"]["name"]
    console.print(
        f"Nothing was trained after the cut. To win much of the loss back: secateur distill --teacher {teacher} "
        f"--student {out} --data ... --out ...",
        soft_wrap=True,
    )
    console.print(f"saved in {out} (report.json, plan.json, and {how_to_load})", soft_wrap=True)


def _mended(told: dict[str, Any]) -> str:
    """What the repair came to, in one line."""
    weights, left = told["weights"], len({**told.get("left", {}), **dict.fromkeys(told.get("no_bias", []))})
    rest = f"; {left} weights that lost inputs are as they were cut (report.json names them)" if left else ""
    if told["method"] == "bias":
        return f"repaired: the mean of what is lost was put into the biases of {len(weights)} weights{rest}"
    before, after = (sum(w[key] for w in weights.values()) / max(1, len(weights)) for key in ("before", "after"))
    missed = f"they miss {100 * after:.1f}% of what the dense model has there, and missed {100 * before:.1f}%"
    return f"repaired: {len(weights)} weights by least squares on {told['samples']:,} samples; {missed}{rest}"


def _sizes(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = [
        (name, str(size["dense"]), str(size["pruned"]), tables.share(size["pruned"] or 0, size["dense"]))
        for name, size in report["sizes"].items()
        if size["pruned"] is not None
    ]
    told = {row[0] for row in rows}
    for kind, units in report["units"].items():
        if kind not in told and (len(told) == 0 or units["axes"] > 1):
            label = f"{kind}, in {units['axes']} axes" if units["axes"] > 1 else kind
            rows.append(_counted(label, units))
    return rows


def _costs(costs: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = [_counted("parameters", costs["params"])]
    if costs["active_params"] != costs["params"]:
        rows.append(_counted("parameters that a token meets", costs["active_params"]))
    rows.append(_counted("multiply-accumulates", costs["macs"]))
    memory = costs["memory"]
    label = f"weights + KV cache ({memory['kv_batch']} x {memory['kv_seq_len']})"
    sizes = (tables.bytes_text(memory["dense"]), tables.bytes_text(memory["pruned"]))
    return [*rows, (label, *sizes, tables.share(memory["pruned"], memory["dense"]))]


def _masks(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    masked = report["sparsity"]["masked"]
    left = masked["elements"] - masked["zeros"]
    label = f"weights that stay, in {len(report['sparsity']['tensors'])} masked tensors"
    return [
        _counted(label, {"dense": masked["elements"], "pruned": left}),
        _counted("parameters that are not zero", report["costs"]["nonzero"]),
    ]


def _counted(label: str, count: dict[str, int]) -> tuple[str, str, str, str]:
    share = tables.share(count["pruned"], count["dense"])
    return label, f"{count['dense']:,}", f"{count['pruned']:,}", share


def _measured(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    if "perplexity" in found:
        perplexity = found["perplexity"]
        rows.append(("perplexity, held out", f"{perplexity['dense']:.2f}", f"{perplexity['pruned']:.2f}", ""))
        rows.append(("KL to the dense model", "0", f"{found['kl']:.3f}", ""))
    if "accuracy" in found:
        accuracy, loss = found["accuracy"], found["loss"]
        shown = (f"{100 * accuracy['dense']:.1f}%", f"{100 * accuracy['pruned']:.1f}%")
        rows.append((f"accuracy on {found['samples']:,} held-out samples", *shown, ""))
        rows.append(("loss, held out", f"{loss['dense']:.3f}", f"{loss['pruned']:.3f}", ""))
    rows.append(("top-1 agreement", "100%", f"{100 * found['top1']:.1f}%", ""))
    return rows
