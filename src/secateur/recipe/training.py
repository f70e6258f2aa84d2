"""The steps of a recipe that learn: distillation, fine-tuning, and sparsity that grows while the model trains."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.methods import healing, verbs
from secateur.methods.feeding import steps_of, training_feed
from secateur.methods.iterative import Metric
from secateur.recipe.options import BudgetText, HeldOut, Mixed, Positive, Share, TeacherName, one_of
from secateur.recipe.work import Count, Made, Work, given, open_model, shown
from secateur.train import sparsify as start_sparsity
from secateur.train.options import METHODS as SPARSE_METHODS
from secateur.train.options import RULES
from secateur.train.settings import Training, settings_from

Loss = Callable[[nn.Module, Any], torch.Tensor]
_BEGIN = 0.1  # of the run, where scores must be learned before anything can go


def distill(
    work: Work, *, data: Mixed, teacher: TeacherName = "dense", eval_data: HeldOut | None = None, cache: bool = False,
    teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = None, **distilling: Any,
) -> Made:  # fmt: skip
    """Learn from a teacher: the dense model, or another one that is named."""
    from_dense = isinstance(teacher, str) and teacher == "dense"
    tutor = work.dense if from_dense else open_model(teacher)[0] if isinstance(teacher, str) else teacher
    kept = None if not cache or work.state is None else work.state / "teacher"
    healed = healing.distill(
        tutor, work.model, given("data", data), eval_data=given("eval_data", eval_data),
        plan=work.plan if from_dense else None, cache=kept, teacher_dtype=teacher_dtype, **_common(work), **distilling,
    )  # fmt: skip
    name = teacher if isinstance(teacher, str) else "given model"
    return _made(healed, {"teacher": name}, data, eval_data)


def finetune(
    work: Work, *, data: Mixed, loss: Loss | None = None, eval_data: HeldOut | None = None,
    evaluate: Metric | None = None, higher_is_better: bool = True, **training: Any,
) -> Made:  # fmt: skip
    """Train on the data's own targets, or by a loss of the user's; zeros of a sparse model stay zero."""
    healed = healing.finetune(
        work.model, given("data", data), loss=loss, eval_data=given("eval_data", eval_data), evaluate=evaluate,
        higher_is_better=higher_is_better, **_common(work), **training,
    )  # fmt: skip
    return _made(healed, {}, data, eval_data)


def sparsify(
    work: Work, *, data: Mixed, budget: BudgetText | None = None,
    method: Annotated[str, one_of(SPARSE_METHODS)] = "magnitude",
    schedule: Literal["cubic", "linear", "exponential", "constant"] = "cubic", begin: Share | None = None,
    end: Share = 0.75, frequency: Count | None = None, only: Sequence[str] = (), ignore: Sequence[str] = (),
    scope: Literal["tensor", "row", "global"] | None = None, block: tuple[int, int] | None = None,
    normalize: bool | None = None, mode: Literal["hard", "soft"] | None = None,
    start: Literal["zero", "magnitude"] | None = None, penalty: Positive | None = None, tau: float | None = None,
    mask_decay: float | None = None, exact: bool | None = None, lr_scores: Positive = 0.01, loss: Loss | None = None,
    eval_data: HeldOut | None = None, evaluate: Metric | None = None, higher_is_better: bool = True, **training: Any,
) -> Made:  # fmt: skip
    """Train while more and more weights become zero; `begin` and `end` of the schedule are shares of the run."""
    model = copy.deepcopy(work.model)
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    if any(kind in (torch.float16, torch.bfloat16) for kind in kinds.values()):
        model = model.float()  # small steps get lost in half precision
    told = {**training, "seed": work.seed, "tokenizer": work.tokenizer}
    settings, loading = settings_from(told, Training, others=verbs.LOADING)
    feed = training_feed(model, given("data", data), settings, loading)
    timed = _timed(method, mode, start, schedule, begin, end, frequency, steps_of(settings, feed))
    options: dict[str, Any] = {"scope": scope, "block": block, "normalize": normalize, "mode": mode, "start": start}
    options |= {"penalty": penalty, "tau": tau, "decay": mask_decay, "exact": exact}
    options |= {"seed": work.seed} if method == "rb" else {}
    asked = None if budget is None else verbs.budget_of(budget)
    sparsity = start_sparsity(
        model, asked, method=method, only=only, ignore=ignore, inputs=work.inputs, **timed, **options
    )  # fmt: skip
    healed = healing.finetune(
        model, feed, loss=loss, eval_data=given("eval_data", eval_data), evaluate=evaluate,
        higher_is_better=higher_is_better, sparsity=sparsity, lr_scores=lr_scores, **_common(work), **training,
    )  # fmt: skip
    made = _made(healed, {"method": method, "budget": str(asked or "none")}, data, eval_data)
    for name, tensor in [*made.model.named_parameters(), *made.model.named_buffers()]:
        tensor.data = tensor.data.to(kinds.get(name, tensor.dtype))
    counted = sparsity.statistics()
    report = {
        **made.report,
        "schedule": timed,
        "sparsity": {key: counted[key] for key in ("zeros", "size", "sparsity")},
    }
    plan = sparsity.plan()
    origin = {**plan.origin, "model": work.name}
    return dataclasses.replace(made, report=report, plan=dataclasses.replace(plan, origin=origin))


def _timed(
    method: str, mode: str | None, start: str | None, schedule: str, begin: float | None, end: float,
    frequency: int | None, steps: int,
) -> dict[str, Any]:  # fmt: skip
    """The schedule in steps of the run; nothing for methods without one."""
    rule = RULES["movement soft" if method == "movement" and mode == "soft" else method]
    if rule.schedule == "none":
        return {}
    late = rule.from_start and start != "magnitude"
    share = begin if begin is not None else _BEGIN if late else 0.0
    first = max(round(share * steps), int(late))
    last = max(first + 1, round(end * steps))
    if last > steps:
        raise SecateurError(f"a run of {steps} steps is too short for the schedule: it needs {last} at least")
    return {"schedule": schedule, "begin": first, "end": last, "frequency": frequency or max(1, (last - first) // 50)}


def _common(work: Work) -> dict[str, Any]:
    """What both verbs of healing are told alike; a run of its own continues in a folder of its own."""
    state: Path | None = None if work.state is None else work.state / "run"
    return {"work": state, "tokenizer": work.tokenizer, "seed": work.seed, "track": work.track}


def _made(healed: Any, told: Mapping[str, Any], data: Any, eval_data: Any) -> Made:
    """The result of a training that came to an end, or the error of one that did not."""
    if healed.report["diverged"]:
        raise SecateurError(str(healed.report["stopped"]))
    named = {"training": shown(data), "evaluation": shown(eval_data)}
    return Made(healed.model, {**told, "training": dict(healed.report), "data": named}, trained=True)
