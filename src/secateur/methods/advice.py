"""Advice in words: what the user wants, what a rule says, the commands, and the numbers of ours that rules rest on."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from secateur.choose.budget import Budget
from secateur.methods.facts import Facts

TARGETS = ("cpu", "gpu", "mobile", "llm-serving")
INT8_SHARE = {"float32": 0.27, "bfloat16": 0.54, "float16": 0.54}
"""Bytes of an INT8 file as a share of the model's, as measured on the bundled model (docs/export.md)."""
LAUNCH_BOUND = 0.4
"""Where less than this share of the time is in products, smaller products save little."""
SMALL_PRODUCT = 1024
"""Smallest side of a product below which 2:4 kernels are not worth it."""
TOO_SMALL = 0.3
"""Share of the parameters below which a smaller model should be trained."""

PLACEHOLDERS = ("calibration.jsonl", "new.jsonl", "my_data:batches", "my_data:new", "my_data:example")
"""What commands say where the user's data goes that we do not know."""

QUANTISED = "INT8 (dynamic, ONNX) lost 0.8% of perplexity at 27% of the float32 bytes (15.99 -> 16.12, docs/export.md)"
PRUNED = (
    "the best cut to 70% of the parameters lost 16% before training and 7% after distilling on 1M tokens "
    "(15.99 -> 18.56 -> 17.08, docs/distill.md)"
)
DEEPER = "at 50% it was 72% and 19% (27.51, 19.03; docs/distill.md)"
CNN = (
    "at half the MACs search kept 86.7% accuracy of 89.6%, 86.9% with batch norm estimated again and 88.6% after 2 "
    "epochs (benchmarks/README.md)"
)
BLOCKS = (
    "half the MACs of the digits CNN in ONNX Runtime: 1.54 times as fast with multiples of 16 channels, 0.60 times "
    "with any number (docs/what-gets-faster.md)"
)
INT8_CNN = "INT8 (static, ONNX) kept 89.6% accuracy of 89.6% at 29% of the float32 bytes (docs/export.md)"
ZEROS = "the best masks (alps) lost 8% of perplexity at 50% zeros and 48% at 70% (17.20, 23.64; docs/sparsity.md)"
BUNDLED = "on the bundled model: a small one, trained to its limit; larger ones lose less"


@dataclass(frozen=True)
class Wish:
    """What the user wants.

    Attributes:
        target: one of `TARGETS`.
        budget: what the result may cost; no limit where nothing was said.
        data: what --data says; None where it was not given.
        inputs: words that say the example inputs, such as ``--input-shape 1,3,32,32``.
    """

    target: str
    budget: Budget = field(default_factory=Budget)
    data: str | None = None
    inputs: tuple[str, ...] = ()

    def share(self, measure: str, dense: float) -> float | None:
        """A limit as a share of what the dense model costs; None where there is none."""
        limit = self.budget.limits.get(measure)
        return None if limit is None or not dense else (limit.value if limit.share else limit.value / dense)


@dataclass(frozen=True)
class Advice:
    """What one rule says.

    Attributes:
        rule: its name.
        what: in a sentence.
        why: the reason.
        evidence: the number that it rests on, and where it is from.
        commands: to run, in order.
    """

    rule: str
    what: str
    why: str
    evidence: str = ""
    commands: tuple[str, ...] = ()


# --- commands ---


def command(*words: str | None) -> str:
    """A command of this tool, as it is typed; None is left out."""
    return "secateur " + shlex.join(word for word in words if word is not None)


def out(facts: Facts, name: str) -> str:
    """Where a command writes: never where the model itself is, which may be a result of ours."""
    return f"{facts.name}-next/{name}" if Path(facts.name).parts[:1] == ("out",) else f"out/{name}"


def prune_command(facts: Facts, wish: Wish, out: str, *words: str) -> str:
    """Prune the model to `out`."""
    data = wish.data or _placeholder(facts)
    return command("prune", facts.name, "--out", out, *words, "--data", data, *wish.inputs)


def distil_command(facts: Facts, wish: Wish, student: str) -> str:
    """Teach a pruned model what the dense one says."""
    data = wish.data or _placeholder(facts)
    amount = ("--tokens", "10M") if facts.language else ("--epochs", "2")
    kept = ("--teacher", facts.name, "--student", student, "--out", f"{student}-healed")
    return command("distill", *kept, "--data", data, *amount)


def int8_command(facts: Facts, wish: Wish, model: str, out: str) -> str:
    """Write an INT8 file: static for convolutions, dynamic for others."""
    static = facts.shares.get("convolutions", 0) > 0.5
    mode = ("static", "--data", wish.data or _placeholder(facts)) if static else ("dynamic",)
    return command("export", model, "--out", out, "--int8", *mode, *wish.inputs)


def check_command(facts: Facts, wish: Wish, model: str) -> str:
    """The gate for a result."""
    data = "new.jsonl" if facts.language else "my_data:new"
    most = ("--max-loss-increase", "5%") if facts.language else ("--max-accuracy-drop", "1pt")
    return command("check", model, "--against", facts.name, "--data", data, *most)


def bench_command(facts: Facts, wish: Wish, *models: str) -> str:
    """Time models beside the dense one, all in a type that ONNX Runtime computes in."""
    onnx = ["--onnx"] if wish.target in ("cpu", "mobile") else []
    dtype = ["--dtype", "float32"] if onnx and facts.dtype == "bfloat16" else []
    return command("bench", facts.name, *models, *wish.inputs, *onnx, *dtype)


def _placeholder(facts: Facts) -> str:
    return "calibration.jsonl" if facts.language else "my_data:batches"


def budget_words(wish: Wish, default: str) -> list[str]:
    """The words of --budget: what the user said, without what other steps serve."""
    said = [part.strip() for part in str(wish.budget).split(",")] if wish.budget.limits else [default]
    return ["--budget", *said]


def percent(share: float) -> str:
    """A share in whole per cent."""
    return f"{100 * share:.0f}%"


def adapt_words(facts: Facts) -> list[str]:
    """The option that networks with batch norm need."""
    return ["--adapt-batch-norm"] if facts.batch_norms else []


def two_four_pays(facts: Facts) -> bool:
    """Whether this GPU has kernels for 2:4 and the products are large enough for them."""
    capability = facts.machine.capability
    return capability is not None and capability >= (8, 0) and facts.product >= SMALL_PRODUCT
