"""Pipeline stages on the command line: a model that several processes hold together, each some of its layers."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from secateur import world
from secateur.choose.budget import Budget
from secateur.errors import SecateurError
from secateur.load.functions import is_constructor
from secateur.methods.pipeline import Stages
from secateur.methods.streaming import check_streams
from secateur.space import discover


@dataclasses.dataclass(frozen=True)
class Piping:
    """For a model that fits only across processes."""

    pipeline_stages: int | None = None
    """Processes of torchrun that share the layers between them, instead of the data: each holds as many as the others,
    or one more. By importance alone (--no-measure, or exact --dims without fewer layers) and without repair."""
    layers_per_stage: str | None = None
    """How many layers each of them holds, such as 3,5,5,3, where even shares do not fit."""

    @property
    def counts(self) -> list[int]:
        """Layers of each stage, as they are given.

        Raises:
            SecateurError: for what is no list of numbers.
        """
        parts = [] if self.layers_per_stage is None else self.layers_per_stage.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise SecateurError(f"--layers-per-stage {self.layers_per_stage!r} is no list of numbers, such as 3,5,5,3")
        return [int(part) for part in parts]


class Piped:
    """A run by stages; takes the place of `cli.streaming.Streamed`.

    Attributes:
        folder: For what a streamed model writes on the way.
        limit: None, for the layers that a process holds are what it needs.
    """

    limit = None

    def __init__(self, piping: Piping) -> None:
        self.piping = piping
        self._place = tempfile.TemporaryDirectory(prefix="secateur-stage-")
        self.folder = Path(self._place.name)
        self.layers: list[int] = []

    @contextlib.contextmanager
    def running(self, model: nn.Module, *_: Any) -> Iterator[None]:
        """Hold this process's layers, and run calibration through all stages.

        Raises:
            SecateurError: where the layers cannot be shared out so.
        """
        stages = Stages(model, discover(model), self.piping.pipeline_stages, self.piping.counts)
        self.layers = stages.counts
        with stages.opened():
            yield

    def told(self, *_: nn.Module) -> dict[str, Any]:
        """What the report tells of it."""
        return {"layers_per_stage": self.layers}

    def finish(self) -> None:
        """Remove what was written on the way."""
        self._place.cleanup()


def piped(
    piping: Piping, model: str, method: str, settings: Mapping[str, Any], budget: Budget, *, device: str
) -> Piped | None:
    """Whether a run goes by stages; what cannot be is said before anything is loaded.

    Args:
        piping: what the user says.
        model: MODEL.
        method: its name.
        settings: its options, and of the verb `mend`, `evaluation` and what `check_streams` takes.
        budget: of the run.
        device: where the weights go.

    Raises:
        SecateurError: Options contradict each other, or the method has no such way.
    """
    if piping == Piping():
        return None
    given = "--pipeline-stages" if piping.layers_per_stage is None else "--layers-per-stage"
    stages = piping.pipeline_stages if piping.pipeline_stages is not None else len(piping.counts)
    if piping.counts and stages != len(piping.counts):
        raise SecateurError(
            f"--layers-per-stage {piping.layers_per_stage} names {len(piping.counts)} stages, and --pipeline-stages "
            f"says {stages}: give one of them"
        )
    if stages < 2:
        raise SecateurError(f"{given} makes {stages} pipeline stages: give 2 or more, or leave it out")
    if stages != world.size():
        raise SecateurError(
            f"{given} makes {stages} pipeline stages, and there are {world.size()} processes, one for each stage: "
            f"start torchrun with --nproc_per_node {stages}"
        )
    if method != "minitron":
        raise SecateurError(f"{given}: {method} has no way to go by pipeline stages; minitron has")
    if is_constructor(model) or device != "cpu":
        what = f"{model} is built by a function" if is_constructor(model) else f"--device {device} is none of them"
        raise SecateurError(f"{given} is for Hugging Face models, on the cpu for now: {what}")
    check_streams(method, settings, budget)
    if settings.get("mend") != "none":
        raise SecateurError(f"{given} goes without repair, which reads the whole model: give --mend none")
    if settings.get("evaluation") is not None:
        raise SecateurError(f"{given} measures nothing, for that runs the whole model: leave out --eval-data")
    return Piped(piping)
