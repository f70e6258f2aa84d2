"""Masks while a model trains: the right ones at every step, exact at the end, and the model as it was."""

import copy
from typing import Any

import pytest
import slow_sparsity as slow
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.train import Constant, Cubic, Linear, Sparsity, sparsify


def originals(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights under the masks."""
    found = {n: p.detach() for n, p in model.named_parameters() if n.endswith(".original")}
    return {n.replace("parametrizations.", "").removesuffix(".original"): p for n, p in found.items()}


def scores_of(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.detach() for n, p in model.named_parameters() if n.endswith(".scores")}
    return {n.replace("parametrizations.", "").removesuffix(".0.scores"): p for n, p in found.items()}


def ceil_share(size: int, share: float) -> int:
    return int(-(-(size * share - 1e-6) // 1))


@pytest.mark.parametrize("run", ["magnitude", "movement", "weight_change"])
def test_masks_of_each_tensor_follow_the_schedule(run: str) -> None:
    model = slow.net().double()
    before = {n: p.detach().clone() for n, p in slow.weights_of(model).items()}
    s = slow.start(run, model)
    schedule = slow.RUNS[run]["schedule"]
    final = {"magnitude": 0.7, "movement": 0.6, "weight_change": 0.6}[run]
    expected: dict[str, list[list[bool]]] = {}

    def see() -> None:
        level = slow.cubic(s.steps, schedule.begin, schedule.end, schedule.frequency, 0.0, final)
        assert s.target == pytest.approx(level)
        masks = s.masks()
        if schedule.due(s.steps) or run == "movement":
            done, wanted = 0, 0.0  # counts are shared out by cumulative rounding over the tensors
            for name, weight in originals(model).items():
                score = {
                    "magnitude": weight.abs(),
                    "movement": scores_of(model).get(name, weight),
                    "weight_change": (weight - before[name]).abs(),
                }[run]
                wanted += score.numel() * level
                zeros = ceil_share(1, wanted) - done
                done += zeros
                expected[name] = slow.kept_of(score.tolist(), zeros)
        for name, kept in expected.items():
            assert masks[name].tolist() == kept, (name, s.steps)

    slow.train(model, s, slow.adam(s), range(12), see)
    assert s.statistics()["zeros"] == ceil_share(s.statistics()["size"], final)


@pytest.mark.parametrize("run", ["magnitude-global", "movement-global"])
def test_global_masks_rank_all_weights_together(run: str) -> None:
    model = slow.net().double()
    s = slow.start(run, model)
    slow.train(model, s, slow.adam(s), range(12 if "movement" in run else 6))
    scores = scores_of(model)
    if run == "magnitude-global":
        scores = {n: w.abs() / sum(float(v) ** 2 for v in w.flatten()) ** 0.5 for n, w in originals(model).items()}
    rows = [score.flatten().tolist() for score in scores.values()]
    kept = slow.kept_of(rows, ceil_share(sum(map(len, rows)), 0.7 if run == "magnitude-global" else 0.6))
    assert [s.masks()[n].flatten().tolist() for n in scores] == kept


def test_n_of_m_is_reached_step_by_step() -> None:
    model = slow.net()
    s = sparsify(model, "n:m=1:4", schedule=Linear(begin=0, end=3))
    seen = []
    for _ in range(4):
        weight = originals(model)["0.weight"]
        n = 4 - s.steps
        assert s.masks()["0.weight"].tolist() == [slow.n_of_m(row, n, 4) for row in weight.abs().tolist()]
        seen.append(s.target)
        s.step()
    assert seen == [0, 0.25, 0.5, 0.75]


def test_blocks_go_whole() -> None:
    model = slow.net()
    s = sparsify(model, "sparsity=50%", schedule=Constant(), block=(2, 4))
    tiles = s.masks()["0.weight"].reshape(8, 2, 2, 4).transpose(1, 2).flatten(2)
    assert torch.equal(tiles.any(-1), tiles.all(-1))
    sums = originals(model)["0.weight"].abs().reshape(8, 2, 2, 4).sum((1, 3)).flatten()
    assert int(tiles.all(-1).sum()) == 8
    assert set(sums.argsort(descending=True)[:8].tolist()) == set(tiles.all(-1).flatten().nonzero().flatten().tolist())


def test_sr_ste_masks_follow_the_weights_and_masked_weights_move() -> None:
    model = slow.net()
    s = slow.start("sr_ste", model)
    before = {n: w.clone() for n, w in originals(model).items()}
    gone = {n: ~m for n, m in s.masks().items()}
    assert s.statistics()["sparsity"] == 0.5

    def see() -> None:
        for name, weight in originals(model).items():
            assert s.masks()[name].tolist() == [slow.n_of_m(row, 2, 4) for row in weight.abs().tolist()]

    slow.train(model, s, torch.optim.SGD(model.parameters(), lr=0.1), range(6), see)
    assert all((originals(model)[n] != before[n])[gone[n]].any() for n in before)


def test_stale_weights_return_when_the_others_shrink() -> None:
    layer = nn.Linear(4, 1, bias=False)
    model = nn.Sequential(layer)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    s = sparsify(model, "sparsity=50%", schedule=Constant(begin=0, end=2))
    assert s.masks()["0.weight"].tolist() == [[False, False, True, True]]
    with torch.no_grad():
        originals(model)["0.weight"][0, 3] = 0.5
    s.step()
    assert s.masks()["0.weight"].tolist() == [[False, True, True, False]]
    with torch.no_grad():
        originals(model)["0.weight"][0, 3] = 9
    s.step()
    s.step()  # after the end masks are held
    assert s.masks()["0.weight"].tolist() == [[False, False, True, True]]
    with torch.no_grad():
        originals(model)["0.weight"][0, 0] = 9
    s.step()
    assert s.masks()["0.weight"].tolist() == [[False, False, True, True]]


def test_masked_weights_get_no_gradient() -> None:
    model = slow.net()
    s = sparsify(model, "sparsity=50%", schedule=Constant())
    model(slow.batch(0)[0]).square().sum().backward()
    gradient = dict(model.named_parameters())["0.parametrizations.weight.original"].grad
    assert gradient is not None
    assert not gradient[~s.masks()["0.weight"]].any()
    assert gradient[s.masks()["0.weight"]].any()


def test_soft_movement_masks_by_threshold_and_its_penalty_grows() -> None:
    model = slow.net()
    s = slow.start("movement-soft", model)
    assert float(s.loss().detach()) == 0.0
    assert s.statistics()["zeros"] == 0
    s.step()
    assert float(s.loss().detach()) == pytest.approx(30 * 0.2 * 0.5)
    slow.train(model, s, slow.adam(s), range(1, 40))
    assert s.target is None
    values = {n: v.tolist() for n, v in scores_of(model).items()}
    for name, rows in values.items():
        assert s.masks()[name].tolist() == [[slow.sigmoid(v) > 0.1 for v in row] for row in rows]
    flat = [v for rows in values.values() for row in rows for v in row]
    assert float(s.loss().detach()) == pytest.approx(30 * sum(map(slow.sigmoid, flat)) / len(flat))
    assert 0 < s.statistics()["sparsity"] < 1


def test_rb_learns_the_share_and_folds_the_exact_one() -> None:
    model = slow.net()
    s = slow.start("rb", model)
    assert float(s.loss().detach()) == pytest.approx(0.0)
    slow.train(model, s, slow.adam(s), range(100))
    learned = s.statistics()
    assert learned["sparsity"] == pytest.approx(0.5, abs=0.1)  # the gates found the target by themselves
    assert learned["zeros"] == sum(int((v <= 0).sum()) for v in scores_of(model).values())
    rows = [v.flatten().tolist() for v in scores_of(model).values()]
    kept = slow.kept_of(rows, ceil_share(learned["size"], 0.5))
    assert [m.flatten().tolist() for m in s.masks().values()] == kept
    s.finalize()
    assert s.statistics()["zeros"] == learned["size"] // 2


def test_rb_draws_anew_at_each_step_and_not_in_evaluation() -> None:
    model = slow.net()
    s = slow.start("rb", model, exact=False)
    with torch.no_grad():
        for scores in s.scores():
            scores.fill_(0.1)
    weight: Any = model[0]
    first, again = weight.weight.detach(), weight.weight.detach()
    assert torch.equal(first, again)
    s.step()
    assert not torch.equal(first, weight.weight.detach())
    model.eval()
    assert torch.equal(weight.weight.detach(), originals(model)["0.weight"])
    assert all(m.all() for m in s.masks().values())


@pytest.mark.parametrize("run", slow.RUNS)
def test_finalize_gives_the_model_back_with_exact_zeros(run: str) -> None:
    model = slow.net()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    early = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)  # made before sparsify
    s = slow.start(run, model)
    late = slow.adam(s)
    slow.train(model, s, early, range(4))
    slow.train(model, s, late, range(4, 12))
    masks, plain, plan = s.masks(), s.plain_state_dict(), s.plan()
    expected = {n: torch.where(masks[n], w, 0.0) for n, w in originals(model).items()}
    assert s.finalize() is model
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert list(model.state_dict()) == keys == list(plain)
    for name, weight in expected.items():
        assert torch.equal(model.state_dict()[name], weight)
    assert all(torch.equal(plain[n], v) for n, v in model.state_dict().items())
    assert s.statistics()["zeros"] == sum(int((~m).sum()) for m in masks.values())
    assert set(plan.masks) == set(masks)
    assert all(torch.equal(plan.masks[n], masks[n]) for n in masks)
    if s.target is not None:
        assert s.statistics()["sparsity"] == pytest.approx(s.target, abs=1 / 300)
    optimizer_step(model, early)
    with pytest.raises(SecateurError, match="is finalized"):
        s.step()


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The optimiser still moves the parameters."""
    before = [p.detach().clone() for p in model.parameters()]
    model(slow.batch(0)[0]).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


def test_plan_goes_to_fixed_and_holds() -> None:
    model = slow.net()
    s = sparsify(model, "sparsity=50%", schedule=Constant())
    plan = s.plan()
    assert plan.origin["method"] == "sparsify magnitude"
    assert plan.origin["budget"] == "sparsity=50%"
    s.finalize()
    for masks in (None, plan, plan.masks):
        held = sparsify(copy.deepcopy(model), method="fixed", masks=masks)
        assert all(torch.equal(m, plan.masks[n]) for n, m in held.masks().items())
    s = sparsify(model, method="fixed")
    slow.train(model, s, slow.adam(s), range(6))
    s.finalize()
    assert all(torch.equal(p != 0, plan.masks[n]) for n, p in slow.weights_of(model).items())


# Edge cases


def test_sparsity_zero_masks_nothing() -> None:
    model = slow.net()
    s = sparsify(model, "sparsity=0%", schedule=Constant())
    slow.train(model, s, slow.adam(s), range(2))
    assert s.statistics()["zeros"] == 0
    assert all(m.all() for m in s.masks().values())


def test_ties_and_constant_tensors_give_exact_counts() -> None:
    choices: list[dict[str, Any]] = [{}, {"scope": "global"}, {"scope": "global", "normalize": True}]
    for options in choices:
        model = slow.net()
        with torch.no_grad():
            for p in slow.weights_of(model).values():
                p.fill_(0.5)
        s = sparsify(model, "sparsity=33%", schedule=Constant(), **options)
        assert s.statistics()["zeros"] == ceil_share(368, 0.33)
        assert s.masks()["0.weight"].flatten()[0]  # what comes first stays


def test_frozen_weights_and_weights_without_gradient() -> None:
    model = slow.net()
    model[0].weight.requires_grad_(False)
    with pytest.raises(SecateurError, match=r"0\.weight is frozen, so it never changes"):
        slow.start("weight_change", copy.deepcopy(model))
    for run in ("magnitude", "movement", "rb", "sr_ste"):
        frozen = copy.deepcopy(model)
        s = slow.start(run, frozen)
        slow.train(frozen, s, slow.adam(s), range(12))
        s.finalize()
        assert not frozen[0].weight.requires_grad
        assert s.statistics()["weights"]["0.weight"]["zeros"] > 0
    unused = nn.ModuleDict({"used": nn.Linear(8, 4), "unused": nn.Linear(8, 4)})
    s = sparsify(unused, "sparsity=50%", method="movement", schedule=Constant(begin=1))
    optimizer = slow.adam(s)
    unused["used"](slow.batch(0)[0]).square().sum().backward()
    optimizer.step()
    s.step()
    assert s.statistics()["weights"]["unused.weight"]["zeros"] == 16


def test_steps_before_the_beginning_change_nothing() -> None:
    model = slow.net()
    s = sparsify(model, "sparsity=50%", schedule=Cubic(begin=5, end=9))
    for _ in range(4):
        s.step()
    assert s.statistics()["zeros"] == 0
    assert s.target == 0
    s.epoch()
    assert s.statistics() == {**s.statistics(), "step": 4, "epoch": 1}


def test_a_schedule_of_length_zero_and_one_by_epochs() -> None:
    s = sparsify(slow.net(), "sparsity=50%", schedule=Cubic(begin=2, end=2))
    seen = []
    for _ in range(4):
        seen.append(s.statistics()["zeros"])
        s.step()
    assert seen == [0, 0, 184, 184]
    s = sparsify(slow.net(), "sparsity=50%", schedule="linear", begin=0, end=2)
    s = sparsify(slow.net(), "sparsity=50%", schedule=Linear(begin=0, end=2, per="epoch"))
    s.step()
    assert s.target == 0
    s.epoch()
    assert s.statistics()["sparsity"] == 0.25


def test_scores_that_are_no_numbers_are_told() -> None:
    model = slow.net()
    s = sparsify(model, "sparsity=50%", schedule=Constant(begin=1))
    with torch.no_grad():
        originals(model)["2.weight"][0, 0] = float("nan")
    with pytest.raises(SecateurError, match=r"2\.weight are not numbers at step 1"):
        s.step()


def test_half_precision_weights_keep_wide_scores() -> None:
    model = slow.net().bfloat16()
    s = slow.start("movement", model)
    assert {p.dtype for p in s.scores()} == {torch.float32}
    x, y = slow.batch(0)
    (model(x.bfloat16()) - y.bfloat16()).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in s.scores())
    s.finalize()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_statistics_are_plain_numbers() -> None:
    s: Sparsity = sparsify(slow.net(), "sparsity=50%", schedule=Constant(), ignore=["2"])
    assert s.statistics() == {
        "step": 0,
        "epoch": 0,
        "target": 0.5,
        "zeros": 88,
        "size": 176,
        "sparsity": 0.5,
        "weights": {
            "0.weight": {"zeros": 64, "size": 128, "sparsity": 0.5},
            "4.weight": {"zeros": 24, "size": 48, "sparsity": 0.5},
        },
    }


def test_parameter_groups_part_scores_from_weights() -> None:
    model = slow.net()
    assert len(slow.start("magnitude", copy.deepcopy(model)).parameter_groups(0.1)) == 1
    s = slow.start("movement", model)
    rest, learned = s.parameter_groups(0.1)
    assert [id(p) for p in learned["params"]] == [id(p) for p in s.scores()]
    assert (learned["lr"], learned["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in rest["params"]} | {id(p) for p in s.scores()} == {id(p) for p in model.parameters()}
