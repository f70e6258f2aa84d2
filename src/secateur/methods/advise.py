"""Whether and how to prune a model for a target: a table of rules, each from facts to advice with its reason.

A strategy says what to do; the first one that applies is the recommendation, so their order is their rank. Cautions say
what not to do, and what to know. Evidence is a number that was measured just now, or one of ours with its page.
"""

from collections.abc import Callable
from dataclasses import dataclass

from secateur.errors import SecateurError, nearest
from secateur.methods.advice import (
    BLOCKS,
    BUNDLED,
    CNN,
    DEEPER,
    INT8_CNN,
    INT8_SHARE,
    LAUNCH_BOUND,
    PRUNED,
    QUANTISED,
    TARGETS,
    TOO_SMALL,
    ZEROS,
    Advice,
    Wish,
    adapt_words,
    bench_command,
    budget_words,
    check_command,
    command,
    distil_command,
    int8_command,
    out,
    percent,
    prune_command,
    two_four_pays,
)
from secateur.methods.cautions import WARNINGS
from secateur.methods.facts import Facts
from secateur.space.trace import CANNOT_TRACE

Rule = Callable[[Facts, Wish], Advice | None]


@dataclass(frozen=True)
class Recommendation:
    """All that the rules say.

    Attributes:
        best: the recommended strategy.
        others: strategies that would do as well, in their order.
        warnings: when not to prune, and what to know.
    """

    best: Advice
    others: tuple[Advice, ...]
    warnings: tuple[Advice, ...]


def recommend(facts: Facts, wish: Wish) -> Recommendation:
    """Apply every rule.

    Raises:
        SecateurError: for a target that there is not.
    """
    if wish.target not in TARGETS:
        raise SecateurError(f"there is no target {wish.target!r}{nearest(wish.target, TARGETS)}")
    ways = [found for rule in STRATEGIES if (found := rule(facts, wish)) is not None]
    if facts.untraced is not None:
        ways = [way for way in ways if way.rule.startswith("masks")]
    told = [found for rule in WARNINGS if (found := rule(facts, wish)) is not None]
    # The last rule is for what no other structural one is made for.
    others = [way for way in ways[1:3] if way.rule != "structure" or ways[0].rule not in _STRUCTURAL]
    return Recommendation(ways[0], tuple(others), tuple(told))


# --- strategies, the first that applies is recommended ---


def quantise_alone(facts: Facts, wish: Wish) -> Advice | None:
    """A memory budget that INT8 meets by itself."""
    share, int8 = wish.share("memory", facts.bytes), INT8_SHARE.get(facts.dtype)
    if share is None or int8 is None or set(wish.budget.limits) != {"memory"} or share < int8:
        return None
    cache = " A key/value cache comes on top." if facts.language else ""
    return Advice(
        "quantise_alone",
        f"Do not prune: INT8 alone comes to about {percent(int8)} of the bytes, and {percent(share)} are allowed.",
        f"8 bits for each weight lose far less than weights that are gone.{cache}{_elsewhere(wish)}",
        f"{QUANTISED}; {PRUNED}",
        (
            int8_command(facts, wish, facts.name, out(facts, "model.onnx")),
            check_command(facts, wish, out(facts, "model_int8.onnx")),
        ),
    )


def prune_then_int8(facts: Facts, wish: Wish) -> Advice | None:
    """A memory budget that takes INT8 and a cut."""
    share, int8 = wish.share("memory", facts.bytes), INT8_SHARE.get(facts.dtype)
    if share is None or int8 is None or set(wish.budget.limits) != {"memory"} or facts.untraced is not None:
        return None
    left = share / int8
    if not TOO_SMALL <= left < 1:
        return None
    return Advice(
        "prune_then_int8",
        f"Prune to {percent(left)} of the parameters, distil, then INT8: together {percent(share)} of the bytes.",
        f"INT8 comes first, because it costs less for each byte; the cut makes up for the rest.{_elsewhere(wish)}",
        f"{QUANTISED}; {PRUNED}; that both add up is to be checked",
        (
            prune_command(
                facts,
                wish,
                out(facts, "pruned"),
                "--method",
                "search",
                "--budget",
                f"params={percent(left)}",
                *adapt_words(facts),
            ),
            distil_command(facts, wish, out(facts, "pruned")),
            int8_command(facts, wish, out(facts, "pruned-healed"), out(facts, "model.onnx")),
            check_command(facts, wish, out(facts, "model_int8.onnx")),
        ),
    )


def _elsewhere(wish: Wish) -> str:
    """Our INT8 files are for ONNX Runtime on CPUs."""
    other = wish.target in ("gpu", "llm-serving")
    return " The commands write a file for CPUs; on a GPU take your server's own 8 or 4 bits." if other else ""


def leave_it(facts: Facts, wish: Wish) -> Advice | None:
    """A model whose time is overhead, where nothing but speed can be the wish."""
    small = facts.busy is not None and facts.busy < LAUNCH_BOUND
    if not small or wish.budget.limits or wish.target == "llm-serving":
        return None
    return Advice(
        "leave_it",
        "Do not prune for speed: export it to a runtime with less overhead, and measure that."
        if wish.target != "gpu"
        else "Do not prune for speed: run larger batches, or compile it, and measure again.",
        "Most of the time is not in products, and smaller products save only their own time. Prune if it must be "
        "smaller: say so with --budget.",
        f"measured: {percent(facts.busy or 0)} of {1e3 * (facts.seconds or 0):.2f} ms ({facts.passed}) is in products",
        (
            *([int8_command(facts, wish, facts.name, out(facts, "model.onnx"))] if wish.target != "gpu" else []),
            bench_command(facts, wish),
        ),
    )


def train_smaller(facts: Facts, wish: Wish) -> Advice | None:
    """A budget beyond what a cut and a little training give back."""
    share = wish.share("params", facts.params)
    if share is None or share >= TOO_SMALL:
        return None
    return Advice(
        "train_smaller",
        f"Take or train a smaller model: {percent(share)} of the parameters is beyond what pruning gives back.",
        "What a cut keeps is a good beginning for training, and no longer a good model. Where you have tokens to "
        "train on, cut and distil for long: it still begins far ahead of random weights.",
        f"loss grows fast: {PRUNED}, {DEEPER}; below {percent(TOO_SMALL)} we have not measured",
        (
            prune_command(facts, wish, out(facts, "pruned"), "--method", "search", *budget_words(wish, "params=30%")),
            distil_command(facts, wish, out(facts, "pruned")),
        ),
    )


def masks_for_gpu(facts: Facts, wish: Wish) -> Advice | None:
    """Zeros were asked for, and this GPU may use them."""
    if wish.budget.n_m != (2, 4) or wish.target not in ("gpu", "llm-serving") or not two_four_pays(facts):
        return None
    return Advice(
        "masks_for_gpu",
        "Make the weights 2:4 with alps, train a little with the masks held, and pack them.",
        f"This GPU has kernels for 2:4, and the products are large (up to {facts.product} on the smaller side).",
        f"compute capability {facts.machine.capability}; alps at 2:4 lost 27% of perplexity untrained (15.99 -> 20.25, "
        "docs/sparsity.md)",
        (
            prune_command(facts, wish, out(facts, "2-4"), "--method", "alps", "--budget", "n:m=2:4"),
            distil_command(facts, wish, out(facts, "2-4")),
            command("export", out(facts, "2-4-healed"), "--format", "semi-structured", "--device", "cuda", "--dtype",
                    "float16", "--out", out(facts, "packed.json")),
        ),
    )  # fmt: skip


def masks_for_size(facts: Facts, wish: Wish) -> Advice | None:
    """Zeros were asked for: they save bytes of compressed files, and no time."""
    if "sparsity" not in wish.budget.limits and wish.budget.n_m is None:
        return None
    return Advice(
        "masks_for_size",
        "Mask with alps, for a smaller compressed file alone: nothing here runs faster for zeros.",
        "Kernels multiply zeros like other numbers. For speed remove structure in place of single weights.",
        ZEROS,
        (
            prune_command(facts, wish, out(facts, "masked"), "--method", "alps", "--budget", *_zeros_words(wish)),
            command("stats", out(facts, "masked"), "--gzip"),
        ),
    )


def masks_only(facts: Facts, wish: Wish) -> Advice | None:
    """A model that cannot be traced."""
    if facts.untraced is None:
        return None
    hidden = facts.untraced.startswith(CANNOT_TRACE)  # from the exporter too
    first = "Make it traceable: exporting, INT8 and cuts all need that." if hidden else "Quantise it."
    return Advice(
        "masks_only",
        f"{first} Of pruning there are masks alone: no structure of this model can be cut.",
        f"Its structure cannot be followed: {facts.untraced[:300]}",
        ZEROS,
        (
            *([] if hidden else [int8_command(facts, wish, facts.name, out(facts, "model.onnx"))]),
            prune_command(facts, wish, out(facts, "masked"), "--method", "alps", "--budget", "sparsity=50%"),
        ),
    )


def to_latency(facts: Facts, wish: Wish) -> Advice | None:
    """A latency budget is served by measured times."""
    if "latency" not in wish.budget.limits:
        return None
    return Advice(
        "to_latency",
        "Search under the latency itself, measured on the device where the model will run.",
        "Multiply-accumulates do not tell time. Search times every part at several sizes, and the result at the end.",
        "predicted against measured: within 5%, on a busier machine within 8% (docs/latency.md)",
        (
            prune_command(
                facts,
                wish,
                out(facts, "pruned"),
                "--method",
                "search",
                *budget_words(wish, "latency=70%"),
                *adapt_words(facts),
            ),
            distil_command(facts, wish, out(facts, "pruned")),
            bench_command(facts, wish, out(facts, "pruned-healed")),
        ),
    )


def experts(facts: Facts, wish: Wish) -> Advice | None:
    """A mixture of experts: whole experts go first."""
    if "experts" not in facts.kinds:
        return None
    others = [kind for kind in facts.kinds if kind not in ("experts", "attention", "mlp", "channels", "rank")]
    return Advice(
        "experts",
        "Remove whole experts, those with the least gated output, and leave the rest as it is.",
        f"Experts hold {percent(facts.shares.get('experts', 0))} of the parameters, and a token meets few of them: "
        "fewer experts save memory and no time. Active parameters are a budget of their own (active_params).",
        "REAP, Lasby et al. 2025 (docs/minitron.md); not measured by us on a model of size",
        (
            prune_command(
                facts,
                wish,
                out(facts, "pruned"),
                "--method",
                "minitron",
                *budget_words(wish, "params=75%"),
                "--skip",
                *others,
            ),
            distil_command(facts, wish, out(facts, "pruned")),
            check_command(facts, wish, out(facts, "pruned-healed")),
        ),
    )


def convolutions(facts: Facts, wish: Wish) -> Advice | None:
    """A network of convolutions: fewer channels, batch norm again, fine-tuning, INT8."""
    if facts.language or facts.shares.get("convolutions", 0) <= 0.5:
        return None
    small = wish.target == "mobile" or (wish.target == "cpu" and bool(facts.machine.int8))
    last = int8_command(facts, wish, out(facts, "pruned-healed"), out(facts, "model.onnx")) if small else None
    commands = [
        prune_command(
            facts,
            wish,
            out(facts, "pruned"),
            "--method",
            "search",
            *budget_words(wish, "macs=50%"),
            "--round-to",
            "16",
            *adapt_words(facts),
        ),
        distil_command(facts, wish, out(facts, "pruned")),
        *([last] if last else []),
        bench_command(facts, wish, out(facts, "pruned-healed")),
        check_command(facts, wish, out(facts, "pruned-healed")),
    ]
    return Advice(
        "convolutions",
        f"Remove channels by search, to {wish.budget if wish.budget.limits else 'half of the multiply-accumulates'}, "
        "then train for a few epochs" + (", then INT8 (static)." if small else "."),
        "Removed channels are the one cut that every runtime turns into time, as long as what stays is in multiples of "
        "16: convolutions on CPUs work on blocks of channels.",
        f"{CNN}; {BLOCKS}" + (f"; {INT8_CNN}" if small else ""),
        tuple(commands),
    )


def serve(facts: Facts, wish: Wish) -> Advice | None:
    """Serving a language model: bytes first, then a uniform cut that servers load."""
    if wish.target != "llm-serving" or not facts.language:
        return None
    return Advice(
        "serve",
        "Quantise first, with your server's own tool (8 or 4 bits). If that is not enough, cut depth and width, "
        "alike in all layers, and distil.",
        "Decoding reads every weight for every token: it is bound by bytes, so fewer bits pay before fewer weights. "
        "vLLM, TensorRT-LLM and llama.cpp load uniform sizes alone.",
        f"{QUANTISED}; uniform search at 70% lost 27% before training, free sizes 16% (20.26, 18.56; README)",
        (
            prune_command(facts, wish, out(facts, "pruned"), "--method", "search", *budget_words(wish, "params=70%")),
            distil_command(facts, wish, out(facts, "pruned")),
            bench_command(facts, wish, out(facts, "pruned-healed")),
            check_command(facts, wish, out(facts, "pruned-healed")),
        ),
    )


def structure(facts: Facts, wish: Wish) -> Advice | None:
    """Any other model: search, training, then INT8 where the target has it."""
    free = facts.language and wish.target in ("cpu", "mobile")
    small = wish.target == "mobile" or (wish.target == "cpu" and bool(facts.machine.int8))
    sizes = ("--uniform", "False") if free else ()
    commands = [
        prune_command(
            facts,
            wish,
            out(facts, "pruned"),
            "--method",
            "search",
            *budget_words(wish, "params=70%"),
            *sizes,
            *adapt_words(facts),
        ),
        distil_command(facts, wish, out(facts, "pruned")),
        *([int8_command(facts, wish, out(facts, "pruned-healed"), out(facts, "model.onnx"))] if small else []),
        bench_command(facts, wish, out(facts, "pruned-healed")),
        check_command(facts, wish, out(facts, "pruned-healed")),
    ]
    return Advice(
        "structure",
        f"Remove structure by search, to {wish.budget if wish.budget.limits else 'params=70%'}, then distil"
        + (", then INT8." if small else "."),
        "Smaller sizes are faster in every runtime"
        + ("; each layer gets its own, which ONNX takes as it is." if free else "."),
        f"{PRUNED}, {DEEPER}; {BUNDLED}",
        tuple(commands),
    )


def _zeros_words(wish: Wish) -> list[str]:
    if wish.budget.n_m is not None:
        return [f"n:m={wish.budget.n_m[0]}:{wish.budget.n_m[1]}"]
    return [f"sparsity={100 * wish.budget.limits['sparsity'].value:g}%"]


_STRUCTURAL = ("to_latency", "experts", "convolutions", "serve", "prune_then_int8")
STRATEGIES: tuple[Rule, ...] = (
    *(masks_for_gpu, masks_for_size, masks_only, quantise_alone, prune_then_int8, train_smaller),
    *(to_latency, leave_it, experts, convolutions, serve, structure),
)
"""What to do, by rank; the last one always applies."""
