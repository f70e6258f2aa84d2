"""Runs one streamed command many times, each time killed at another place and then run again; prints what came out.

A process of its own, which imports everything once and forks: with SIGKILL there is no clean-up of any kind.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.cli import main

_SEEN = ("open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile")


def in_child(words: Sequence[str], out: Path, kill_at: int) -> tuple[bool, int]:
    """Run the command in a fork, killed at an event of the file system; (was killed, events)."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        count = 0

        def see(event: str, arguments: Any) -> None:
            nonlocal count
            if event in _SEEN and out.name in str(arguments[0]):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(see)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = main(words)
        os.write(write, str(count).encode())
        os._exit(code)
    os.close(write)
    _, status = os.waitpid(process, 0)
    text = os.read(read, 100).decode()
    os.close(read)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"{' '.join(words)}: exit code {os.WEXITSTATUS(status)}")
    return os.WIFSIGNALED(status), int(text or 0)


def contents(folder: Path) -> dict[str, str]:
    """What every file of a result holds; of the report, what does not depend on time (its pages tell times)."""
    pages = (".html", ".md")
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.suffix not in pages}
    report = json.loads((folder / "report.json").read_text())
    found["report.json"] = json.dumps(_timeless(report), sort_keys=True)
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(entry) for key, entry in value.items() if key not in ("seconds", "streamed")}
    return value


def warm_up(words: Sequence[str], out: Path) -> None:
    """Run it once here, so that forks find everything imported and compiled."""
    with contextlib.redirect_stdout(io.StringIO()):
        main(words)
    shutil.rmtree(out)


def run(words: Sequence[str], out: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill and go on; where the results differ, and how much of the work was done again."""
    warm_up(words, out)
    _, total = in_child(words, out, 0)
    want = contents(out)
    shutil.rmtree(out)
    draw = random.Random(seed)
    differing: list[int | str] = []
    again: list[int] = []
    killed = 0
    for place in sorted(draw.sample(range(2, total), kills)):
        was_killed, _ = in_child(words, out, place)
        killed += was_killed
        _, events = in_child([*words, *(["--overwrite"] if out.exists() else [])], out, 0)
        again.append(events)
        if contents(out) != want:
            differing.append(place)
        left = sorted(p.name for p in out.parent.iterdir() if out.name in p.name and p != out)
        if left:
            differing.append(f"{place}: {left} is left over")
        shutil.rmtree(out)
    return {"events": total, "killed": killed, "differing": differing, "again": again}


if __name__ == "__main__":
    command, folder, number, start = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    sys.stdout.write(json.dumps(run(command, folder, number, start)))
