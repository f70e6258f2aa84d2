"""Runs that kill themselves, for test_loop_resume: python killed_runs.py FOLDER.

Each is a fork of one process that has everything imported.
"""

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

import heal  # noqa: E402  # from the folder above

from secateur.load.batches import default_loss  # noqa: E402
from secateur.methods.healing import distill, finetune  # noqa: E402
from secateur.train import Cubic, sparsify  # noqa: E402

STEPS = 8
_LORA: dict[str, Any] = {"lora": 2}


class Killer:
    """A progress bar that kills the process at a step."""

    def __init__(self, at: int | None) -> None:
        self.at = at

    def __call__(self, items: Any, what: str) -> Any:
        """Go on to the end, or not."""
        for item in items:
            if self.at is not None and what in ("training", "distilling") and item == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item


def _distill(work: Path | None, at: int | None, **options: Any) -> Any:
    data = options.pop("data", None)
    data = heal.rows(12) if data is None else data
    student = heal.llama(seed=4, hidden_size=8, num_attention_heads=2, num_key_value_heads=1, attention_dropout=0.2)
    given = {"steps": STEPS, "lr": 0.01, "batch_size": 4, "eval_every": 3, "work": work, "track": Killer(at), **options}
    return distill(heal.llama(), student, data, eval_data=heal.rows(4, seed=9), **given)


def _finetune(work: Path | None, at: int | None, **options: Any) -> Any:
    model = heal.net()
    given = {"steps": STEPS, "lr": 0.01, "work": work, "track": Killer(at), "eval_every": 4, **options}
    if given.pop("movement", False):
        sparsity = sparsify(model, "sparsity=50%", method="movement", schedule=Cubic(begin=1, end=6))
        given["sparsity"] = sparsity
    return finetune(model, heal.loader(noisy=True), eval_data=[heal.pictures(6, seed=8)], loss=default_loss, **given)


CASES: dict[str, Any] = {
    "distill": _distill,
    "between": lambda w, a: _distill(w, a, eval_every=8, save_every=2, keep="last"),
    "accumulate": lambda w, a: _distill(w, a, accumulate=2, save_every=1),
    "muon": lambda w, a: _distill(w, a, optimizer="muon", save_every=2),
    "lora": lambda w, a: _distill(w, a, save_every=2, **_LORA),
    "hidden": lambda w, a: _distill(w, a, hidden=0.5, save_every=2, recompute=True),
    "mix": lambda w, a: _distill(w, a, save_every=2, data={"a": (heal.rows(9), 0.7), "b": (heal.rows(5, seed=6), 0.3)}),
    "loader": lambda w, a: _finetune(w, a, save_every=1),
    "loader, saved seldom": lambda w, a: _finetune(w, a, save_every=4),
    "movement": lambda w, a: _finetune(w, a, movement=True, save_every=2),
}


KILLS = {"distill": [5, 7], "between": [3], "loader, saved seldom": [6]}
"""Steps before which a run is killed, one process after the other; the others before step 5."""


def one(folder: Path, case: str, at: int | None) -> None:
    """Run one case to its end."""
    torch.manual_seed(int.from_bytes(os.urandom(4), "big"))  # nothing may hang on the caller's random numbers
    healed = CASES[case](folder, at)
    torch.save({"model": healed.model.state_dict(), "report": dict(healed.report)}, folder / "result.pt")


def main() -> None:
    """Run all cases, each killed and run again; print how each process ended."""
    torch.set_num_threads(1)
    for number, case in enumerate(CASES):
        folder = Path(sys.argv[1]) / str(number)
        ended = []
        for at in [*KILLS.get(case, [5]), None]:
            pid = os.fork()
            if not pid:
                try:
                    one(folder, case, at)
                except BaseException:  # noqa: BLE001  # a fork must not go on with the loop
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            ended.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        (folder / "ended").write_text(" ".join(map(str, ended)))


if __name__ == "__main__":
    main()
