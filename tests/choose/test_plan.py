"""Plans: written, read, compared, replayed."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import logits, random_plan, tiny, tokens

from secateur.choose.plan import Kept, Plan, diff
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.space import discover

NAMES = st.text("abcdefgh.0123456789_", min_size=1, max_size=12)


@st.composite
def kept(draw: st.DrawFn) -> Kept:
    size = draw(st.integers(1, 40))
    units = draw(st.sets(st.integers(0, size - 1), min_size=1))
    return Kept(draw(st.sampled_from(["hidden", "ffn", "heads"])), size, tuple(sorted(units)))


@st.composite
def mask(draw: st.DrawFn) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    bits = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(bits).reshape(rows, columns)


PLANS = st.builds(
    Plan,
    st.dictionaries(NAMES, kept(), max_size=4),
    st.lists(NAMES, unique=True, max_size=3).map(tuple),
    st.dictionaries(NAMES, mask(), max_size=3),
    st.dictionaries(NAMES, st.text(max_size=8), max_size=2),
)


def same(a: Plan, b: Plan) -> bool:
    masks = a.masks.keys() == b.masks.keys() and all(torch.equal(a.masks[n], b.masks[n]) for n in a.masks)
    return masks and (dict(a.kept), a.dropped, dict(a.origin)) == (dict(b.kept), b.dropped, dict(b.origin))


@settings(max_examples=40, deadline=None)
@given(PLANS)
def test_read_is_what_was_written(plan: Plan) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plan.save(Path(folder))
        again = Plan.load(Path(folder))
    assert same(again, plan)
    assert diff(plan, again) == []
    assert all(m.dtype == torch.bool for m in again.masks.values())


@settings(max_examples=60, deadline=None)
@given(PLANS, PLANS)
def test_diff_is_empty_only_for_the_same_decision(a: Plan, b: Plan) -> None:
    assert diff(a, a) == []
    differs = not same(Plan(a.kept, tuple(sorted(a.dropped)), a.masks), Plan(b.kept, tuple(sorted(b.dropped)), b.masks))
    assert bool(diff(a, b)) == differs == bool(diff(b, a))


def test_diff_says_what_differs() -> None:
    weight = torch.tensor([[True, False]])
    a = Plan({"x.ffn": Kept("ffn", 8, (0, 1, 2)), "y.ffn": Kept("ffn", 8, (0,))}, ("layers.1",), {"w": weight})
    b = Plan({"x.ffn": Kept("ffn", 8, (1, 2, 5, 7)), "z.ffn": Kept("ffn", 8, (0, 3))}, ("layers.2",), {"w": ~weight})
    assert diff(a, b) == [
        "x.ffn: 3 -> 4 units (1 kept no more, 2 kept anew)",
        "y.ffn: cut to 1 only in the first plan",
        "z.ffn: cut to 2 only in the second plan",
        "layers.1: dropped only in the first plan",
        "layers.2: dropped only in the second plan",
        "w: another mask",
    ]
    assert diff(Plan(masks={"w": weight}), Plan()) == ["w: masked only in the first plan"]
    assert diff(Plan(masks={"w": weight}), Plan(masks={"w": weight.repeat(2, 1)})) == ["w: another mask"]


def test_summary() -> None:
    assert Plan().summary() == ["nothing is cut"]
    plan = Plan(
        {
            "hidden": Kept("hidden", 48, tuple(range(32))),
            "a.ffn": Kept("ffn", 80, tuple(range(40))),
            "b.ffn": Kept("ffn", 80, tuple(range(41))),
        },
        ("layers.1",),
        {"w": torch.tensor([[True, False], [False, False]])},
    )
    assert plan.summary() == [
        "hidden: keep 32 of 48",
        "ffn: keep 40 of 80, 41 of 80 on 2 axes",
        "dropped: layers.1",
        "masks: 3 of 4 weights set to zero in 1 tensors",
    ]


def test_one_mask_for_two_weights_can_be_written(tmp_path: Path) -> None:
    shared = torch.tensor([[True, False]])
    plan = Plan(masks={"a": shared, "b": shared, "c": shared.expand(3, 2)})
    plan.save(tmp_path)
    assert same(Plan.load(tmp_path), plan)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_replay_gives_the_same_tensors(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    space = discover(model)
    plan = random_plan(space, ["hidden", "kv_groups", "heads", "ffn", "layers"])
    first = apply(model, plan, space=space)
    plan.save(tmp_path)
    again = apply(model, Plan.load(tmp_path), space=space)
    before, after = first.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(logits(first, tokens()), logits(again, tokens()))


def written(folder: Path) -> dict[str, Any]:
    """A saved plan's JSON, to be damaged."""
    plan = Plan({"a.ffn": Kept("ffn", 8, (1, 2))}, ("layers.1",), {"w": torch.ones(2, 2, dtype=torch.bool)})
    plan.save(folder)
    content: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return content


def test_json_is_for_people(tmp_path: Path) -> None:
    content = written(tmp_path)
    assert content["axes"] == {"a.ffn": {"kind": "ffn", "size": 8, "kept": 2}}
    assert content["dropped"] == ["layers.1"]
    assert content["masks"] == {"w": [2, 2]}


@pytest.mark.parametrize(
    "change",
    [
        {"format": 1},
        {"format": 3},
        {"format": True},
        {"axes": {"b.ffn": {"kind": "ffn", "size": 8, "kept": 2}}},
        {"axes": {"a.ffn": {"kind": "ffn", "size": 8, "kept": 3}}},
        {"axes": {"a.ffn": {"kind": "ffn"}}},
        {"axes": {}},
        {"axes": None},
        {"dropped": None},
        {"masks": {"v": [2, 2]}},
        {"masks": {"w": [2, 3]}},
        {"masks": {"w": [4]}},
        {"masks": {"w": 4}},
        {"masks": {}},
    ],
    ids=str,
)
def test_files_that_do_not_agree(change: Mapping[str, Any], tmp_path: Path) -> None:
    content = {**written(tmp_path), **change}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(SecateurError, match="plan"):
        Plan.load(tmp_path)


@pytest.mark.parametrize("key", ["format", "axes", "dropped", "masks", "origin"])
def test_missing_key(key: str, tmp_path: Path) -> None:
    content = written(tmp_path)
    del content[key]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(SecateurError, match="plan"):
        Plan.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\xfa"], ids=str)
@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
def test_damaged_file(name: str, content: bytes, tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SecateurError, match="plan"):
        Plan.load(tmp_path)


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
def test_missing_file(name: str, tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(SecateurError, match="no readable plan"):
        Plan.load(tmp_path)
