"""Repeated steps: how many rounds there are, and what each of them cuts, known before anything is done."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from secateur.choose.budget import Budget
from secateur.errors import SecateurError
from secateur.methods.verbs import budget_of
from secateur.recipe.conflicts import Placed
from secateur.recipe.options import at_least
from secateur.recipe.pipeline import Step
from secateur.recipe.steps import CUTTING

MEASURES = ("params", "active_params", "macs", "flops")
"""What is left of a model as shares of it, one cut after the other."""
_MOST = 50


def check_until(name: str, value: str) -> None:
    """Raise SecateurError for what is no share of one measure."""
    try:
        share_of(value)
    except SecateurError as error:
        raise SecateurError(f"{name}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """How often: one of the two."""

    times: Annotated[int, at_least(1)] | None = None
    until: Annotated[str, check_until] | None = None


def share_of(budget: Any) -> tuple[str, float]:
    """(measure, share) of a budget that leaves a share of one measure.

    Raises:
        SecateurError: It is anything else.
    """
    asked: Budget = budget_of(budget)
    measure, limit = next(iter(asked.limits.items()), ("", None))
    if len(asked.limits) != 1 or limit is None or not limit.share or asked.dims or asked.n_m or measure not in MEASURES:
        raise SecateurError(f"budget {asked} must be a percentage of {', '.join(MEASURES)} alone, such as params=70%")
    return measure, limit.value


def rounds_until(share: float, until: float, left: float = 1.0) -> list[float]:
    """What each cut leaves of the model as it then is, so that the last one lands on a share of the first model.

    Args:
        share: that each cut leaves, in (0, 1).
        until: share of the first model.
        left: share of it that is there before the first round.
    """
    found: list[float] = []
    while left > until * (1 + 1e-9):
        found.append(max(share, until / left))
        left *= found[-1]
    return found


def problems(
    told: Mapping[str, Any], steps: Sequence[Placed], before: Sequence[Placed]
) -> Iterator[tuple[int | None, str]]:
    """(index of the step, or None for the repeat itself; what is wrong).

    Args:
        told: times and until, as far as they are sound.
        steps: of one round.
        before: the steps before the repeat.
    """
    given = [name for name in ("times", "until") if told.get(name) is not None]
    if len(given) != 1:
        yield None, "repeat needs times or until, one of them, such as times: 3 or until: params=35%"
    cuts = [(i, one) for i, one in enumerate(steps) if one.step.name in CUTTING and "budget" in one.step.arguments]
    shares: list[tuple[str, float]] = []
    for i, one in cuts:
        try:
            shares.append(share_of(one.step.arguments["budget"]))
        except SecateurError as error:
            yield i, f"{error}: within repeat it is of the model as it then is, and every round must leave less"
    if len(shares) < len(cuts):
        return
    if len({measure for measure, _ in shares}) > 1:
        yield cuts[1][0], f"budgets within a repeat must be of one measure, not {' and '.join(m for m, _ in shares)}"
    if told.get("until") is None:
        return
    measure, until = share_of(told["until"])
    prunes = [one for _, one in cuts if one.step.name == "prune"]
    if len(cuts) != 1 or len(prunes) != 1:
        yield None, f"until needs exactly one prune within the repeat, and there are {len(cuts)} cuts: say times"
    elif shares[0][0] != measure:
        yield (
            cuts[0][0],
            f"it cuts {shares[0][0]}, and the repeat goes until {told['until']}: give both the same measure",
        )
    elif shares[0][1] >= 1:
        yield cuts[0][0], f"a budget of {measure}=100% never gets to {told['until']}"
    else:
        left = left_before(measure, before)
        count = len(rounds_until(shares[0][1], until, left))
        if not 1 <= count <= _MOST:
            text = f"the steps before leave {100 * left:.4g}% already" if not count else f"takes {count} rounds"
            yield None, f"until {told['until']}: {text}; at least 1 and at most {_MOST} make sense"


def left_before(measure: str, before: Sequence[Placed]) -> float:
    """The share of a measure that the steps before leave, as far as their budgets say so."""
    left = 1.0
    for one in before:
        if one.step.name in CUTTING:
            try:
                known, share = share_of(one.step.arguments["budget"])
            except (SecateurError, KeyError):
                continue
            left *= share if known == measure else 1.0
    return left


def unrolled(told: Mapping[str, Any], steps: Sequence[Placed], before: Sequence[Placed]) -> list[Placed]:
    """The steps of all rounds, one after the other; of a repeat without `problems`."""
    if told.get("until") is None:
        times = int(told["times"])
        return [_in_round(one, number, times) for number in range(1, times + 1) for one in steps]
    measure, until = share_of(told["until"])
    cut = next(one for one in steps if one.step.name == "prune")
    shares = rounds_until(share_of(cut.step.arguments["budget"])[1], until, left_before(measure, before))
    found: list[Placed] = []
    for number, share in enumerate(shares, start=1):
        for one in steps:
            placed = _in_round(one, number, len(shares))
            if one is cut and number == len(shares):
                budget = {"budget": f"{measure}={100 * share:.6g}%"}
                step: Step = replace(
                    placed.step, arguments={**placed.step.arguments, **budget}, said={**placed.step.said, **budget},
                    lands=(measure, until),
                )  # fmt: skip
                placed = replace(placed, step=step)
            found.append(placed)
    return found


def _in_round(one: Placed, number: int, count: int) -> Placed:
    return replace(one, step=replace(one.step, round=f"{number} of {count}"))
