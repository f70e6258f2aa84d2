"""A run that is killed and resumed makes the masks of an undisturbed one, to the bit."""

import io
from typing import Any

import pytest
import slow_sparsity as slow
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.train import Constant, Cubic, Sparsity, sparsify


def saved(state: Any) -> Any:
    """Through a file, as plain types and tensors."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", [1, 6, 11])
@pytest.mark.parametrize("run", slow.RUNS)
def test_a_resumed_run_is_the_undisturbed_one(run: str, stop: int) -> None:
    model = slow.net()
    s = slow.start(run, model)
    optimizer = slow.adam(s)
    trail: list[dict[str, torch.Tensor]] = []
    slow.train(model, s, optimizer, range(stop))
    kept = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sparsity": s.state_dict()})
    slow.train(model, s, optimizer, range(stop, 12), lambda: trail.append(s.masks()))

    again = slow.net(seed=9)
    torch.manual_seed(1234)
    other = slow.start(run, again)
    optimizer = slow.adam(other)
    again.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    other.load_state_dict(kept["sparsity"])
    seen: list[dict[str, torch.Tensor]] = []
    slow.train(again, other, optimizer, range(stop, 12), lambda: seen.append(other.masks()))
    assert len(trail) == len(seen) == 12 - stop
    for a, b in zip(trail, seen, strict=True):
        assert list(a) == list(b)
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert s.statistics() == other.statistics()
    s.finalize()
    other.finalize()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_state_is_a_snapshot() -> None:
    model = slow.net()
    s = slow.start("movement", model)
    state = s.state_dict()
    before = saved(state)
    slow.train(model, s, slow.adam(s), range(5))
    assert all(torch.equal(state["scores"][n], before["scores"][n]) for n in s.names)
    assert all(torch.equal(state["masks"][n], before["masks"][n]) for n in s.names)


def cubic(model: nn.Module, **options: Any) -> Sparsity:
    given: dict[str, Any] = {"schedule": Cubic(1, 5), "budget": "sparsity=50%", **options}
    return sparsify(model, given.pop("budget"), **given)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"method": "weight_change"}, "the state has method 'weight_change', and this run has 'magnitude'"),
        ({"budget": "sparsity=60%"}, "the state has budget 'sparsity=60%', and this run has 'sparsity=50%'"),
        ({"schedule": Cubic(1, 6)}, "the state has schedule"),
        ({"scope": "global"}, "the state has scope 'global', and this run has 'tensor'"),
        ({"block": (2, 2)}, "the state has block (2, 2), and this run has (1, 1)"),
        ({"ignore": ["0"]}, "the state has no mask of 0.weight"),
    ],
)
def test_another_run_is_told_the_first_difference(other: dict[str, Any], says: str) -> None:
    state = saved(cubic(slow.net(), **other).state_dict())
    with pytest.raises(SecateurError) as error:
        cubic(slow.net()).load_state_dict(state)
    assert says in str(error.value)


def test_other_weights_are_told() -> None:
    state = cubic(slow.net()).state_dict()
    with pytest.raises(SecateurError, match=r"this run does not mask 0\.weight"):
        cubic(slow.net(), ignore=["0"]).load_state_dict(state)
    model = slow.net()
    model[2] = nn.Linear(16, 20, bias=False)
    s = cubic(model)
    with pytest.raises(SecateurError, match=r"masks of 2\.weight are \[12, 16\], and the weight is \[20, 16\]"):
        s.load_state_dict(state)
    with pytest.raises(SecateurError, match="not a state of sparsify of format 1"):
        s.load_state_dict({})
    assert s.steps == 0
    assert s.statistics()["zeros"] == 0


def test_a_list_for_a_block_is_the_same_block() -> None:
    state = saved(sparsify(slow.net(), "sparsity=50%", schedule=Constant(), block=(2, 2)).state_dict())
    given: Any = [2, 2]
    s = sparsify(slow.net(), "sparsity=50%", schedule=Constant(), block=given)
    s.load_state_dict(state)
    assert s.settings.layout.block == (2, 2)
