"""Memory: what a model and its passes need at most, alone in a process; and what this machine has left."""

import ctypes
import gc
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FREE = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
_RESET = "5"  # what makes the kernel begin the peak of this process anew


def can_measure(device: torch.device) -> bool:
    """Whether peaks can be read here: on a GPU always, else where there is Linux's /proc."""
    return device.type == "cuda" or (_STATUS.is_file() and os.access(_CLEAR, os.W_OK))


def peak_memory(make: Callable[[], Callable[[], object]], device: torch.device) -> int:
    """Bytes that a model and its passes need at most, in this process: call it in a fresh one.

    What loading needs beyond the model does not count; libraries that were loaded before do not either.

    Args:
        make: loads the model; returns what runs it.
        device: of the model; on a GPU torch's own count is read.
    """
    if device.type == "cuda":
        run = make()
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return int(torch.cuda.max_memory_allocated(device))
    _warm()
    before = _read("VmRSS")
    run = make()
    _trim()
    _CLEAR.write_text(_RESET)
    run()
    return max(0, _read("VmHWM") - before)


def forked(function: Callable[[], Any]) -> Any:
    """Call a function in a copy of this process and return what it returns; a process that ends early gives None.

    Only for a process without threads of its own: nothing of torch has run in it.
    """
    out, into = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(out)
            with os.fdopen(into, "wb") as pipe:
                pipe.write(pickle.dumps(function()))
            code = 0
        finally:
            os._exit(code)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    return pickle.loads(found) if found else None


def available(device: torch.device) -> int | None:
    """Bytes that are free for models on a device; None where nothing tells.

    Within a container with a limit, what is left of it.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or not _FREE.is_file():
        return None
    lines = dict(line.split(":", 1) for line in _FREE.read_text(encoding="utf-8").splitlines() if ":" in line)
    if "MemAvailable" not in lines:
        return None
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = _GROUP / "memory.max", _GROUP / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdecimal():
        cached = _cached()
        free = min(free, int(limit.read_text()) - int(used.read_text()) + cached)
    return free


def _cached() -> int:
    """Bytes of files that the container's count holds, and that the kernel gives back when they are needed."""
    path = _GROUP / "memory.stat"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def _read(name: str) -> int:
    """A figure of this process, in bytes."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024


def _warm() -> None:
    """Have torch load what its kernels need: threads, workspaces."""
    with torch.no_grad():
        torch.nn.Linear(64, 64)(torch.zeros(64, 64))
        torch.nn.Conv2d(8, 8, 3)(torch.zeros(1, 8, 16, 16))
    _trim()


def _trim() -> None:
    """Give what was freed back to the system, so that it is not taken for memory in use."""
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
