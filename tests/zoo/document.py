"""Write docs/architectures.md from the results of the zoo: ``python tests/zoo/document.py results.json [OUT]``."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

HEAD = """# Architectures

Written by `python tests/zoo/document.py` from a run of the zoo (`make zoo`); do not edit. Every architecture is built
tiny and random in float64. A quarter of every kind is cut at once, and of each kind alone (with `--quick`: alone where
the cut of all at once fails); the result must equal the dense model with the removed units zeroed (norms seeing the
kept units alone), have finite gradients, and come back from disk in a fresh process without Secateur.

**Kinds**: what can be cut. A kind with `(!)` passes not everywhere: see the notes. **Cuts**: how many of the cuts tried
give the right model; the rest were refused with a message. **Saved**: how many of those load again from the folder.
**Frozen**: what is never cut, and the operator that froze it; "trial" says that the rules could follow it, and that the
trial cut showed the model's own Python code not to (`secateur inspect` tells the line). Models that `torch.export`
cannot trace have no kinds.
"""


def main() -> None:
    records = json.loads(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parents[2] / "docs" / "architectures.md"
    out.write_text(document(records))


def document(records: list[dict[str, Any]]) -> str:
    """The page."""
    counts = Counter(r["status"] for r in records)
    lines = [HEAD, ", ".join(f"{n} {status}" for status, n in counts.most_common()) + f", of {len(records)}.", ""]
    parts = {"transformers": False, "Plain PyTorch": True}
    for title, plain in parts.items():
        chosen = sorted((r for r in records if r["name"].startswith("plain/") == plain), key=lambda r: r["name"])
        if chosen:
            lines += [f"## {title}", "", "| architecture | kinds | cuts | saved | frozen |", "|---|---|---|---|---|"]
            lines += [_row(r) for r in chosen] + [""]
    notes = [f"- **{r['name']}**: {note}" for r in records for note in _notes(r)]
    return "\n".join([*lines, *(["## Notes", "", *notes, ""] if notes else [])])


def _row(record: dict[str, Any]) -> str:
    cuts = record["cuts"]
    good = [c for c in cuts if c["status"] == "pass"]
    bad = {c["cut"] for c in cuts if c["status"] != "pass"}
    kinds = ", ".join(f"{kind} (!)" if kind in bad else kind for kind in record.get("kinds", {})) or "none"
    loaded = sum(c.get("load") == "pass" for c in good)
    ops = Counter(_froze(reason) for reason in record.get("frozen", {}))
    frozen = ", ".join(op for op, _ in ops.most_common(5))
    name = record["name"].removeprefix("plain/")
    return f"| {name} | {kinds} | {len(good)}/{len(cuts)} | {loaded}/{len(good)} | {frozen} |"


_WORDS = (
    ("an input", "input"),
    ("an output", "output"),
    ("buffer", "buffer"),
    ("the kernel", "kernel"),
    ("a trial", "trial"),
    ("a tensor that is written", "constant"),
    ("the state of a scan", "scan state"),
    ("a group of", "groups"),
)


def _froze(reason: str) -> str:
    """The operator that froze something, or a word for what did."""
    word = next((word for start, word in _WORDS if reason.startswith(start)), None)
    return word or re.split(r"[ :,]", reason.removeprefix("made by "))[0].removeprefix("aten.")


def _notes(record: dict[str, Any]) -> list[str]:
    found = dict.fromkeys(c["message"] for c in record["cuts"] if "message" in c)
    return [message.splitlines()[0] for message in ([record["message"]] if "message" in record else found)]


if __name__ == "__main__":
    main()
