"""How numbers are shown to people."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Draw a table; the first column is words, the others are numbers."""
    drawn = Table(box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        drawn.add_row(*row)
    console.print(Text(title, style="bold"), soft_wrap=True)  # a table's own title is wrapped at its width
    console.print(drawn)


def bytes_text(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1024
    return f"{count:,.2f} TiB"


def share(part: float, whole: float) -> str:
    """A part in per cent of the whole."""
    return f"{100 * part / whole:.1f}%" if whole else "-"


def candidates(console: Console, search: Mapping[str, Any]) -> None:
    """The ranking of a search."""
    found = search["candidates"]
    names = list(found[0]["sizes"])
    routed = any(entry["active_params"] != entry["params"] for entry in found)
    measured = search.get("measured", True)
    rows = [
        (
            f"{rank}" + (" chosen" if entry["chosen"] else ""),
            *(str(entry["sizes"][name]) for name in names),
            f"{entry['params']:,.0f}",
            *([f"{entry['active_params']:,.0f}"] if routed else []),
            bytes_text(entry["memory"]),
            f"{entry['expected_kl' if measured else 'expected_loss']:.3f}",
            *([f"{entry['score']:.4f}"] if measured else []),
        )
        for rank, entry in enumerate(found, start=1)
    ]
    counts = ("parameters", "active") if routed else ("parameters",)
    columns = ["rank", *search["kinds"], *counts, "memory"]
    if not measured:
        what = f"the best of {search['feasible']:,} architectures within the budget, by importance alone: not measured"
        table(console, what, (*columns, "expected loss"), rows)
        return
    better = "higher" if search["higher_is_better"] else "lower"
    what = f"{len(rows)} of {search['feasible']:,} architectures within the budget, by expected KL"
    measure = f"measured: {search['score']} ({better} is better)"
    table(console, f"{what}; {measure}", (*columns, "expected KL", search["score"]), rows)


def front(console: Console, report: Mapping[str, Any]) -> None:
    """What a search over levels expects at several budgets, and what it chose."""
    found, target = report["levels"], report["target"]
    measure = next(iter(target))
    rows = [
        (f"{100 * point['share']:.0f}% of the dense", f"{point[measure]:,.6g}", f"{point['expected']:.4f}", "")
        for point in found["front"]
    ]
    chosen = [f"{reached['reached']:,.6g}" for reached in target.values()]
    measured = f"{found['measured']:.4f}" if "measured" in found else ""
    rows.append(("chosen", " / ".join(chosen), f"{found['expected']:.4f}", measured))
    columns = ("budget", " / ".join(target), "expected loss", f"measured {found.get('measure', '')}".strip())
    table(console, "Least loss at several budgets (before the last repair)", columns, rows)
    for measure, reached in target.items():
        if measure == "latency":
            told = report["latency"]
            console.print(
                f"latency: predicted {1e3 * told['predicted']:.3f} ms, measured {1e3 * told['measured']:.3f} ms "
                f"(dense {1e3 * told['dense']:.3f} ms, limit {1e3 * reached['limit']:.3f} ms)"
            )
