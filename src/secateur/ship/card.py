"""The model card of a result: what was done to which model, what it cost, how to load and to replay it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.load.model import is_hub_id


def model_card(report: Mapping[str, Any], *, kind: str = "stock") -> str:
    """The README.md of a result: what was done to which model, what it cost, how to load and to replay it.

    Args:
        report: of the run; only what is there is written about.
        kind: how the folder is loaded: by "stock" transformers, by transformers with the folder's "modeling" file, or
            by Secateur from a "constructor".

    Returns:
        Markdown with YAML front matter.
    """
    origin = report.get("model", {})
    name = str(origin.get("name", ""))
    hub = is_hub_id(name)
    shown = f"[{name}](https://huggingface.co/{name})" if hub else f"`{Path(name).name}`" if name else "a dense model"
    library = "pytorch" if kind == "constructor" else "transformers"
    lines = ["---", f"library_name: {library}", "tags:", "- secateur", "- pruned"]
    lines += [f"base_model: {name}"] if hub else []
    done = "distilled" if report.get("method") == "distill" else "pruned"
    title = f"{Path(name).name}, {done}" if name else f"A {done} model"
    method = f" by the method `{report['method']}`" if "method" in report else ""
    version = f" {report['secateur']}" if "secateur" in report else ""
    if "teacher" in report:
        method = f" from `{_short(report['teacher']['name'])}`"
    lines += ["---", "", f"# {title}", "", f"This is {shown}, {done} with Secateur{version}{method}."]
    if not report.get("training"):
        lines += ["Nothing was trained after the cut."]
    lines += ["", *_facts(report)]
    lines += _section("Sizes", _table("dimension", report.get("sizes", {})))
    dropped = report.get("dropped") or []
    lines += _section("Dropped", [", ".join(f"`{block}`" for block in dropped)] if dropped else [])
    measured = report.get("measured", {})
    on = measured.get("data") or report.get("data", {}).get("evaluation", "")
    tokens = f"{measured['tokens']:,} tokens" if "tokens" in measured else ""
    numbers = {key: value for key, value in measured.items() if key not in ("data", "tokens")}
    table = _table("cost", {**report.get("costs", {}), **numbers})
    note = " of ".join(filter(None, [tokens, f"`{_short(on)}`" if on else ""]))
    lines += _section("What it cost", [*table, "", f"Quality was measured on {note}."] if table and note else table)
    replay = _HOW_TO_REPLAY if report.get("plan", "saved") == "saved" else f"The plan was {report['plan']}."
    lines += ["## Use", "", *_HOW_TO_LOAD[kind].splitlines(), "", *replay.splitlines()]
    return "\n".join(lines).rstrip() + "\n"


_HOW_TO_LOAD = {
    "stock": """\
Stock transformers loads this folder; Secateur is not needed.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
""",
    "modeling": """\
Its layers have sizes that no stock config describes. Stock transformers loads this folder by running the small
`modeling_secateur.py` in it, which needs nothing but torch and transformers:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
```

Secateur loads it without running a file of the folder: `secateur.load("path/to/this/folder")`.
""",
    "constructor": """\
Secateur builds the dense model with the code named in `structure.json`, which must be importable, and cuts it:

```python
import secateur

model = secateur.load("path/to/this/folder")
```
""",
}
_HOW_TO_REPLAY = """\
`plan.json` and `plan.safetensors` say which units or weights stayed. To make the same cut again, from the same dense
model (repairs of the weights that stayed are in this checkpoint only):

```python
from pathlib import Path

import secateur

dense = secateur.load("path/to/the/dense/model")
pruned = secateur.apply(dense, secateur.Plan.load(Path("path/to/this/folder")))
```
"""


def _facts(report: Mapping[str, Any]) -> list[str]:
    """One line each for the budget, the options, the calibration data, the time and the dense model's fingerprint."""
    lines = []
    if "budget" in report:
        lines.append(f"- budget: `{report['budget']}`")
    if report.get("options"):
        lines.append("- options: " + ", ".join(f"`{k}={_short(v)}`" for k, v in report["options"].items()))
    known = {"data": report["data"]["calibration"]} if "calibration" in report.get("data", {}) else {}
    data = {**known, **report.get("calibration", {})}
    if data:
        parts = [f"`{_short(data['data'])}`"] if "data" in data else []
        parts += [f"{data[key]:,} {key}" for key in ("samples", "tokens") if data.get(key) is not None]
        lines.append("- calibration data: " + ", ".join(parts))
    if report.get("seconds"):
        lines.append("- time: " + ", ".join(f"{what} {took:.1f} s" for what, took in report["seconds"].items()))
    if report.get("model", {}).get("fingerprint"):
        lines.append(f"- fingerprint of the dense model: `{report['model']['fingerprint']}`")
    return lines


def _section(title: str, body: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *body, ""] if body else []


def _short(value: Any) -> str:
    """A value in one line; of a path on this machine, only its last part."""
    text = " ".join(str(value).split()).replace("`", "'")
    return Path(text).name if text.startswith(("/", "~", "..")) else text


_LABELS = {
    "params": "parameters",
    "nonzero": "parameters that are not zero",
    "perplexity": "perplexity",
    "kl": "KL from the dense model (nats per token)",
    "top1": "same most likely token as the dense model",
}


def _table(first: str, rows: Mapping[str, Any]) -> list[str]:
    """A table of what was and what is; numbers that only the pruned model has stand in its column."""
    lines = []
    for name, value in rows.items():
        label = _LABELS.get(name, name).replace("|", "\\|")
        if isinstance(value, Mapping) and "kv_seq_len" in value:
            label += f" (weights, and the KV cache of {value.get('kv_batch', 1)} x {value['kv_seq_len']:,} tokens)"
        if isinstance(value, Mapping):
            if "dense" not in value and "pruned" not in value:
                continue
            dense, pruned = value.get("dense"), value.get("pruned")
            share = "" if name == "perplexity" else _change(dense, pruned)
            lines.append(f"| {label} | {_number(name, dense)} | {_number(name, pruned)} | {share} |")
        else:
            lines.append(f"| {label} | | {_number(name, value)} | |")
    return [f"| {first} | dense | pruned | pruned / dense |", "| --- | ---: | ---: | ---: |", *lines] if lines else []


def _number(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).replace("|", "\\|")
    if name == "top1":
        return f"{value:.2%}"
    if name == "perplexity":
        return f"{value:,.2f}"
    if name in ("memory", "bytes") or name.endswith("_bytes"):
        return f"{value / 2**20:,.1f} MiB"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e6 else f"{value:,.0f}"


def _change(dense: Any, pruned: Any) -> str:
    both = isinstance(dense, int | float) and isinstance(pruned, int | float)
    return f"{pruned / dense:.1%}" if both and dense else ""
