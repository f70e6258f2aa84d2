"""Packed masks: bits, counts, files of both formats, and how much of them is in memory."""

import copy
import json
import pickle
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.choose.mask import Layout, masks_each, masks_of
from secateur.choose.packed import PackedMasks, bits_of, kind_of, packed, unpacked, zeros_in
from secateur.choose.plan import Plan, diff
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.space.weights import Weight

SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)


def random_mask(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 99))
def test_bits_come_back_and_are_counted(shape: tuple[int, ...], seed: int) -> None:
    mask = random_mask(*shape, seed=seed)
    bits = packed(mask)
    assert bits.dtype == torch.uint8
    assert bits.shape == (-(-mask.numel() // 8),)
    assert torch.equal(unpacked(bits, shape), mask)
    masks = PackedMasks.of({"w": mask}.items())
    assert torch.equal(masks["w"], mask)
    assert masks.zeros("w") == zeros_in({"w": mask}, "w") == int((~mask).sum())
    assert kind_of(masks, "w") == kind_of({"w": mask}, "w") == (torch.bool, shape)
    assert torch.equal(bits_of(masks, "w"), bits_of({"w": mask}, "w"))


def test_the_lowest_bit_is_the_first_element() -> None:
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 1] = mask[2, 1] = True  # elements 1 and 9
    assert packed(mask).tolist() == [0b10, 0b10]
    assert packed(mask.T).tolist() == [0b101000, 0]  # [4, 3]: elements 3 and 5


def test_a_mapping_that_unpacks_only_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"b": random_mask(3, 5), "a": random_mask(4)}
    masks = PackedMasks.of(plain.items())

    def never(*_: object) -> None:
        raise AssertionError("unpacked")

    with monkeypatch.context() as patch:
        patch.setattr("secateur.choose.packed.unpacked", never)
        plan = Plan(masks=masks)
        zeros = sum(int((~m).sum()) for m in plain.values())
        assert plan.summary() == [f"masks: {zeros} of 19 weights set to zero in 2 tensors"]
        assert plan.only_masks
        assert (list(masks), len(masks), "a" in masks, "c" in masks) == (["b", "a"], 2, True, False)
        assert list(masks.ordered(["a", "b"])) == ["a", "b"]
        assert repr(masks) == "PackedMasks(b: [3, 5], a: [4])"
    assert torch.equal(masks.ordered(["a", "b"])["b"], plain["b"])
    masks["a"].fill_(value=True)  # a copy
    assert torch.equal(masks["a"], plain["a"])
    with pytest.raises(KeyError):
        masks["c"]


def test_what_does_not_fit_is_refused() -> None:
    masks = PackedMasks()
    with pytest.raises(SecateurError, match=r"the mask of w is torch.float32, it must be torch.bool"):
        masks.put("w", torch.ones(2))
    with pytest.raises(
        SecateurError, match=r"packed mask of w is torch.uint8 \[2\], a weight of \[2, 4\] needs .*\[1\]"
    ):
        masks.take("w", torch.zeros(2, dtype=torch.uint8), (2, 4))
    with pytest.raises(SecateurError, match=r"packed mask of w is torch.int8"):
        masks.take("w", torch.zeros(1, dtype=torch.int8), (2, 4))
    with pytest.raises(SecateurError, match="bits beyond the 6 elements"):
        masks.take("w", torch.tensor([0b1000000], dtype=torch.uint8), (2, 3))
    assert not masks


def saved(folder: Path) -> Plan:
    plan = Plan(masks={"v": random_mask(7, 9), "w": random_mask(2, 3, 5, seed=1)}, origin={"method": "wanda"})
    plan.save(folder)
    return plan


def test_a_file_has_a_bit_for_each_weight_and_rests_there(tmp_path: Path) -> None:
    plan = saved(tmp_path)
    tensors = load_file(tmp_path / "plan.safetensors")
    assert {name: (t.dtype, list(t.shape)) for name, t in tensors.items()} == {
        "mask:v": (torch.uint8, [8]), "mask:w": (torch.uint8, [4]),
        "shape:v": (torch.int64, [2]), "shape:w": (torch.int64, [3]),
    }  # fmt: skip
    assert tensors["mask:v"].tolist() == np.packbits(plan.masks["v"].numpy(), bitorder="little").tolist()
    loaded = Plan.load(tmp_path)
    assert isinstance(loaded.masks, PackedMasks)
    assert diff(plan, loaded) == diff(loaded, plan) == []
    bits = loaded.masks.bits("v")
    with (tmp_path / "plan.safetensors").open("rb") as file:  # what is held is the file's own memory
        place = file.read().index(bytes(bits.tolist()))
    changed = (int(bits[0]) ^ 1).to_bytes(1, "little")
    with (tmp_path / "plan.safetensors").open("r+b") as file:
        file.seek(place)
        file.write(changed)
    assert int(bits[0]) == changed[0]


def test_a_loaded_plan_is_copied_sent_and_written_over_its_own_file(tmp_path: Path) -> None:
    plan = saved(tmp_path)
    loaded = Plan.load(tmp_path)
    for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert diff(plan, other) == []
        assert other.masks is not loaded.masks
    loaded.save(tmp_path)
    assert diff(plan, Plan.load(tmp_path)) == diff(plan, loaded) == []


def test_plans_of_format_1_are_read(tmp_path: Path) -> None:
    plan = saved(tmp_path)
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["format"] == 2
    (tmp_path / "plan.json").write_text(json.dumps({**content, "format": 1}))
    save_file({f"mask:{name}": mask for name, mask in plan.masks.items()}, tmp_path / "plan.safetensors")
    loaded = Plan.load(tmp_path)
    assert diff(plan, loaded) == []
    assert loaded.origin == {"method": "wanda"}
    save_file({f"mask:{n}": m.to(torch.int8) for n, m in plan.masks.items()}, tmp_path / "plan.safetensors")
    with pytest.raises(SecateurError, match=r"do not agree: the mask of v is torch.int8"):
        Plan.load(tmp_path)


class Fleeting(Mapping[str, torch.Tensor]):
    """Masks that are made when they are asked for, and must be gone when the one after the next is."""

    def __init__(self, masks: dict[str, torch.Tensor]) -> None:
        self.masks = masks
        self.made: list[weakref.ref[torch.Tensor]] = []

    def __getitem__(self, name: str) -> torch.Tensor:
        assert sum(ref() is not None for ref in self.made) <= 1
        mask = self.masks[name].clone()
        self.made.append(weakref.ref(mask))
        return mask

    def __iter__(self) -> Iterator[str]:
        return iter(self.masks)

    def __len__(self) -> int:
        return len(self.masks)


def test_masks_are_written_and_applied_one_at_a_time(tmp_path: Path) -> None:
    masks = {f"{i}.weight": random_mask(5, 5, seed=i) for i in range(4)}
    plan = Plan(masks=Fleeting(masks))
    plan.save(tmp_path)
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)))
    loaded = Plan.load(tmp_path)
    models = [apply(model, other).state_dict() for other in (plan, Plan(masks=masks), loaded)]
    assert plan.summary() == loaded.summary()
    assert diff(plan, loaded) == []
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name])
        assert torch.equal(value, models[2][name])
    assert int((models[2]["0.weight"] == 0).sum()) == int((~masks["0.weight"]).sum())
    wrong = nn.Sequential(nn.Linear(6, 5), *(nn.Linear(5, 5) for _ in range(3)))
    with pytest.raises(SecateurError, match=r"mask of 0.weight is torch.bool \[5, 5\], it must be torch.bool \[5, 6\]"):
        apply(wrong, loaded)


WEIGHTS = [Weight("a", (6, 8), (0,), (1,)), Weight("b", (2, 4, 4), (1,), (2,)), Weight("c", (4, 8), (0,), (1,), 2)]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.001, 0.3, 0.5, 0.77, 0.999, 1.0]),
    st.sampled_from([(1, 1), (1, 2), (2, 4)]),
    st.sampled_from(["signed", "ties", "far apart", "zeros"]),
)
def test_a_ranking_that_is_counted_out_is_that_of_all_together(
    seed: int, sparsity: float, block: tuple[int, int], kind: str
) -> None:
    make = torch.Generator().manual_seed(seed)
    scores = {w.name: torch.randn(w.shape, generator=make) for w in WEIGHTS}
    if kind == "ties":
        scores = {name: (s * 2).round() for name, s in scores.items()}
    elif kind == "far apart":
        scores = {name: s.abs() ** 20 * 1e-20 for name, s in scores.items()}
    elif kind == "zeros":  # of both signs: they are equal
        scores = {name: (s * 0.4).trunc() * 0.0 for name, s in scores.items()}
    layout = Layout("global", None, block)
    wanted = masks_of(WEIGHTS, scores, sparsity, layout)
    found = dict(masks_each(WEIGHTS, lambda w: scores[w.name], sparsity, layout))
    assert list(found) == ["a", "b", "c"]
    assert all(torch.equal(found[name], mask) for name, mask in wanted.items())
