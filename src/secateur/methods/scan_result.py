"""What a sensitivity scan found, as a file that allocation reads, and what is worst in it."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.files import check_file, read_json, write_json

FORMAT = 1
_NEEDED = ("model", "fingerprint", "data", "measure", "dense", "losses", "axes", "blocks", "cost")


@dataclass(frozen=True)
class Sensitivity:
    """What cutting each axis, thinning out each weight and dropping each block alone costs.

    Every increase is "how much worse than dense": of kl and loss in nats for each prediction, of accuracy the share by
    which it fell, of mse in variances of the dense outputs.

    Attributes:
        model: Its name.
        fingerprint: SHA-256 of the model.
        data: Name of what was measured on.
        samples: Rows, or samples, of it.
        measure: Of the increases in `losses`, `axes` and `blocks`: kl, loss, accuracy or mse.
        ratios: Shares that go, ascending.
        masks: How weights were thinned out: magnitude, wanda or alps, which mends what stays.
        dense: The dense model's own values, by measure.
        losses: Weight -> {share as text: increase}; what ``--allocation FILE`` reads.
        axes: Axis -> kind, size, block (None = runs through several), criterion that ranked its units, kept {share:
            units that stay} and losses {share: increase}.
        blocks: Block -> increase when it is dropped.
        weights: Weight -> its block and size, and how it is called within the block (part).
        also: Other measures of the same passes -> {"losses", "axes", "blocks"} in the same form.
        left: Axis, weight or block that was not measured -> why.
        cost: passes (passes of all the data that ran, in full ones), naive (without reuse), measurements, seconds,
            blocks (of the chain whose results are kept; 0 = none), resumed (measurements of a run before).
    """

    model: str
    fingerprint: str
    data: str
    samples: int
    measure: str
    ratios: tuple[float, ...]
    masks: str
    dense: Mapping[str, float]
    losses: Mapping[str, Mapping[str, float]]
    axes: Mapping[str, Mapping[str, Any]]
    blocks: Mapping[str, float]
    weights: Mapping[str, Mapping[str, Any]]
    also: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)

    @property
    def middle(self) -> str:
        """The middle ratio (of two, the smaller), as the text that the losses go by."""
        return text_of(self.ratios[(len(self.ratios) - 1) // 2])

    def worst(self, what: str = "weights") -> list[tuple[str, Mapping[str, float]]]:
        """(name, {share: increase}), those that lose most at the middle ratio first.

        Args:
            what: weights, axes or blocks; a block has no shares, and its increase stands under "1".
        """
        found: dict[str, Mapping[str, float]]
        if what == "blocks":
            found = {name: {"1": loss} for name, loss in self.blocks.items()}
        elif what == "axes":
            found = {name: entry["losses"] for name, entry in self.axes.items()}
        else:
            found = dict(self.losses)
        at = "1" if what == "blocks" else self.middle
        return sorted(found.items(), key=lambda item: (-item[1].get(at, float("-inf")), item[0]))

    def to_json(self) -> dict[str, Any]:
        """The content of the file: JSON values only."""
        return {
            "format": FORMAT,
            "kind": "sensitivity",
            "secateur": importlib.metadata.version("secateur"),
            "model": self.model,
            "fingerprint": self.fingerprint,
            "data": self.data,
            "samples": self.samples,
            "measure": self.measure,
            "ratios": list(self.ratios),
            "masks": self.masks,
            "dense": dict(self.dense),
            "losses": {name: dict(found) for name, found in self.losses.items()},
            "axes": {name: dict(found) for name, found in self.axes.items()},
            "blocks": dict(self.blocks),
            "weights": {name: dict(found) for name, found in self.weights.items()},
            "also": {name: dict(found) for name, found in self.also.items()},
            "left": dict(self.left),
            "cost": dict(self.cost),
        }

    def save(self, path: Path | str, *, overwrite: bool = False) -> Path:
        """Write the file, whole or not at all.

        Args:
            path: of the .json file.
            overwrite: whether an old sensitivity file may be replaced; nothing else ever is.

        Raises:
            SecateurError: Something is in the way, and how to get around it.
        """
        target = check_path(path, overwrite=overwrite)
        write_json(target, self.to_json())
        return target

    @staticmethod
    def load(path: Path | str) -> "Sensitivity":
        """Read what `save` wrote.

        Raises:
            SecateurError: where it is missing, or no sensitivity file of this format.
        """
        values = read_json(path, "sensitivity file")
        if not isinstance(values, dict) or values.get("kind") != "sensitivity":
            raise SecateurError(f"{path} is no sensitivity file: make one with secateur sensitivity")
        if values.get("format") != FORMAT:
            raise SecateurError(
                f"{path} is a sensitivity file of format {values.get('format')}, and this version reads {FORMAT}: make "
                "it anew with secateur sensitivity"
            )
        missing = [key for key in _NEEDED if key not in values]
        if missing:
            raise SecateurError(f"{path} has no {missing[0]}: make it anew with secateur sensitivity")
        own = {key: values[key] for key in Sensitivity.__dataclass_fields__ if key in values}
        own["ratios"] = tuple(values.get("ratios", ()))
        return Sensitivity(**{"samples": 0, "masks": "", "weights": {}, **own})

    def plot(self, path: Path | str) -> Path:
        """Draw a heat map, blocks x parts at the middle ratio, as .png or .svg; see `scan_plot.draw`."""
        from secateur.methods.scan_plot import draw

        return draw(self, path)


def text_of(ratio: float) -> str:
    """How the file writes a ratio."""
    return f"{ratio:g}"


def check_ratios(ratios: Sequence[float]) -> tuple[float, ...]:
    """The ratios in order.

    Raises:
        SecateurError: for none, one outside of (0, 1), or one that is given twice.
    """
    if not ratios:
        raise SecateurError("ratios: give at least one, such as 0.5")
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise SecateurError(f"ratios: {ratio:g} is not between 0 and 1; it is the share that goes, such as 0.5")
    found = tuple(sorted(ratios))
    texts = [text_of(ratio) for ratio in found]
    twice = next((text for text in texts if texts.count(text) > 1), None)
    if twice is not None:
        raise SecateurError(f"ratios: {twice} is given twice")
    return found


def check_path(path: Path | str, *, overwrite: bool = False) -> Path:
    """Check that a sensitivity file may be written there; cheap, so ask before anything is measured.

    Args:
        path: of the file to make.
        overwrite: whether an old one may be replaced; nothing else ever is.

    Raises:
        SecateurError: Something is in the way, and how to get around it.
    """
    if Path(path).suffix != ".json":
        raise SecateurError(f"{path}: the result is a .json file: give it a name that ends so")
    return check_file(path, "the result", overwrite=overwrite, known=Sensitivity.load)
