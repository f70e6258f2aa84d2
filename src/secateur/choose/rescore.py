"""What masks were chosen by, saved apart from weights: another sparsity needs neither the data nor the run again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from secateur.choose.budget import Budget
from secateur.choose.mask import Layout, masks_each
from secateur.choose.packed import PackedMasks
from secateur.choose.plan import Plan
from secateur.errors import SecateurError
from secateur.space.weights import Weight

FILE = "scores.safetensors"
FORMAT = "1"


@dataclass(frozen=True)
class MaskScores:
    """Scores of weights, and how masks are chosen by them.

    Attributes:
        tensors: Weight name -> tensor of its shape; higher = keep.
        weights: Their matrices.
        layout: What competed with what.
        shares: Share of each that went; None where all weights were ranked together.
    """

    tensors: Mapping[str, torch.Tensor]
    weights: Sequence[Weight]
    layout: Layout
    shares: Mapping[str, float] | None

    def plan(self, budget: Budget, origin: Mapping[str, str] | None = None) -> Plan:
        """The masks of another budget.

        Where weights lost different shares, what each keeps is scaled by one factor.

        Raises:
            SecateurError: for a budget that is not about masks, N:M that does not fit, and shares that the factor would
                take out of [0, 1).
        """
        asked = budget.sparsity()
        scope = "tensor" if budget.n_m is not None else self.layout.scope
        layout = Layout(scope, budget.n_m, self.layout.block)
        layout.check(self.weights)
        if budget.n_m is not None or self.shares is None:
            return self._plan(asked, layout, origin)
        total = sum(w.size for w in self.weights)
        kept = sum(w.size * (1 - self.shares[w.name]) for w in self.weights)
        factor = (1 - asked) * total / kept
        shares = {name: 1 - (1 - share) * factor for name, share in self.shares.items()}
        if min(shares.values()) < -1e-9:
            name = min(shares, key=lambda n: shares[n])
            least = total - kept / (1 - min(self.shares.values()))
            raise SecateurError(
                f"{name} would keep more than it has at a sparsity of {100 * asked:g}%: the smallest that these "
                f"allocated scores reach is {100 * least / total:.4g}%"
            )
        shares = {name: max(0.0, share) for name, share in shares.items()}
        return self._plan(shares, layout, origin)

    def _plan(self, sparsity: float | Mapping[str, float], layout: Layout, origin: Mapping[str, str] | None) -> Plan:
        each = masks_each(self.weights, lambda w: self.tensors[w.name], sparsity, layout)
        return Plan(masks=PackedMasks.of(each), origin=origin or {})

    def save(self, folder: Path) -> None:
        """Write scores.safetensors into an existing folder."""
        content = {
            "weights": {w.name: [list(w.rows), list(w.columns), w.groups] for w in self.weights},
            "layout": asdict(self.layout),
            "shares": None if self.shares is None else dict(self.shares),
        }
        tensors = {name: t.float().contiguous() for name, t in self.tensors.items()}
        save_file(tensors, folder / FILE, metadata={"format": FORMAT, "secateur": json.dumps(content)})

    @staticmethod
    def load(folder: Path) -> "MaskScores":
        """Read what `save` wrote.

        Raises:
            SecateurError: where the file is missing, damaged, or of another format.
        """
        try:
            with safe_open(folder / FILE, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError) as error:
            hint = "prune with keep_scores (--keep-scores) to have them"
            raise SecateurError(f"no readable {FILE} in {folder} ({error}); {hint}") from error
        if metadata.get("format") != FORMAT:
            raise SecateurError(f"{folder / FILE} holds no scores of format {FORMAT}")
        try:
            content = json.loads(metadata["secateur"])
            weights = [
                Weight(name, tuple(tensors[name].shape), tuple(rows), tuple(columns), groups)
                for name, (rows, columns, groups) in content["weights"].items()
            ]
            layout = content["layout"]
            n_m = None if layout["n_m"] is None else (int(layout["n_m"][0]), int(layout["n_m"][1]))
            found = Layout(layout["scope"], n_m, (int(layout["block"][0]), int(layout["block"][1])))
            return MaskScores(tensors, weights, found, content["shares"])
        except (KeyError, ValueError, TypeError) as error:
            raise SecateurError(f"{folder / FILE} is damaged: {error}") from error
