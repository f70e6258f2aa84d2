"""What each method of training-time sparsity takes, and what it contradicts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from secateur.choose.budget import Budget
from secateur.choose.mask import NM, Block, Layout
from secateur.errors import SecateurError, nearest
from secateur.train.schedule import Constant, Schedule


@dataclass(frozen=True)
class Rule:
    """One method.

    Attributes:
        kind: of its `Masked`.
        options: with their defaults.
        budgets: what it takes: ``sparsity``, ``n:m``; none = it takes no budget.
        schedule: whether one is ``needed``, ``optional`` or ``none``.
        every_step: masks are chosen anew at every step, as they depend on what was just learned.
        from_start: scores are zero before training (unless they start from magnitude), so nothing can be chosen then.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    budgets: tuple[str, ...] = ("sparsity", "n:m")
    schedule: str = "needed"
    every_step: bool = False
    from_start: bool = False


_LAYOUT: Mapping[str, Any] = {"scope": "tensor", "block": (1, 1)}
RULES: Mapping[str, Rule] = {
    "magnitude": Rule("held", {**_LAYOUT, "normalize": False}),
    "movement": Rule("hard", {"mode": "hard", "start": "zero", **_LAYOUT}, every_step=True, from_start=True),
    "movement soft": Rule("soft", {"mode": "soft", "penalty": None, "tau": 0.1}, budgets=(), schedule="optional"),
    "weight_change": Rule("held", _LAYOUT, from_start=True),
    "rb": Rule("gates", {"exact": True, "seed": 0}, budgets=("sparsity",)),
    "sr_ste": Rule("dense", {"decay": 2e-4}, budgets=("n:m",), schedule="optional", every_step=True),
    "fixed": Rule("held", {"masks": None}, budgets=(), schedule="none"),
}
STARTS = ("zero", "magnitude")
METHODS = tuple(name for name in RULES if " " not in name)


@dataclass(frozen=True)
class Settings:
    """All choices of a run, checked.

    Attributes:
        method: its name.
        rule: what it is like.
        budget: as it was given; None for methods without one.
        schedule: None for `fixed` alone.
        layout: which elements compete, and N:M.
        options: of the method, defaults filled in; masks are not among them.
    """

    method: str
    rule: Rule
    budget: Budget | None
    schedule: Schedule | None
    layout: Layout
    options: Mapping[str, Any]

    @property
    def final(self) -> float:
        """Sparsity of the budget; 1 for a penalty, whose share of its full weight the schedule gives."""
        return 1.0 if self.budget is None else self.budget.sparsity()

    def layout_at(self, sparsity: float) -> Layout:
        """The layout at a sparsity on the way: N of N:M falls from M to the budget's."""
        if self.layout.n_m is None:
            return self.layout
        return Layout(self.layout.scope, self.n_m_at(sparsity), self.layout.block)

    def n_m_at(self, sparsity: float) -> NM:
        """N:M at a sparsity on the way, the largest N that does not fall short of the budget's."""
        n, m = self.layout.n_m or (1, 1)
        return max(n, m - int(sparsity * m + 1e-6)), m

    def record(self) -> dict[str, Any]:
        """Plain values, to be compared when a state is loaded."""
        return {
            "method": self.method,
            "budget": None if self.budget is None else str(self.budget),
            "schedule": None if self.schedule is None else self.schedule.record(),
            **self.options,
            **{name: value for name, value in asdict(self.layout).items() if name in self.options},
        }


def settings_of(
    method: str, budget: str | Sequence[str] | Budget | None, schedule: Schedule | None, given: Mapping[str, Any]
) -> Settings:
    """Check a method, its budget, schedule and options against each other.

    Args:
        method: one of METHODS.
        budget: as `Budget.parse` takes it.
        schedule: or None.
        given: options by name, None where not given.

    Raises:
        SecateurError: for anything unknown or contradictory, with both sides.
    """
    if method not in METHODS:
        raise SecateurError(f"there is no training method {method!r}{nearest(method, METHODS)}")
    asked = {name: value for name, value in given.items() if value is not None}
    mode = asked.get("mode", "hard")
    if method == "movement" and mode not in ("hard", "soft"):
        raise SecateurError(f"movement has no mode {mode!r}{nearest(str(mode), ('hard', 'soft'))}")
    key = "movement soft" if method == "movement" and mode == "soft" else method
    title = f"movement with mode={mode!r}" if method == "movement" else f"method {method!r}"
    rule = RULES[key]
    for name in asked:
        if name not in rule.options:
            homes = [k for k, r in RULES.items() if name in r.options]
            known = ", ".join(rule.options)
            raise SecateurError(
                f"{title} takes no option {name!r}, which is for {' and '.join(homes)}; it takes: {known}"
            )
    options = {name: asked.get(name, default) for name, default in rule.options.items() if name != "masks"}
    _check_values(title, options)
    parsed = _budget(title, rule, budget)
    layout = _layout(title, asked, options, parsed)
    at_once = not rule.from_start or options.get("start") == "magnitude"
    own = _schedule(title, rule, schedule, parsed, at_once=at_once)
    return Settings(method, rule, parsed, own, layout, options)


def _check_values(title: str, options: Mapping[str, Any]) -> None:
    if options.get("start", "zero") not in STARTS:
        raise SecateurError(f"{title} has no start {options['start']!r}{nearest(str(options['start']), STARTS)}")
    if "penalty" in options and (options["penalty"] is None or not options["penalty"] > 0):
        raise SecateurError(
            f"{title} needs a penalty above 0, such as penalty=1.0, not {options['penalty']}: it has no budget"
        )
    if "tau" in options and not 0 < options["tau"] < 0.5:
        raise SecateurError(
            f"tau={options['tau']:g} must be in (0, 0.5): scores start at 0, where sigmoid is 0.5, and all is kept"
        )
    if "decay" in options and not options["decay"] >= 0:
        raise SecateurError(f"decay={options['decay']:g} must not be negative")
    if options.get("normalize") and options["scope"] != "global":
        raise SecateurError(
            f"normalize makes weights of different tensors alike, and scope {options['scope']!r} does not compare "
            "those: say scope='global'"
        )


def _budget(title: str, rule: Rule, budget: str | Sequence[str] | Budget | None) -> Budget | None:
    if budget is not None and not isinstance(budget, Budget):
        budget = Budget.parse(budget)
    empty = budget is None or not (budget.limits or budget.dims or budget.n_m)
    if not rule.budgets:
        if not empty:
            why = "its penalty decides how much goes" if "penalty" in rule.options else "it holds masks as they are"
            raise SecateurError(f"{title} takes no budget ({budget}): {why}")
        return None
    if budget is None or empty:
        ways = {"sparsity": "sparsity=90%", "n:m": "n:m=2:4"}
        raise SecateurError(f"{title} needs a budget, such as {' or '.join(ways[kind] for kind in rule.budgets)}")
    budget.sparsity()
    if budget.n_m is None and "sparsity" not in rule.budgets:
        raise SecateurError(f"{title} keeps N of every M, and the budget is {budget}: give n:m=2:4")
    if budget.n_m is not None and "n:m" not in rule.budgets:
        raise SecateurError(f"{title} learns how much goes where, and the budget is {budget}: give sparsity=50%")
    return budget


def _layout(title: str, asked: Mapping[str, Any], options: Mapping[str, Any], budget: Budget | None) -> Layout:
    n_m = None if budget is None else budget.n_m
    if n_m is not None and "scope" in asked:
        text = f"n:m={n_m[0]}:{n_m[1]} compares within groups of {n_m[1]}"
        raise SecateurError(f"{title}: {text}, and scope {asked['scope']!r} contradicts it: leave scope out")
    block = options.get("block", (1, 1))
    if not isinstance(block, tuple | list) or len(block) != 2:
        raise SecateurError(f"{title}: block {block!r} must be two numbers, the rows and columns of a tile")
    tile: Block = (int(block[0]), int(block[1]))
    return Layout(options.get("scope", "global" if n_m is None else "tensor"), n_m, tile)


def _schedule(
    title: str, rule: Rule, schedule: Schedule | None, budget: Budget | None, *, at_once: bool
) -> Schedule | None:
    if rule.schedule == "none":
        if schedule is not None:
            raise SecateurError(f"{title} takes no schedule ({schedule.name}): it holds masks as they are")
        return None
    if schedule is None:
        if rule.schedule == "needed":
            raise SecateurError(
                f"{title} needs a schedule, such as secateur.train.Cubic(begin=0, end=1000, frequency=10)"
            )
        schedule = Constant()
    final = 1.0 if budget is None else budget.sparsity()
    schedule.check(final)
    if not at_once and schedule.sparsity(0, final) > 0:
        raise SecateurError(
            f"{title} scores what training has changed, and {schedule.name} takes weights away at {schedule.per} 0: "
            "begin later, with an initial sparsity of 0"
        )
    return schedule
