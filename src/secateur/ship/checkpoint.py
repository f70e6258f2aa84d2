"""Checkpoints: a pruned model as a folder that stock transformers loads, written whole or not at all."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from secateur.choose.plan import Plan
from secateur.errors import SecateurError
from secateur.load.model import TOKENIZER_FILES, Source, check_folder, is_hub_id, load_model, quiet_transformers
from secateur.space import Space

_ONE_FILE = 50_000_000_000  # bytes up to which the result of a single file stays one: transformers' own default


# --- saving and loading ---


def save(
    model: nn.Module,
    out: Path,
    *,
    plan: Plan | None = None,
    space: Space | None = None,
    source: Source | None = None,
    tokenizer: Any | None = None,
    report: Mapping[str, Any] | None = None,
    card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the whole result into a folder that stock transformers loads, or nothing.

    The folder is written beside `out` under a hidden name, checked, and renamed. What fails or is interrupted leaves
    nothing behind, and an old result as it was.

    Args:
        model: the pruned Hugging Face model; dtypes are kept, tied tensors are stored once.
        out: the folder to make, with its parents. An empty one that is there already is taken.
        plan: saved beside the weights.
        space: the dense model's Space: the plan must fit it.
        source: of the dense model: its tokenizer and licence files are copied as they are, and its weight files
            say how large those of the result may be.
        tokenizer: saved where the source has no tokenizer files.
        report: saved as report.json; infinities and NaN become the texts "inf", "-inf" and "nan".
        card: README.md; None makes it from the report, where there is one.
        overwrite: replace `out`, if it is a model folder.

    Returns:
        `out`.

    Raises:
        SecateurError: `out` is in the way or cannot be written; the plan does not fit; stock transformers cannot
            describe the model.
    """
    out = Path(out)
    target = check_out(out, overwrite=overwrite, source=source)
    if plan is not None and space is not None:
        plan.check(space)
    check_stock(model, plan)
    texts = {}
    if report is not None:
        texts["report.json"] = json.dumps(json_values(report), indent=2, allow_nan=False) + "\n"
        texts["README.md"] = model_card(report)
    if card is not None:
        texts["README.md"] = card
    with _whole_folder(target) as partial, _as_user_error(out):
        _save_model(model, partial, source)
        _save_tokenizer(tokenizer, partial, source)
        if plan is not None:
            plan.save(partial)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        check_folder(partial)
    return out


def load(folder: str | Path, *, device: str = "cpu", dtype: str | torch.dtype | None = None) -> nn.Module:
    """Load a saved result as stock transformers does, with the checks of `load.model.load_model`.

    Args:
        folder: what `save` wrote, or any other model folder or hub id.
        device: where the weights go.
        dtype: of the weights; None is the checkpoint's own.

    Returns:
        The model in evaluation mode.

    Raises:
        SecateurError: The folder is no whole model, or the dtype or device is unknown.
    """
    return load_model(folder, device=device, dtype=dtype)[0]


def check_stock(model: nn.Module, plan: Plan | None = None) -> None:
    """Check that the stock class, built from the model's own config, has the model's tensors.

    Args:
        model: the pruned model.
        plan: what was cut, to name the reason.

    Raises:
        SecateurError: It has not; names the first tensor that differs, with both shapes.
    """
    with quiet_transformers():
        from transformers import PreTrainedModel
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise SecateurError(f"{kind} is no Hugging Face model, and only those are saved as a folder; use torch.save")
    if not type(model).__module__.startswith("transformers."):
        raise SecateurError(f"stock transformers does not know {kind}, a class of {type(model).__module__}")
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            raise SecateurError(f"{kind} is on the meta device: {name} has no values to save")
    cannot = "stock transformers cannot describe this result"
    subs = [] if plan is None else [n for n in plan.dropped if n.split(".")[-1].isdecimal() is False]
    fix = f"drop whole layers instead of {subs[0]}" if subs else "cut every layer to the same sizes"
    try:
        with quiet_transformers(), torch.device("meta"):
            config = type(model.config).from_dict(model.config.to_dict())
            stock = type(model)(config)
    except Exception as error:  # config classes raise types of their own
        text = " ".join(str(error).split())
        raise SecateurError(f"{cannot}: {kind} rejects its config ({text[:300]}); {fix}") from error
    have, want = _shapes(model), _shapes(stock)
    for name in [*have, *(name for name in want if name not in have)]:
        if have.get(name) != want.get(name):
            raise SecateurError(
                f"{cannot}: {name} is {have.get(name, 'not there')} in the model, and {want.get(name, 'not there')} "
                f"in a {kind} of its config; {fix}"
            )


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}


def _save_model(model: Any, folder: Path, source: Source | None) -> None:
    """Config, generation config and weights; one file stays one, shards stay about as large as they were."""
    limit: int = _ONE_FILE
    if source is not None and source.shard_bytes is not None and len(source.files) > 1:
        limit = source.shard_bytes
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=limit)


def _save_tokenizer(tokenizer: Any | None, folder: Path, source: Source | None) -> None:
    origin = None if source is None else source.folder
    copied = False
    if origin is not None:
        for pattern in TOKENIZER_FILES:
            for file in origin.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
                    copied = True
        for file in [*origin.glob("LICENSE*"), *origin.glob("NOTICE*")]:
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    if tokenizer is not None and not copied:
        with quiet_transformers():
            tokenizer.save_pretrained(folder)


def json_values(value: Any) -> Any:
    """The same report with what JSON has no word for as text."""
    if isinstance(value, Mapping):
        return {str(key): json_values(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path | torch.dtype | torch.device) else value


# --- the folder ---


def check_out(out: Path, *, overwrite: bool, source: Source | None = None) -> Path:
    """Check that a result may be written to `out`; cheap, so ask before the work is done.

    Args:
        out: the folder to make. It may be there if it is empty, or with `overwrite` if it is a model folder.
        overwrite: whether an old result may be replaced.
        source: of the dense model, which must not be replaced.

    Returns:
        The absolute path, links followed.

    Raises:
        SecateurError: Something is in the way, and how to get around it.
    """
    target = Path(out).expanduser().resolve()
    above = next((p for p in target.parents if p.exists()), target.parent)
    if not above.is_dir():
        raise SecateurError(f"{out}: cannot be made, because {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise SecateurError(f"{out}: cannot be made, because {above} is not writable")
    if not target.exists():
        return target
    if not target.is_dir():
        raise SecateurError(f"{out}: is a file, and a result is a folder; choose another name")
    if not any(target.iterdir()):
        return target
    if not overwrite:
        raise SecateurError(
            f"{out}: exists already; choose another name, or overwrite it (overwrite=True, --overwrite)"
        )
    if source is not None and source.folder is not None and source.folder.resolve().is_relative_to(target):
        raise SecateurError(f"{out}: holds the model that is being pruned; choose another name")
    why = _not_replaceable(target)
    if why is not None:
        raise SecateurError(f"{out}: will not be overwritten, because {why}; remove it yourself or choose another name")
    return target


def _not_replaceable(folder: Path) -> str | None:
    """Why a folder is not taken for an old result; None if it may be deleted."""
    for place, what in ((Path.home(), "home"), (Path.cwd(), "working")):
        if place.resolve().is_relative_to(folder):
            return f"the {what} folder is in it"
    if not _has_keys(folder / "config.json", "model_type") and not _has_keys(folder / "plan.json", "format", "axes"):
        return "it is no model folder (it has neither a model's config.json nor a plan.json)"
    inside = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name != "additional_chat_templates")
    if inside:
        return f"it holds other folders ({', '.join(inside[:3])})"
    return None


def _has_keys(path: Path, *keys: str) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and all(key in content for key in keys)


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` that takes its place at the end; nothing is left of it where that fails."""
    made = _make_parents(target.parent)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    done = False
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        _swap(partial, target)
        done = True
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in [] if done else made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder and what is above it; those that are new, innermost first."""
    new = [p for p in [folder, *folder.parents] if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SecateurError(f"{folder}: cannot be made ({error.strerror})") from error
    return new


def _swap(new: Path, target: Path) -> None:
    """Rename `new` to `target`. At every moment the old or the new folder is whole, under one of three names."""
    aside = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        if target.exists():
            target.rename(aside)
        new.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise
    if aside.exists():
        try:
            shutil.rmtree(aside)
        except OSError as error:
            raise SecateurError(f"{target} is written, but the old one, now {aside}, cannot be deleted") from error


@contextmanager
def _as_user_error(out: Path) -> Iterator[None]:
    """Full discs, missing rights, and what transformers refuses to write."""
    try:
        yield
    except SecateurError:
        raise
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise SecateurError(f"{out}: the result cannot be written, and nothing is left of it ({text[:300]})") from error


# --- the card ---


def model_card(report: Mapping[str, Any]) -> str:
    """The README.md of a result: what was done to which model, what it cost, how to load and to replay it.

    Args:
        report: of the run; only what is there is written about.

    Returns:
        Markdown with YAML front matter.
    """
    origin = report.get("model", {})
    name = str(origin.get("name", ""))
    hub = is_hub_id(name)
    shown = f"[{name}](https://huggingface.co/{name})" if hub else f"`{Path(name).name}`" if name else "a dense model"
    lines = ["---", "library_name: transformers", "tags:", "- secateur", "- pruned"]
    lines += [f"base_model: {name}"] if hub else []
    title = f"{Path(name).name}, pruned" if name else "A pruned model"
    method = f" by the method `{report['method']}`" if "method" in report else ""
    version = f" {report['secateur']}" if "secateur" in report else ""
    lines += ["---", "", f"# {title}", "", f"This is {shown}, pruned with Secateur{version}{method}."]
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
    lines += _HOW_TO_LOAD
    return "\n".join(lines).rstrip() + "\n"


_HOW_TO_LOAD = """\
## Use

Stock transformers loads this folder; Secateur is not needed.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

`plan.json` and `plan.safetensors` say which units stayed. To make the same cut again, from the same dense model
(repairs of the weights that stayed are in this checkpoint only):

```python
from pathlib import Path

import secateur

dense = secateur.load("path/to/the/dense/model")
pruned = secateur.apply(dense, secateur.Plan.load(Path("path/to/this/folder")))
```
""".splitlines()


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
