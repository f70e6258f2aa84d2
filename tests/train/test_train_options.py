"""What contradicts itself is refused, with both sides."""

import copy
from typing import Any

import pytest
import slow_sparsity as slow
import torch
from torch import nn
from torch.nn.utils import parametrizations

from secateur.choose.plan import Kept, Plan
from secateur.errors import SecateurError
from secateur.train import Constant, Cubic, Linear, sparsify, strip

CUBIC = Cubic(begin=1, end=4)
MASK = {"0.weight": torch.ones(16, 8, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("budget", "options", "says"),
    [
        ("sparsity=50%", {"method": "magnitud"}, "did you mean 'magnitude'"),
        ("sparsity=50%", {}, "needs a schedule, such as secateur.train.Cubic"),
        (None, {"schedule": CUBIC}, "needs a budget, such as sparsity=90% or n:m=2:4"),
        ("params=50%", {"schedule": CUBIC}, "not served by masks"),
        (
            "sparsity=50%",
            {"schedule": CUBIC, "tau": 0.1},
            "takes no option 'tau', which is for movement soft; it takes",
        ),
        ("sparsity=50%", {"schedule": CUBIC, "normalize": True}, "say scope='global'"),
        ("sparsity=50%", {"schedule": CUBIC, "scope": "tensors"}, "did you mean 'tensor'"),
        ("sparsity=50%", {"schedule": CUBIC, "block": (3, 2)}, "blocks of 3x2 do not fit 0.weight"),
        ("sparsity=50%", {"schedule": CUBIC, "block": 4}, "must be two numbers"),
        ("n:m=2:4", {"schedule": CUBIC, "scope": "global"}, "scope 'global' contradicts it"),
        ("n:m=2:4", {"schedule": CUBIC, "block": (2, 4)}, "n:m and block contradict"),
        ("n:m=2:5", {"schedule": CUBIC}, "5 does not divide its 8 inputs"),
        ("n:m=2:16", {"schedule": CUBIC}, "16 does not divide its 8 inputs"),
        ("n:m=2:4,sparsity=70%", {"schedule": CUBIC}, "give one of them"),
        ("sparsity=50%", {"schedule": Cubic(1, 4, initial=0.6)}, "sparsity does not fall"),
        ("sparsity=50%", {"method": "movement", "mode": "sofd"}, "did you mean 'soft'"),
        ("sparsity=50%", {"method": "movement", "mode": "soft", "penalty": 1.0}, "takes no budget (sparsity=50%)"),
        (None, {"method": "movement", "mode": "soft"}, "needs a penalty above 0"),
        (None, {"method": "movement", "mode": "soft", "penalty": 1.0, "tau": 0.5}, "must be in (0, 0.5)"),
        ("sparsity=50%", {"method": "movement", "schedule": CUBIC, "penalty": 1.0}, "takes no option 'penalty'"),
        ("sparsity=50%", {"method": "movement", "schedule": Constant()}, "takes weights away at batch 0"),
        ("sparsity=50%", {"method": "weight_change", "schedule": Linear(1, 2, initial=0.1)}, "at batch 0: begin later"),
        ("n:m=2:4", {"method": "rb", "schedule": CUBIC}, "the budget is n:m=2:4: give sparsity=50%"),
        ("sparsity=50%", {"method": "sr_ste"}, "keeps N of every M, and the budget is sparsity=50%"),
        ("n:m=2:4", {"method": "sr_ste", "decay": -1.0}, "must not be negative"),
        ("sparsity=50%", {"method": "fixed", "masks": MASK}, "takes no budget"),
        (None, {"method": "fixed", "masks": MASK, "schedule": CUBIC}, "takes no schedule (cubic)"),
        (None, {"method": "fixed", "masks": MASK, "only": ["0"]}, "only or ignore do so too"),
        (None, {"method": "fixed"}, "there are none: prune first"),
        (None, {"method": "fixed", "masks": {}}, "are empty"),
        (None, {"method": "fixed", "masks": {"0.weigth": MASK["0.weight"]}}, "did you mean '0.weight'"),
        (None, {"method": "fixed", "masks": {"2.weight": MASK["0.weight"]}}, "must be torch.bool [12, 16]"),
        (None, {"method": "fixed", "masks": {"0.weight": torch.ones(16, 8)}}, "is torch.float32"),
        (None, {"method": "fixed", "masks": Plan({"a": Kept("ffn", 2, (0,))}, (), MASK)}, "apply it first"),
        ("sparsity=50%", {"schedule": CUBIC, "masks": MASK}, "takes no option 'masks', which is for fixed"),
        ("sparsity=50%", {"schedule": CUBIC, "only": ["5"]}, "matches no weight"),
        ("sparsity=50%", {"schedule": CUBIC, "begin": 3}, "cubic has its own"),
    ],
)
def test_contradictions(budget: str | None, options: dict[str, Any], says: str) -> None:
    model = slow.net()
    before = [type(m) for m in model.modules()]
    with pytest.raises(SecateurError) as error:
        sparsify(model, budget, **options)
    assert says in str(error.value)
    assert [type(m) for m in model.modules()] == before


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(8, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc(self.lstm(x)[0])
        return result


def test_models_that_cannot_be_served() -> None:
    with pytest.raises(SecateurError, match=r"lstm\.weight_ih_l0 belongs to LSTM.*ignore it"):
        sparsify(Recurrent(), "sparsity=50%", schedule=CUBIC)
    model = Recurrent()
    s = sparsify(model, "sparsity=50%", schedule=Constant(), ignore=["lstm"])
    assert model(slow.batch(0)[0]).shape == (16, 4)
    assert s.names == ["fc.weight"]
    cell = nn.LSTMCell(8, 6)
    s = sparsify(cell, "sparsity=50%", schedule=Constant())
    assert cell(slow.batch(0)[0])[0].shape == (16, 6)
    assert s.statistics()["sparsity"] == 0.5
    with pytest.raises(SecateurError, match="is on the meta device"):
        sparsify(slow.net().to("meta"), "sparsity=50%", schedule=CUBIC)
    with pytest.raises(SecateurError, match="wrapped in DataParallel"):
        sparsify(nn.DataParallel(slow.net()), "sparsity=50%", schedule=CUBIC)


def test_modules_that_others_parametrize() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    parametrizations.orthogonal(model[0])  # its own weight: nothing left that maskable knows
    assert sparsify(model, "sparsity=50%", schedule=Constant()).names == ["1.weight"]
    model = nn.Sequential(nn.Linear(8, 4))
    parametrizations.weight_norm(model[0], "bias")
    with pytest.raises(SecateurError, match="parametrized already"):
        sparsify(model, "sparsity=50%", schedule=Constant())
    model = nn.Sequential(nn.Linear(8, 8))
    s = sparsify(model, "sparsity=50%", schedule=Constant())
    parametrizations.spectral_norm(model[0])
    with pytest.raises(SecateurError, match=r"0\.weight has other parametrizations too"):
        s.finalize()


def test_a_second_sparsify_is_refused() -> None:
    model = slow.net()
    s = sparsify(model, "sparsity=50%", schedule=Constant(), only=["0"])
    with pytest.raises(SecateurError, match=r"^0\.weight holds a mask of sparsify already"):
        sparsify(model, "sparsity=50%", schedule=Constant(), only=["2"])
    s.finalize()
    sparsify(model, "sparsity=60%", schedule=Constant())


def test_strip_refuses_what_it_cannot_do() -> None:
    with pytest.raises(SecateurError, match="holds no masks"):
        strip(slow.net())
    model = slow.net()
    s = sparsify(model, "sparsity=50%", schedule=Constant(), ignore=["4"])
    masks = s.masks()
    with pytest.raises(SecateurError, match=r"no mask is given for 2\.weight"):
        strip(model, {"0.weight": masks["0.weight"]})
    with pytest.raises(SecateurError, match=r"is given for 4\.weight, where the model holds none"):
        strip(model, {**masks, "4.weight": masks["0.weight"]})
    with pytest.raises(SecateurError, match=r"mask of 2\.weight is \[16, 8\], and the weight is \[12, 16\]"):
        strip(model, {**masks, "2.weight": masks["0.weight"]})
    strip(model, masks)


def test_movement_may_start_with_the_magnitude_of_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    sizes = [model.get_parameter(f"{i}.weight").detach().abs().clone() for i in (0, 2)]
    s = sparsify(model, "sparsity=50%", method="movement", start="magnitude", scope="global", schedule=Constant())
    mean = torch.cat([size.flatten() for size in sizes]).mean()
    for size, score in zip(sizes, s.scores(), strict=True):
        torch.testing.assert_close(score.detach(), size / mean)
    half = torch.cat([size.flatten() for size in sizes]).median()
    assert all(torch.equal(mask, size > half) for mask, size in zip(s.masks().values(), sizes, strict=True))
    with pytest.raises(SecateurError, match="has no start 'magnitud'; did you mean 'magnitude'"):
        sparsify(copy.deepcopy(strip(model)), "sparsity=50%", method="movement", start="magnitud", schedule=Constant())
