"""Where the numbers of a run go as it goes on: TensorBoard, and Weights & Biases where that is asked for."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError


class Metrics:
    """Writes named numbers of steps.

    Attributes:
        where: what they are written to.
    """

    def __init__(self, folder: Path | None, project: str | None, step: int) -> None:
        """Open the logs.

        Args:
            folder: for TensorBoard's event files, where it is installed; None = none.
            project: of Weights & Biases; None = it is left alone.
            step: that the run goes on from: what was written behind it is void.

        Raises:
            SecateurError: A project is given, and wandb is not installed.
        """
        self.where: list[str] = []
        self._board: Any = None
        self._wandb: Any = None
        if folder is not None and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
            self.where.append("tensorboard")
        if project is not None:
            if importlib.util.find_spec("wandb") is None:
                raise SecateurError(f"wandb={project}: Weights & Biases is not installed; pip install wandb")
            wandb: Any = importlib.import_module("wandb")
            self._wandb = wandb.init(project=project, resume="allow")
            self.where.append("wandb")

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step."""
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name if "/" in name else f"train/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log(dict(numbers), step=step)

    def close(self) -> None:
        """Finish the logs."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
