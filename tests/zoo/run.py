"""The zoo: examine every architecture in parallel processes, and write down what works.

``python tests/zoo/run.py --jobs 2 [names...] --out results.json``; a name may be a pattern (``qwen*``), or a results
file with a status (``results.json:wrong``) to run again what failed before.
"""

import argparse
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
_TOGETHER = 24  # architectures that one process examines, so that its imports are paid once


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("zoo.json"))
    parser.add_argument("--timeout", type=int, default=150, help="seconds for one architecture")
    parser.add_argument("--no-save", action="store_true", help="do not save and load the results")
    parser.add_argument("--quick", action="store_true", help="kinds alone only where the cut of all at once fails")
    parser.add_argument("--summary", type=Path, help="only print the summary of this results file")
    options = parser.parse_args()
    if options.summary:
        show(json.loads(options.summary.read_text()))
        return 0
    with tempfile.TemporaryDirectory(prefix="zoo-code-") as copy:
        options.code = _frozen(Path(copy))
        return _run(options)


def _frozen(folder: Path) -> Path:
    """A copy of the code, so that a run tests one state of it whatever is edited meanwhile."""
    kept = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src" / "secateur", folder / "secateur", ignore=kept)
    return Path(shutil.copytree(HERE, folder / "zoo", ignore=kept))


def _run(options: argparse.Namespace) -> int:
    names = _wanted(options.names, options.code)
    start = time.perf_counter()
    chunks = [names[i :: -(-len(names) // _TOGETHER)] for i in range(-(-len(names) // _TOGETHER))]
    records: list[dict[str, Any]] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for done in pool.map(lambda chunk: examined(chunk, options), chunks):
            records += done
            options.out.write_text(json.dumps(records, indent=1))
            sys.stderr.write(f"{len(records)}/{len(names)} {time.perf_counter() - start:.0f} s\n")
    records.sort(key=lambda r: names.index(r["name"]))
    options.out.write_text(json.dumps(records, indent=1))
    show(records)
    sys.stdout.write(f"{time.perf_counter() - start:.0f} s\n")
    return int(any(r["status"] in ("wrong", "error") for r in records))


def _wanted(patterns: list[str], code: Path) -> list[str]:
    listed = subprocess.run(
        [sys.executable, str(code / "worker.py"), "--list"], capture_output=True, text=True, check=False, env=_env(code)
    )
    if listed.returncode:
        raise SystemExit(listed.stderr)
    known = listed.stdout.split()
    if not patterns:
        return known
    chosen: list[str] = []
    for pattern in patterns:
        file, _, status = pattern.partition(":")
        if status:
            chosen += [r["name"] for r in json.loads(Path(file).read_text()) if _failed(r, status)]
        else:
            chosen += fnmatch.filter(known, pattern)
    return list(dict.fromkeys(chosen))


def _failed(record: dict[str, Any], status: str) -> bool:
    return bool(record["status"] == status or (status == "failed" and record["status"] != "pass"))


def _env(code: Path) -> dict[str, str]:
    quiet = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
    }
    return {**os.environ, **quiet, "PYTHONPATH": str(code.parent)}


# --- processes ---


def examined(names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Records of these architectures; a process that crashes or hangs costs only the one it was at."""
    folder = Path(tempfile.mkdtemp(prefix="zoo-"))
    records: list[dict[str, Any]] = []
    left = list(names)
    while left:
        records += _one_process(left, folder, options)
        left = names[len(records) :]
    if not options.no_save:
        _reloaded(records, folder, options.code)
    shutil.rmtree(folder, ignore_errors=True)
    return records


def _one_process(names: list[str], folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What one process manages; the last record says how it ended, if it ended badly."""
    out = folder / "records.jsonl"
    out.write_text("")
    command = [
        sys.executable,
        str(options.code / "worker.py"),
        str(out),
        "-" if options.no_save else str(folder),
        *names,
    ]
    command += ["--quick"] * options.quick
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=_env(options.code)
    )
    errors: list[str] = []
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(lambda: errors.append(process.stderr.read() if process.stderr else ""))
        count, last = 0, time.monotonic()
        while process.poll() is None:
            time.sleep(0.2)
            done = out.read_text().count("\n")
            if done > count:
                count, last = done, time.monotonic()
            if time.monotonic() - last > options.timeout + (20 if count == 0 else 0):
                process.kill()
        reading.result()
    records = [json.loads(line) for line in out.read_text().splitlines()]
    if len(records) < len(names):
        slow = time.monotonic() - last > options.timeout
        tail = errors[0].strip().splitlines()[-1:] if errors else []
        message = (
            f"not done within {options.timeout} s" if slow else f"the process ended with {process.returncode}: {tail}"
        )
        records.append({"name": names[len(records)], "status": "error", "step": "run", "message": message, "cuts": []})
    return records


def _reloaded(records: list[dict[str, Any]], folder: Path, code: Path) -> None:
    """Load everything that was saved in one fresh process."""
    done = subprocess.run(
        [sys.executable, str(code / "reload.py"), str(folder)],
        capture_output=True, text=True, env=_env(code), timeout=900, check=False,
    )  # fmt: skip
    answers = {a["name"]: a["message"] for a in map(json.loads, done.stdout.splitlines())}
    for record in records:
        for cut in record["cuts"]:
            if cut.get("save") == "saved":
                message = answers.get(f"{record['name'].replace('/', '+')}__{cut['cut']}", "the loading process died")
                cut["load"] = "wrong" if message else "pass"
                if message:
                    cut["load_message"] = message


# --- what came out ---


def show(records: list[dict[str, Any]]) -> None:
    """A table of the architectures, and the failures with the most frequent first."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=170)
    table = Table("architecture", "status", "cut", "saved", "kinds", "s", title="The zoo")
    for r in records:
        cuts = r["cuts"]
        good = [c for c in cuts if c["status"] == "pass"]
        kinds = " ".join(f"{k}{'' if _passed(cuts, k) else '!'}" for k in r.get("kinds", {}))
        loaded = sum(c.get("load") == "pass" for c in good)
        table.add_row(
            r["name"],
            r["status"],
            f"{len(good)}/{len(cuts)}",
            f"{loaded}/{len(good)}",
            kinds,
            str(r.get("discover_s", "")),
        )
    console.print(table)
    console.print(failures(records), markup=False, highlight=False)
    console.print(totals(records), markup=False)


def _passed(cuts: list[dict[str, Any]], kind: str) -> bool:
    return all(c["status"] == "pass" for c in cuts if c["cut"] == kind)


def totals(records: list[dict[str, Any]]) -> str:
    """One line for architectures and one for cuts."""
    lines = []
    for what, items in (("architectures", records), ("cuts", [c for r in records for c in r["cuts"]])):
        counts: dict[str, int] = defaultdict(int)
        for item in items:
            counts[item["status"]] += 1
        lines.append(f"{what}: {len(items)}: " + ", ".join(f"{n} {status}" for status, n in sorted(counts.items())))
    whole = sum(r["status"] == "pass" and all(c.get("load") == "pass" for c in r["cuts"]) for r in records)
    faded = [r["name"] for r in records if r.get("faded")]
    lines += [f"faded (same output whatever the input, so it proves little): {' '.join(faded)}"] if faded else []
    return "\n".join([*lines, f"whole (every cut passes, saves and loads): {whole} of {len(records)}"])


def failures(records: list[dict[str, Any]]) -> str:
    """Messages grouped by what they say without names and numbers, the most frequent first."""
    groups: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for r in records:
        if "message" in r:
            groups[r["status"], f"[{r['step']}] {_general(r['message'])}"].append((r["name"], r["message"]))
        if r["status"] == "nothing":
            groups["nothing", "nothing to cut"].append((r["name"], ""))
        for c in r["cuts"]:
            where = f"{r['name']}:{c['cut']}"
            if "message" in c:
                groups[c["status"], f"[{c['step']}] {_general(c['message'])}"].append((where, c["message"]))
            for step in ("save", "load"):
                if f"{step}_message" in c:
                    groups[f"{step} {c[step]}", _general(c[f"{step}_message"])].append((where, c[f"{step}_message"]))
    order = {"wrong": 0, "error": 1, "refused": 2}
    lines = []
    for (status, _), found in sorted(groups.items(), key=lambda g: (order.get(g[0][0], 3), -len(g[1]))):
        who = list(dict.fromkeys(name for name, _ in found))
        lines.append(f"{len(found):4d} {status}: {found[0][1][:260]}")
        lines.append(f"       {' '.join(who[:12])}{f' and {len(who) - 12} more' if len(who) > 12 else ''}")
    return "\n".join(lines)


def _general(message: str) -> str:
    """A message without what differs from model to model."""
    import re

    message = re.sub(r"[A-Z]\w+(Model|For\w+|Projection|Encoder|Config|LMHead\w*)\b", "Model", message)
    message = re.sub(r"\b[a-z_]\w*(\.\w+)+\b", "NAME", message)
    return re.sub(r"[-\d.]+(e-?\d+)?", "#", message)[:140]


if __name__ == "__main__":
    sys.exit(main())
