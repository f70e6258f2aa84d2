"""Distilling and fine-tuning from end to end: what comes back, and that nothing else is touched."""

import copy
import random
from pathlib import Path
from typing import Any

import heal
import numpy as np
import pytest
import torch

from secateur import distill, finetune
from secateur.measure.quality import perplexity
from secateur.methods.feeding import training_feed
from secateur.train import Cubic, sparsify
from secateur.train.settings import Training

EVAL = heal.rows(6, seed=9)


def healed(student: Any = None, teacher: Any = None, data: Any = None, **options: Any) -> Any:
    student = heal.llama(seed=4, intermediate_size=12) if student is None else student
    given = {"steps": 5, "lr": 0.01, "batch_size": 4, **options}
    return distill(teacher or heal.llama(), student, heal.rows(12) if data is None else data, **given)


def snapshot(model: Any) -> Any:
    flags = [(m.training, p.requires_grad) for m in model.modules() for p in m.parameters()]
    config = getattr(model, "config", None)
    tensors = [(n, t.dtype, t.clone()) for n, t in model.state_dict().items()]
    return flags, getattr(config, "_attn_implementation", None), tensors, list(model._forward_hooks), vars(model).keys()


def alike(one: Any, two: Any) -> bool:
    same = all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(one[2], two[2], strict=True))
    return same and one[:2] == two[:2] and one[3:] == two[3:]


@pytest.mark.parametrize(
    "options",
    [
        {"eval_data": EVAL},
        {"hidden": 0.5, "attention": 0.5},
        {"lora": 2, "teacher_dtype": "bfloat16"},
        {"recompute": True, "precision": "bfloat16", "ce": 0.5},
        {"optimizer": "muon"},
    ],
)
def test_nothing_of_the_callers_changes(options: dict[str, Any]) -> None:
    teacher, student = heal.llama(), heal.llama(seed=4, intermediate_size=12)
    teacher.train()
    teacher.model.norm.eval()
    student.model.layers[0].requires_grad_(requires_grad=False)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = snapshot(teacher), snapshot(student)
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    result = healed(student, teacher, **options)
    assert alike(before[0], snapshot(teacher))
    assert alike(before[1], snapshot(student))
    assert torch.equal(numbers[0], torch.get_rng_state())
    assert numbers[1] == random.getstate()
    assert np.array_equal(numbers[2], np.random.get_state()[1])  # type: ignore[index]
    model = result.model
    assert type(model) is type(student)
    assert not model.training
    assert list(model.state_dict()) == list(student.state_dict())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in student.named_parameters()
    }
    assert model.config._attn_implementation == student.config._attn_implementation
    assert not heal.same(model, student)
    if "lora" not in options:
        for a, b in zip(model.model.layers[0].parameters(), student.model.layers[0].parameters(), strict=True):
            assert torch.equal(a, b)


def test_random_numbers_of_a_loader_are_the_callers_too() -> None:
    model, data, held_out = heal.net(), heal.loader(noisy=True), heal.loader(noisy=True)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(finetune(model, data, eval_data=held_out, steps=4, lr=0.01))
        assert torch.equal(before, torch.get_rng_state())
    assert heal.same(results[0].model, results[1].model)
    assert results[0].report["history"] == results[1].report["history"]


def test_the_report() -> None:
    result = healed(eval_data=EVAL, eval_every=1)
    report = result.report
    assert report["method"] == "distill"
    assert (report["steps"], report["tokens"], report["lr"]) == (5, 5 * 4 * 8, 0.01)
    assert report["after"]["perplexity"] == pytest.approx(perplexity(result.model, [EVAL]), rel=1e-5)
    assert report["before"]["perplexity"] == pytest.approx(
        perplexity(heal.llama(seed=4, intermediate_size=12), [EVAL]), rel=1e-5
    )
    assert report["teacher"] == {"perplexity": pytest.approx(perplexity(heal.llama(), [EVAL]), rel=1e-5)}
    values = {entry["step"]: entry["held_out"]["perplexity"] for entry in report["history"]}
    assert report["best"] == min(values, key=lambda step: values[step])
    assert (report["diverged"], report["resumed"], report["stopped"]) == (False, None, "all 5 steps are done")


def test_distilling_brings_the_student_to_the_teacher() -> None:
    result = healed(eval_data=heal.rows(12), steps=40, lr=0.03)
    assert result.report["after"]["kl"] < 0.5 * result.report["before"]["kl"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_zero(optimizer: str, dtype: torch.dtype) -> None:
    student = heal.half_masked(heal.llama()).to(dtype)
    result = healed(student, optimizer=optimizer, weight_decay=0.1, eval_data=EVAL, lr=0.05)
    assert result.report["masks"] == 14
    changed = 0
    for name, p in result.model.named_parameters():
        assert p.dtype == dtype
        before = student.get_parameter(name)
        if "layers" in name and p.dim() > 1:
            assert not p[before == 0].any()
            assert float((p != 0).float().mean()) == pytest.approx(0.5)
            changed += int((p != before).any())
    assert changed == 14 or result.report["best"] == 0
    assert list(result.model.state_dict()) == list(student.state_dict())


def test_half_precision_is_trained_in_float32() -> None:
    """Steps far below the digits of bfloat16 add up."""
    student = heal.llama(seed=4).bfloat16()
    seen = []

    def loss(model: Any, batch: Any) -> Any:
        seen.append({p.dtype for p in model.parameters()})
        return model.lm_head.weight.sum()

    result = finetune(student, heal.rows(8), loss=loss, steps=64, lr=1e-3, decay="constant", warmup=0, batch_size=4)
    assert seen[0] == {torch.float32}
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    moved = (student.lm_head.weight - result.model.get_parameter("lm_head.weight")).float()
    assert float(moved.mean()) == pytest.approx(0.064, rel=0.05)


def test_adapters_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.methods import healing
    from secateur.train import adapters

    student, seen = heal.llama(seed=4), []
    merge = adapters.merged

    def merged(adapter: Any) -> Any:
        with torch.no_grad():
            seen.append(adapter(EVAL).logits)
        return merge(adapter)

    monkeypatch.setattr(healing, "merged", merged)
    result = healed(student, lora=2, lr=0.05)
    with torch.no_grad():
        found = result.model(EVAL).logits
    assert torch.allclose(found, seen[0], atol=1e-4)
    assert not torch.allclose(found, student(EVAL).logits, atol=1e-2)
    assert [type(m) for m in result.model.modules()] == [type(m) for m in student.modules()]
    assert torch.equal(result.model.lm_head.weight, student.lm_head.weight)
    assert vars(result.model).keys() == vars(student).keys()


def test_a_cnn_learns_from_logits_and_features() -> None:
    teacher, student = heal.net(), heal.net(seed=3, inside=3)
    result = distill(
        teacher, student, heal.loader(), eval_data=[heal.pictures(8)], steps=6, lr=0.02, hidden=0.3, temperature=2.0
    )
    assert set(result.report["after"]) == {"accuracy", "loss", "kl"}
    assert set(result.report["history"][-1]["train"]) == {"loss", "kl", "hidden", "lr", "grad_norm"}
    assert result.report["tokens"] is None
    assert int(result.model.get_buffer("blocks.0.1.num_batches_tracked")) in (0, *range(1, 7))


def test_sources_by_weight() -> None:
    data = {"a": (heal.rows(9), 0.7), "b": (heal.rows(6, seed=3), 0.3)}
    assert healed(data=data).report["tokens"] == 5 * 4 * 8


def test_lengths_of_a_run() -> None:
    assert healed(steps=None).report["steps"] == 3  # an epoch
    assert healed(steps=None, epochs=2.0).report["steps"] == 6
    assert healed(steps=None, tokens=320, accumulate=2).report["steps"] == 5


def test_finetuning_by_a_metric_of_ones_own() -> None:
    values = iter([0.1, 0.5, 0.9, 0.2, 0.1, 0.1])

    def score(model: Any) -> float:
        assert not model.training
        return next(values)

    result = finetune(heal.net(), heal.loader(), evaluate=score, steps=5, lr=0.01, eval_every=1)
    assert (result.report["best"], result.report["after"]) == (2, {"score": 0.9})


def test_sparsity_that_grows_is_there_at_the_end() -> None:
    model = heal.net()
    model.fc.weight.grad = torch.full_like(model.fc.weight, torch.nan)  # what an earlier loop left behind
    sparsity = sparsify(model, "sparsity=60%", schedule=Cubic(begin=1, end=6))
    result = finetune(
        model, heal.loader(), sparsity=sparsity, eval_data=[heal.pictures(8)], steps=8, lr=0.01, eval_every=1
    )
    assert result.model is model
    assert sparsity.statistics()["sparsity"] == pytest.approx(0.6, abs=0.02)
    assert result.report["best"] >= 6
    assert not result.report["diverged"]


def test_a_rate_that_is_far_too_high(tmp_path: Path) -> None:
    student = heal.net(seed=3)
    for folder in (None, tmp_path):
        result = distill(
            heal.net(), student, heal.loader(), eval_data=[heal.pictures(8)], steps=30, lr=1e30, clip=0, warmup=0,
            optimizer="sgd", work=folder,
        )  # fmt: skip
        assert result.report["diverged"]
        assert "diverged: take a smaller lr" in result.report["stopped"]
        assert (result.report["best"], result.report["after"]) == (0, result.report["before"])
        assert heal.same(result.model, student)
    without = distill(heal.net(), student, heal.loader(), steps=30, lr=1e30, clip=0, warmup=0, optimizer="sgd")
    assert without.report["diverged"]
    assert heal.same(without.model, student)


def test_the_teacher_is_not_asked_in_the_students_precision() -> None:
    teacher, dtypes = heal.llama(), []
    teacher.lm_head.register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
    healed(teacher=teacher, precision="bfloat16", steps=2)
    assert set(dtypes) == {torch.float32}


def test_copies_go_on_training() -> None:
    result = healed()
    model = copy.deepcopy(result.model).train()
    model(heal.rows(2), labels=heal.rows(2)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_feed_is_gone_through_as_it_is() -> None:
    """What a schedule was fitted to is what is trained on: the mix, its order and its length."""
    mixed = {"a": (heal.rows(12), 0.7), "b": (heal.rows(8, seed=2), 0.3)}
    feed = training_feed(heal.llama(), mixed, Training(seed=3), {"batch_size": 2})
    assert training_feed(heal.llama(), feed, Training(), {}) is feed
    by_feed = finetune(heal.llama(), feed, seed=3, steps=4)
    by_mix = finetune(heal.llama(), mixed, seed=3, steps=4, batch_size=2)
    assert by_feed.report["history"] == by_mix.report["history"]
