"""Sparsity that grows while a model trains: a small object that counts steps and asks pure functions for masks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.mask import Block, masks_of
from secateur.choose.plan import Plan
from secateur.cut.masks import check_masks
from secateur.errors import SecateurError
from secateur.space.trace import Inputs
from secateur.space.weights import Weight, maskable
from secateur.train import criteria
from secateur.train.masked import Masked, Place, attach, detach, parametrized, places
from secateur.train.options import Settings, settings_of
from secateur.train.schedule import Schedule, schedule_of

FORMAT = 1


def sparsify(
    model: nn.Module,
    budget: str | Sequence[str] | Budget | None = None,
    *,
    method: str = "magnitude",
    schedule: Schedule | str | None = None,
    begin: int | None = None,
    end: int | None = None,
    frequency: int | None = None,
    only: Sequence[str] = (),
    ignore: Sequence[str] = (),
    inputs: Inputs = None,
    scope: str | None = None,
    block: Block | None = None,
    normalize: bool | None = None,
    mode: str | None = None,
    start: str | None = None,
    penalty: float | None = None,
    tau: float | None = None,
    decay: float | None = None,
    exact: bool | None = None,
    seed: int | None = None,
    masks: Plan | Mapping[str, torch.Tensor] | None = None,
) -> "Sparsity":
    """Put masks over the weights of a model, in place, and return the object that moves them while you train.

    Args:
        model: any module, not yet wrapped for distributed training.
        budget: ``sparsity=90%``, of the weights that are masked, or ``n:m=2:4``; soft movement and `fixed` take none.
        method: ``magnitude`` (Zhu & Gupta 2017, arXiv:1710.01878), ``movement`` (Sanh et al. 2020, arXiv:2005.07683),
            ``weight_change``, ``rb`` (NNCF's regularisation-based), ``sr_ste`` (Zhou et al. 2021, arXiv:2102.04010) or
            ``fixed``.
        schedule: when how much goes; an object of `secateur.train`, or ``constant``, ``linear``, ``exponential`` or
            ``cubic`` with begin, end and frequency. For soft movement it is the share of the penalty's full weight.
        begin: for the name of a schedule.
        end: the same.
        frequency: the same.
        only: names of weights or modules, or patterns, to which masks are confined.
        ignore: the same, of what stays dense.
        inputs: arguments of one forward pass, where `space.weights.maskable` needs one.
        scope: ``tensor`` (default), ``row`` or ``global``: what is ranked together.
        block: rows and columns of tiles that go whole.
        normalize: magnitude with scope global: rank weights by their share of the norm of their tensor, as NNCF does.
        mode: movement: ``hard`` (default), the largest scores stay; ``soft``, all above a threshold stay.
        start: hard movement: scores begin at ``zero`` (default, as published), or with the ``magnitude`` of the
            weights, in units of its mean: what the weights know already then counts, however short the training.
        penalty: soft movement: weight of the mean of sigmoid(S) in the loss.
        tau: soft movement: threshold of sigmoid(S), in (0, 0.5); 0.1 by default.
        decay: sr_ste: lambda_w of the weights that are masked, 2e-4 by default.
        exact: rb: fold the exact number of zeros that the schedule asks for (default), or the gates as learned.
        seed: rb: of the noise.
        masks: fixed: a plan with masks, or weight name -> bool tensor, True = keep; None = zeros of the weights now.

    Returns:
        The `Sparsity`. The model's parameters are the objects that they were.

    Raises:
        SecateurError: for options that contradict each other, weights that cannot be masked, and a model that holds
            masks already.
    """
    own: dict[str, Any] = {"scope": scope, "block": block, "normalize": normalize, "mode": mode, "start": start}
    own |= {"penalty": penalty, "tau": tau, "decay": decay, "exact": exact, "seed": seed, "masks": masks}
    settings = settings_of(method, budget, schedule_of(schedule, begin, end, frequency), own)
    _check_model(model)
    if masks is None:
        weights = maskable(model, inputs, only=only, ignore=ignore).chosen
    elif only or ignore:
        raise SecateurError("masks name the weights, and only or ignore do so too: give one of them")
    else:
        weights = _named_by(model, masks.masks if isinstance(masks, Plan) else masks)
    if masks is None and method != "fixed":
        settings.layout.check(weights)
    given = _fixed(model, weights, masks) if method == "fixed" else {}
    return Sparsity(model, weights, settings, given)


def _check_model(model: nn.Module) -> None:
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise SecateurError(f"the model is wrapped in {type(model).__name__}: sparsify it first, then wrap it")
    first = next(parametrized(model), None)
    if first is not None:
        path, _, leaf = first[0]
        raise SecateurError(f"{path}.{leaf} holds a mask of sparsify already: finalize that one first".lstrip("."))


def _named_by(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> tuple[Weight, ...]:
    if not masks:
        raise SecateurError("the masks that method fixed is to hold are empty")
    check_masks(model, masks)
    return tuple(Weight(name, tuple(mask.shape), (0,), (mask.dim() - 1,)) for name, mask in masks.items())


def _fixed(
    model: nn.Module, weights: Sequence[Weight], masks: Plan | Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    if isinstance(masks, Plan):
        if masks.kept or masks.dropped:
            raise SecateurError(
                "the plan also removes units or blocks: apply it first, and give its masks for what is left"
            )
        masks = masks.masks
    if masks is not None:
        return dict(masks)
    parameters = dict(model.named_parameters())
    found = {w.name: parameters[w.name].detach() != 0 for w in weights}
    if all(bool(mask.all()) for mask in found.values()):
        raise SecateurError(
            "method 'fixed' holds the zeros of the weights, and there are none: prune first, or give masks"
        )
    return found


class Sparsity:
    """Masks over the weights of a model in training, and the count of steps that moves them.

    Made by `sparsify`. Call `step` after every optimiser step and `epoch` after every epoch, add `loss()` to the loss,
    and `finalize` at the end.

    Attributes:
        settings: all choices.
        steps: calls of `step`.
        epochs: calls of `epoch`.
    """

    def __init__(
        self, model: nn.Module, weights: Sequence[Weight], settings: Settings, given: Mapping[str, torch.Tensor]
    ) -> None:
        self.settings = settings
        self.steps = self.epochs = 0
        self._model, self._weights = model, tuple(weights)
        self._keys = list(model.state_dict())
        self._frozen: dict[str, torch.Tensor] | None = None
        self._counts: dict[str, int] | None = None
        found = places(model, [w.name for w in weights])
        parameters = dict(model.named_parameters())
        change = settings.method == "weight_change"
        for name in found:
            if change and not parameters[name].requires_grad:
                raise SecateurError(f"{name} is frozen, so it never changes: ignore it (ignore: {name}), or train it")
        self._masked: dict[str, Masked] = {}
        self._originals: dict[str, nn.Parameter] = {}
        self._places: dict[str, list[Place]] = found
        for name, own in found.items():
            masked = Masked(
                settings.rule.kind, parameters[name], keep_start=change, tau=settings.options.get("tau", 0.0)
            )
            if name in given:
                masked.mask.copy_(given[name])
            attach(own, masked)
            self._masked[name], self._originals[name] = masked, parameters[name]
        if settings.options.get("start") == "magnitude":
            self._start_from_magnitude()
        if settings.schedule is not None and settings.schedule.due(0):
            self._choose()
        self._draw()

    @torch.no_grad()
    def _start_from_magnitude(self) -> None:
        sizes = {name: weight.abs() for name, weight in self._originals.items()}
        mean = sum(float(s.double().sum()) for s in sizes.values()) / sum(s.numel() for s in sizes.values())
        for name, masked in self._masked.items():
            if masked.scores is not None:
                masked.scores.copy_(sizes[name] / (mean or 1.0))

    @property
    def names(self) -> list[str]:
        """The masked weights, by the names that they had before."""
        return list(self._masked)

    @property
    def target(self) -> float | None:
        """The sparsity that the schedule asks for now; None for methods that take no budget."""
        settings = self.settings
        if settings.schedule is None or settings.budget is None:
            return None
        level = self._level()
        if settings.layout.n_m is None:
            return level
        n, m = settings.n_m_at(level)
        return 1 - n / m

    def step(self) -> None:
        """An optimiser step is over.

        Raises:
            SecateurError: after `finalize`, and where scores are not numbers.
        """
        self._running("step")
        self.steps += 1
        schedule = self.settings.schedule
        due = schedule is not None and schedule.per == "batch" and schedule.due(self.steps)
        if due or self.settings.rule.every_step:
            self._choose()
        self._draw()

    def epoch(self) -> None:
        """An epoch is over.

        Raises:
            SecateurError: as for `step`.
        """
        self._running("epoch")
        self.epochs += 1
        schedule = self.settings.schedule
        if schedule is not None and schedule.per == "epoch" and schedule.due(self.epochs):
            self._choose()

    def loss(self) -> torch.Tensor:
        """What the method adds to the loss: a scalar on the model's device, zero for methods without a penalty."""
        self._running("loss")
        kind, options = self.settings.rule.kind, self.settings.options
        weights = list(self._originals.values())
        if kind == "soft":
            return criteria.score_penalty(self.scores()) * float(options["penalty"] * self._level())
        if kind == "gates":
            return criteria.gate_penalty(self.scores(), self._level())
        if kind == "dense":
            return criteria.masked_decay(weights, [m.mask for m in self._masked.values()], options["decay"])
        return torch.zeros((), device=weights[0].device)

    def scores(self) -> list[nn.Parameter]:
        """The learned parameters: scores of movement, gates of rb; none otherwise."""
        return [m.scores for m in self._masked.values() if m.scores is not None]

    def parameter_groups(self, lr_scores: float) -> list[dict[str, Any]]:
        """Groups for an optimiser: the model's parameters, then the scores.

        Args:
            lr_scores: learning rate of the scores, which are not decayed: movement takes about 1e-2, far above that of
                the weights. Without learned scores there is one group alone.
        """
        learned = {id(p) for p in self.scores()}
        rest = [p for p in self._model.parameters() if id(p) not in learned]
        groups: list[dict[str, Any]] = [{"params": rest}]
        return groups + ([{"params": self.scores(), "lr": lr_scores, "weight_decay": 0.0}] if learned else [])

    def statistics(self) -> dict[str, Any]:
        """Where the masks stand.

        Returns:
            ``step``, ``epoch``, ``target`` (sparsity asked for now, or None), ``zeros`` and ``size`` of all masks,
            ``sparsity`` (their ratio), and ``weights``: name -> its zeros, size and sparsity. For rb and soft movement
            the masks are those of evaluation, as learned.
        """
        counts = self._zeros()
        sizes = {w.name: w.size for w in self._weights}
        weights = {n: {"zeros": z, "size": sizes[n], "sparsity": z / max(1, sizes[n])} for n, z in counts.items()}
        zeros, size = sum(counts.values()), sum(sizes.values())
        total = {"zeros": zeros, "size": size, "sparsity": zeros / max(1, size)}
        return {"step": self.steps, "epoch": self.epochs, "target": self.target, **total, "weights": weights}

    def masks(self) -> dict[str, torch.Tensor]:
        """The masks that `finalize` would fold now: weight name -> bool tensor of its shape, True = keep."""
        if self._frozen is not None:
            return dict(self._frozen)
        if self.settings.rule.kind == "gates" and self.settings.options["exact"]:
            scores = {name: s.detach() for name, s in zip(self.names, self.scores(), strict=True)}
            return self._ranked(scores)
        return {name: masked.settled().clone() for name, masked in self._masked.items()}

    def plan(self) -> Plan:
        """A plan with the masks that `finalize` would fold now."""
        settings = self.settings
        origin = {"method": f"sparsify {settings.method}", "budget": str(settings.budget or "none")}
        schedule = settings.schedule
        origin |= {"schedule": "none" if schedule is None else str(schedule), "step": str(self.steps)}
        return Plan(masks=self.masks(), origin=origin)

    def plain_state_dict(self) -> dict[str, torch.Tensor]:
        """The model's state_dict as if it were finalized now: keys from before `sparsify`, zeros folded in.

        The model itself goes on as it is.
        """
        state = self._model.state_dict()
        if self._frozen is not None:
            return state
        masks = self.masks()
        for name, own in self._places.items():
            folded = criteria.masked(self._originals[name].detach(), masks[name])
            for path, _, leaf in own:
                state[f"{path}.{leaf}".lstrip(".")] = folded
        return {key: state[key] for key in self._keys}

    def finalize(self) -> nn.Module:
        """Fold the masks into the weights, in place, and leave the model as it was before `sparsify`.

        Zeros are exact whatever the optimiser did. A step of it after this may revive them. The sparsity is the one
        that the schedule asks for now: the budget's, once the schedule has ended.

        Returns:
            The model: classes, parameter objects and names are those from before.
        """
        self._running("finalize")
        masks = self.masks()
        detach(self._model, {self._masked[name]: mask for name, mask in masks.items()})
        self._frozen = masks
        return self._model

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside the model's and the optimiser's state, in plain types and tensors.

        Masks and scores are in the model's own state_dict too, under ``parametrizations``. Tensors are copies.
        """
        self._running("state_dict")
        found: dict[str, Any] = {"format": FORMAT, "settings": self.settings.record()}
        found |= {"steps": self.steps, "epochs": self.epochs, "masks": {}, "scores": {}, "start": {}}
        for name, masked in self._masked.items():
            for key, tensor in _tensors(masked):
                found[key][name] = tensor.detach().clone()
        return found

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the model's and the optimiser's states are loaded by you.

        Raises:
            SecateurError: for the state of another method, budget, schedule or option, or of other weights; it names
                the first difference.
        """
        self._running("load_state_dict")
        if state.get("format") != FORMAT:
            raise SecateurError(
                f"this is not a state of sparsify of format {FORMAT}, its format is {state.get('format')}"
            )
        mine, theirs = self.settings.record(), state["settings"]
        for key in dict.fromkeys([*mine, *theirs]):
            if mine.get(key) != theirs.get(key):
                raise SecateurError(f"the state has {key} {theirs.get(key)!r}, and this run has {mine.get(key)!r}")
        tensors = [(key, name, t) for name, m in self._masked.items() for key, t in _tensors(m)]
        for name in dict.fromkeys([*self._masked, *state["masks"]]):
            if name not in state["masks"] or name not in self._masked:
                where = "this run does not mask" if name in state["masks"] else "the state has no mask of"
                raise SecateurError(f"the state is of other weights: {where} {name}")
        for key, name, tensor in tensors:
            shape = state[key][name].shape
            if shape != tensor.shape:
                raise SecateurError(
                    f"the state's {key} of {name} are {list(shape)}, and the weight is {list(tensor.shape)}"
                )
        for key, name, tensor in tensors:
            tensor.copy_(state[key][name])
        self.steps, self.epochs = state["steps"], state["epochs"]
        self._counts = None
        self._draw()

    def _running(self, what: str) -> None:
        if self._frozen is not None:
            raise SecateurError(f"{what}: this sparsity is finalized, its masks are folded into the model")

    def _level(self) -> float:
        schedule = self.settings.schedule
        if schedule is None:
            return 0.0
        return schedule.sparsity(self.steps if schedule.per == "batch" else self.epochs, self.settings.final)

    def _zeros(self) -> dict[str, int]:
        if self._frozen is not None:
            return {name: int((~mask).sum()) for name, mask in self._frozen.items()}
        if self.settings.rule.kind in ("soft", "gates"):
            return {name: int((~m.settled()).sum()) for name, m in self._masked.items()}
        if self._counts is None:
            self._counts = {name: int((~m.mask).sum()) for name, m in self._masked.items()}
        return self._counts

    @torch.no_grad()
    def _choose(self) -> None:
        """Take the masks that the scores and the schedule ask for now."""
        kind = self.settings.rule.kind
        if kind in ("soft", "gates") or self.target == 0:
            return
        scores = dict(self._scored())
        for name, mask in self._ranked(scores).items():
            self._masked[name].mask.copy_(mask)
        self._counts = None

    def _scored(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, masked in self._masked.items():
            weight = self._originals[name].detach()
            if masked.scores is not None:
                yield name, masked.scores.detach()
            elif masked.start is not None:
                yield name, criteria.weight_change(weight, masked.start)
            else:
                yield name, criteria.magnitude(weight, bool(self.settings.options.get("normalize")))

    def _ranked(self, scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, score in scores.items():
            if bool(score.isnan().any()):
                raise SecateurError(
                    f"the scores of {name} are not numbers at step {self.steps}: the training has diverged"
                )
        level = self._level()
        layout = self.settings.layout_at(level)
        if layout.scope == "global":
            device = next(iter(scores.values())).device
            scores = {name: score.to(device) for name, score in scores.items()}
        return masks_of(self._weights, scores, level, layout)

    def _draw(self) -> None:
        """Noise of the gates for the step that comes."""
        for index, masked in enumerate(self._masked.values()):
            if masked.noise is not None:
                masked.noise.copy_(criteria.gate_noise(masked.noise, self.settings.options["seed"], self.steps, index))


def _tensors(masked: Masked) -> Iterator[tuple[str, torch.Tensor]]:
    """The state of one weight, by the name of what it is."""
    yield "masks", masked.mask
    if masked.scores is not None:
        yield "scores", masked.scores
    if masked.start is not None:
        yield "start", masked.start
