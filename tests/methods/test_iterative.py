"""Pruning in steps with training in between: what every step reaches, when it ends, and what is given back."""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_nets import Mlp, Residual, pictures
from torch import nn
from torch.nn import functional

import secateur
from secateur.errors import SecateurError
from secateur.measure.sparsity import statistics
from secateur.methods.iterative import Iterative, iterative
from secateur.train import Cubic, MultiStep


def data(count: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in 4 dimensions, and which of three directions they lie along most."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, 4, generator=generator)
    return x, (x @ torch.randn(4, 3, generator=generator)).argmax(1)


X, Y = data()


def train(model: nn.Module, epochs: int) -> None:
    """An optimiser with momentum and decay, which moves everything that nobody holds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    for _ in range(epochs):
        for x, y in zip(X.split(32), Y.split(32), strict=True):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def accuracy(model: nn.Module) -> float:
    return secateur.evaluate(model, [(X, Y)])["accuracy"]


@pytest.fixture(scope="module")
def trained() -> Mlp:
    torch.manual_seed(0)
    model = Mlp(16)
    train(model, 25)
    return model.eval()


@pytest.fixture
def dense(trained: Mlp) -> Iterator[Mlp]:
    """The model, which no run may change."""
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    yield trained
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    assert not trained.training
    assert all(type(m).__module__ != "torch.nn.utils.parametrize" for m in trained.modules())


WEIGHTS = ["up.weight", "mid.weight", "down.weight"]
ELEMENTS = 64 + 112 + 21


def zeros(model: nn.Module) -> int:
    return sum(int((model.get_parameter(name) == 0).sum()) for name in WEIGHTS)


def test_the_cubic_schedule_step_by_step(dense: Mlp) -> None:
    seen: list[tuple[nn.Module, int, bool]] = []

    def training(model: nn.Module, epochs: int) -> None:
        train(model, epochs)
        seen.append((model, epochs, model.training))

    found = iterative(dense, "sparsity=80%", training, accuracy, steps=4, epochs_per_step=2)
    targets = [0.8 * (1 - (1 - k / 4) ** 3) for k in (1, 2, 3, 4)]
    assert [entry["target"] for entry in found.history] == pytest.approx(targets, abs=1e-12)
    for entry, target in zip(found.history, targets, strict=True):
        count = -int(-(target * ELEMENTS - 1e-6) // 1)  # rounded up
        assert entry["sparsity"] == count / ELEMENTS
        assert entry["nonzero"] == entry["params"] - count
        assert entry["params"] == sum(p.numel() for p in dense.parameters())
        assert entry["seconds"] > 0
    assert [entry["step"] for entry in found.history] == [1, 2, 3, 4]
    assert len({id(model) for model, _, _ in seen}) == 4  # a new one at every step
    assert {(epochs, training) for _, epochs, training in seen} == {(2, True)}
    assert (found.best, found.stopped) == (4, "all 4 steps are done")
    assert zeros(found.model) == 158 == statistics(found.model).maskable.zeros
    assert found.history[-1]["after"] == accuracy(found.model)
    assert found.dense == accuracy(dense)
    assert not found.model.training
    json.dumps(found.history, allow_nan=False)


def test_zeros_are_exact_and_stay(dense: Mlp) -> None:
    kept: list[dict[str, torch.Tensor]] = []

    def on_step(model: nn.Module, entry: Any) -> None:
        kept.append({name: model.get_parameter(name) != 0 for name in WEIGHTS})
        assert entry["step"] == len(kept)

    found = iterative(dense, "sparsity=75%", train, accuracy, steps=3, on_step=on_step)
    for before, after in itertools.pairwise(kept):  # nothing that is gone comes back
        assert all(bool((before[name] | ~after[name]).all()) for name in WEIGHTS)
        assert any(not torch.equal(before[name], after[name]) for name in WEIGHTS)
    for name, mask in found.plan.masks.items():
        assert torch.equal(mask, found.model.get_parameter(name) != 0)
    again = secateur.apply(dense, found.plan)
    for name in WEIGHTS:
        assert torch.equal(again.get_parameter(name) == 0, found.model.get_parameter(name) == 0)
        assert not torch.equal(again.get_parameter(name), found.model.get_parameter(name))  # it was trained
    assert type(found.model.up) is nn.Linear


def test_training_in_steps_beats_the_cut_alone(dense: Mlp) -> None:
    found = iterative(dense, "sparsity=80%", train, accuracy, steps=3, epochs_per_step=8)
    once = secateur.prune(dense, "sparsity=80%", method="magnitude").model
    assert found.history[-1]["after"] > accuracy(once) + 0.1
    assert found.history[-1]["after"] > found.history[-1]["before"]


def test_the_same_again(dense: Mlp) -> None:
    runs = [iterative(dense, "sparsity=60%", train, accuracy, steps=2) for _ in range(2)]
    states = [run.model.state_dict() for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    histories = [[{**entry, "seconds": 0} for entry in run.history] for run in runs]
    assert histories[0] == histories[1]


def idle(model: nn.Module, epochs: int) -> None:
    del model, epochs


def scripted(*values: float) -> Callable[[nn.Module], float]:
    """A metric that is told what to say: the dense model's first, then before and after every step."""
    left = iter(values)

    def metric(model: nn.Module) -> float:
        assert not model.training
        return next(left)

    return metric


def test_it_stops_at_the_first_step_beyond_the_tolerance(dense: Mlp) -> None:
    metric = scripted(0.9, 0.1, 0.89, 0.2, 0.88, 0.3, 0.87)
    found = iterative(dense, "sparsity=80%", idle, metric, steps=5, tolerance=0.02)
    assert (found.dense, found.best, len(found.history)) == (0.9, 2, 3)
    assert [(e["before"], e["after"]) for e in found.history] == [(0.1, 0.89), (0.2, 0.88), (0.3, 0.87)]
    assert found.stopped.startswith("step 3 of 5: the metric is 0.87, 0.03 behind the dense model's 0.9; the tolerance")
    assert zeros(found.model) / ELEMENTS == found.history[1]["sparsity"] < found.history[2]["sparsity"]
    assert sum(int((~mask).sum()) for mask in found.plan.masks.values()) == zeros(found.model)


def test_lower_may_be_better(dense: Mlp) -> None:
    metric = scripted(10, 99, 11, 99, 9, 99, 12.5)
    found = iterative(dense, "sparsity=80%", idle, metric, steps=4, tolerance=2, higher_is_better=False)
    assert (found.best, len(found.history)) == (2, 3)
    without = iterative(dense, "sparsity=80%", idle, scripted(10, 99, 11, 99, 12.5), steps=2, higher_is_better=False)
    assert (without.best, without.stopped) == (2, "all 2 steps are done")


def test_no_step_within_the_tolerance_gives_the_dense_model_back(dense: Mlp) -> None:
    found = iterative(dense, "sparsity=80%", idle, scripted(0.9, 0.1, 0.5), steps=3, tolerance=0.1)
    assert (found.best, len(found.history), found.plan.masks) == (0, 1, {})
    assert "step 1 of 3" in found.stopped
    assert "no step is good enough, so the model is the dense one" in found.stopped
    assert found.model is not dense
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), dense.parameters(), strict=True))


def test_training_that_diverges_ends_it_without_a_tolerance_too(dense: Mlp) -> None:
    metric = scripted(5.0, float("inf"), 6.0, 7.0, float("nan"))
    found = iterative(dense, "sparsity=80%", idle, metric, steps=3, higher_is_better=False)
    assert (found.best, [(e["before"], e["after"]) for e in found.history]) == (1, [(None, 6.0), (7.0, None)])
    assert "step 2 of 3: the metric is nan after training, which has diverged" in found.stopped


@pytest.mark.parametrize(
    ("schedule", "targets"),
    [
        ("linear", [0.2, 0.4, 0.6, 0.8]),
        ("constant", [0.8, 0.8, 0.8, 0.8]),
        ("exponential", [1 - 0.2 ** (k / 4) for k in (1, 2, 3, 4)]),
        (MultiStep(steps=(2, 4), values=(0.5, 0.8)), [0.0, 0.5, 0.5, 0.8]),
        (Cubic(begin=0, end=2), [0.7, 0.8, 0.8, 0.8]),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_schedules(dense: Mlp, schedule: Any, targets: list[float]) -> None:
    found = iterative(dense, "sparsity=80%", idle, accuracy, steps=4, schedule=schedule)
    assert [entry["target"] for entry in found.history] == pytest.approx(targets)
    assert [entry["sparsity"] for entry in found.history] == pytest.approx(targets, abs=1 / ELEMENTS)
    assert zeros(found.model) == 158


def test_it_goes_on_from_zeros_that_are_there(dense: Mlp) -> None:
    first = iterative(dense, "sparsity=50%", train, accuracy, steps=1)
    second = iterative(first.model, "sparsity=80%", train, accuracy, steps=2, schedule="linear")
    start = first.history[0]["sparsity"]
    assert [entry["target"] for entry in second.history] == pytest.approx([(start + 0.8) / 2, 0.8])
    for name in WEIGHTS:
        assert bool((second.model.get_parameter(name)[first.model.get_parameter(name) == 0] == 0).all())
    with pytest.raises(SecateurError, match=r"50\.25% of the weights are zero already, and the budget asks for 40%"):
        iterative(first.model, "sparsity=40%", train, accuracy)


def test_n_of_m_is_one_step(dense: Mlp) -> None:
    found = iterative(dense, "n:m=2:4", train, accuracy, steps=1, ignore=["down"])
    assert set(found.plan.masks) == {"up.weight", "mid.weight"}
    assert all(w.patterns["2:4"].all for w in statistics(found.model, ignore=["down"]).weights if w.patterns["2:4"])
    assert (found.history[0]["target"], found.history[0]["sparsity"]) == (0.5, 0.5)
    with pytest.raises(SecateurError, match="n:m=2:4 has no degrees, and 5 steps are asked for: say steps=1"):
        iterative(dense, "n:m=2:4", train, accuracy, ignore=["down"])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_methods_that_calibrate_read_the_data_once(dense: Mlp, method: str) -> None:
    def batches() -> Iterator[torch.Tensor]:
        yield from X.split(32)  # type: ignore[no-untyped-call]

    found = iterative(dense, "sparsity=60%", train, accuracy, method=method, steps=2, data=batches())
    assert [entry["sparsity"] for entry in found.history] == pytest.approx([0.525, 0.6], abs=1 / ELEMENTS)
    assert found.plan.origin["method"] == method
    for name, mask in found.plan.masks.items():
        assert bool((found.model.get_parameter(name)[~mask] == 0).all())


# --- structure ---

PICTURES = pictures(24, 8)
CLASSES = torch.arange(24) % 5


def train_pictures(model: nn.Module, epochs: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(epochs):
        optimizer.zero_grad()
        functional.cross_entropy(model(PICTURES), CLASSES).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def fit(model: nn.Module) -> float:
    return secateur.evaluate(model, [(PICTURES, CLASSES)])["loss"]


def cut_in_steps(budget: str, **options: Any) -> tuple[Residual, Iterative]:
    torch.manual_seed(1)
    net = Residual(24, 20).eval()
    settings = {"method": "structural", "inputs": PICTURES[:2], "higher_is_better": False, "keep_at_least": 0.05}
    return net, iterative(net, budget, train_pictures, fit, **{**settings, **options})


def test_structure_goes_by_shares_of_the_dense_model() -> None:
    net, found = cut_in_steps("macs=40%", steps=3, schedule="linear")
    whole = statistics(net, inputs=PICTURES[:2]).maskable.macs
    assert whole is not None
    assert [entry["target"] for entry in found.history] == pytest.approx([0.2, 0.4, 0.6])
    for entry in found.history:
        assert entry["target"] <= entry["sparsity"] < entry["target"] + 0.03
        assert float(entry["budget"].removeprefix("macs=")) == pytest.approx((1 - entry["target"]) * whole)
    left = statistics(found.model, inputs=PICTURES[:2]).maskable.macs
    assert left == pytest.approx((1 - found.history[-1]["sparsity"]) * whole)
    sizes = [entry["params"] for entry in found.history]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == sum(p.numel() for p in found.model.parameters()) < sum(p.numel() for p in net.parameters())
    assert found.history[-1]["after"] == fit(found.model)


def test_the_plan_of_all_steps_is_one_for_the_dense_model() -> None:
    net, found = cut_in_steps("params=40%", steps=3)
    again = secateur.apply(net, found.plan, inputs=PICTURES[:2])
    assert [p.shape for p in again.parameters()] == [p.shape for p in found.model.parameters()]
    assert all(kept.size in (20, 24) for kept in found.plan.kept.values())
    options: dict[str, Any] = {"method": "structural", "inputs": PICTURES[:2], "keep_at_least": 0.05}
    untrained = iterative(net, "params=40%", idle, fit, steps=3, **options)
    again = secateur.apply(net, untrained.plan, inputs=PICTURES[:2])  # the very units that were left
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), untrained.model.parameters(), strict=True))


def test_a_step_that_keeps_its_limit_already_only_trains() -> None:
    net, found = cut_in_steps("macs=50%", steps=3, schedule="constant")
    assert len({entry["params"] for entry in found.history}) == 1
    assert len({entry["after"] for entry in found.history}) == 3
    del net


def test_several_limits_and_absolute_ones() -> None:
    net, found = cut_in_steps("macs=50%, params=3000", steps=2, schedule="linear")
    params = sum(p.numel() for p in net.parameters())
    assert params > 3000 >= found.history[-1]["params"]
    assert found.history[0]["budget"].endswith(f"params={(params + 3000) / 2:.10g}")
    assert (found.history[0]["target"], found.history[0]["sparsity"] >= 0.25) == (0.25, True)


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        ("sparsity=50%", {"method": "minitron"}, "no iterative pruning with method 'minitron'; known: alps"),
        ("sparsity=50%", {"steps": 0}, "steps must be at least 1, not 0"),
        ("sparsity=50%", {"epochs_per_step": 0}, "epochs_per_step must be at least 1, not 0"),
        ("sparsity=50%", {"tolerance": -0.1}, "tolerance must not be negative, and is -0.1"),
        ("sparsity=50%", {"schedule": "qubic"}, "no schedule 'qubic'; did you mean 'cubic'"),
        ("sparsity=50%", {"schedule": Cubic(end=9)}, "cubic ends at step 9, and there are 5: .*end it at 5"),
        ("sparsity=50%", {"schedule": MultiStep(steps=(1,), values=(0.4,))}, "multistep ends at a value of 0.4"),
        ("macs=50%", {}, "budget of macs is not served by masks"),
        ("sparsity=50%", {"method": "wanda"}, "wanda needs data"),
        ("sparsity=50%", {"stepz": 3}, "magnitude has no option 'stepz'"),
        ("sparsity=50%", {"method": "structural", "inputs": X[:2]}, "sparsity is not served by structural: it takes"),
        ("macs=100%", {"method": "structural", "inputs": X[:2]}, "keeps the budget macs=100% already"),
        ("macs=50%", {"method": "structural"}, "inputs"),
    ],
)
def test_bad_input(dense: Mlp, budget: str, options: Any, message: str) -> None:
    def never(model: nn.Module, *_: int) -> float:
        pytest.fail(f"{type(model).__name__} is trained or measured before the options are known to be right")

    with pytest.raises(SecateurError, match=message):
        iterative(dense, budget, never, never, **options)


@pytest.mark.parametrize(
    ("training", "metric", "message"),
    [
        (idle, lambda _: {"accuracy": 1}, r"evaluate returned a dict, not one number.*\['accuracy'\]"),
        (idle, lambda _: None, "evaluate returned a NoneType"),
        (idle, lambda _: float("nan"), "evaluate gives nan for the dense model"),
        (lambda *_: Mlp(), lambda _: 0.5, "train returned another model.*in place"),
    ],
)
def test_functions_that_do_not_do_as_asked(dense: Mlp, training: Any, metric: Any, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        iterative(dense, "sparsity=50%", training, metric, steps=2)
