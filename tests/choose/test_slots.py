"""Slots and their levels, on Spaces of tiny models."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from mixtures import mixture
from small_nets import Residual, pictures, shaken
from tiny import tiny

from secateur.choose.select import least_units
from secateur.choose.slots import make_slots
from secateur.choose.table import Level, Slot
from secateur.errors import SecateurError
from secateur.space import Space, discover

HEADS, GROUPS, FFN = "self_attn.heads", "self_attn.kv_groups", "mlp.ffn"


@cache
def space_of(name: str, **options: Any) -> Space:
    if name == "residual":
        return discover(shaken(Residual()), pictures())
    return discover(mixture(name, device="meta") if name == "mixtral" else tiny(name, device="meta", **options))


def slots(space: Space, *kinds: str, keep: float = 0.0, **options: Any) -> list[Slot]:
    axes = [a for a in space.axes if a.kind in kinds]
    least = least_units(space, [], axes, keep, {})
    how: dict[str, Any] = {"levels": 5, "uniform": False, "drop": False, **options}
    return make_slots(space, axes, least, **how)


def layer(i: int, leaf: str) -> str:
    return f"model.layers.{i}.{leaf}"


def sizes(slot: Slot, axis: str) -> list[int | None]:
    """Units of an axis in each level; None = whole."""
    return [level.sizes.get(axis) for level in slot.levels]


def names(found: Sequence[Slot]) -> list[str]:
    return [slot.name for slot in found]


def test_levels_are_spread_evenly_from_the_whole_to_what_must_stay() -> None:
    found = slots(space_of("llama"), "ffn", keep=0.2)
    assert names(found) == [layer(0, FFN), layer(1, FFN)]
    assert found[0].levels[0] == Level()
    assert sizes(found[0], layer(0, FFN)) == [None, 64, 48, 32, 16]
    assert found[0].axes == (layer(0, FFN),)


def test_few_sizes_are_all_levels() -> None:
    """Heads of one KV group: two, or one."""
    found = slots(space_of("llama"), "heads", levels=9)
    assert [sizes(slot, slot.axes[0]) for slot in found] == [[None, 1], [None, 1]]


def test_uniform_ties_what_is_alike_in_all_layers() -> None:
    (found,) = slots(space_of("llama"), "ffn", uniform=True)
    assert found.name == "ffn"
    assert found.axes == (layer(0, FFN), layer(1, FFN))
    assert all(set(level.sizes) == set(found.axes) for level in found.levels[1:])
    assert all(len(set(level.sizes.values())) == 1 for level in found.levels[1:])


def test_axes_that_lie_in_no_block_are_not_tied() -> None:
    found = slots(space_of("residual"), "channels", uniform=True)
    assert names(found) == ["conv.channels", "first.channels"]
    assert all(len(slot.axes) == 1 for slot in found)


def test_heads_go_with_the_groups_that_they_are_in() -> None:
    space = space_of("llama", num_attention_heads=8, num_key_value_heads=4)
    first, second = slots(space, "heads", "kv_groups", levels=6)
    heads, groups = layer(0, HEADS), layer(0, GROUPS)
    assert set(first.axes) == {heads, groups}
    assert second.axes == (layer(1, HEADS), layer(1, GROUPS)) or set(second.axes) == {layer(1, HEADS), layer(1, GROUPS)}
    states = [(level.sizes.get(heads, 2), level.sizes.get(groups, 4)) for level in first.levels]
    assert sorted(states) == sorted((h, g) for h in (1, 2) for g in (1, 2, 3, 4))
    shares = [h * g for h, g in states]
    assert shares == sorted(shares, reverse=True)
    assert states[0] == (2, 4)


def test_many_combinations_are_thinned_and_the_ends_stay() -> None:
    space = space_of("llama", hidden_size=96, num_attention_heads=24, num_key_value_heads=4, head_dim=4)
    first = slots(space, "heads", "kv_groups", levels=4)[0]
    assert len(first.levels) == 8
    assert first.levels[0] == Level()
    assert first.levels[-1].sizes == {layer(0, HEADS): 1, layer(0, GROUPS): 1}
    assert len({tuple(sorted(level.sizes.items())) for level in first.levels}) == 8


def test_keep_at_least_counts_heads_in_each_group() -> None:
    space = space_of("llama", num_attention_heads=8, num_key_value_heads=2)
    for keep, lowest in ((0.5, 2), (0.51, 3), (0.8, 4)):
        found = slots(space, "heads", "ffn", keep=keep, levels=17)
        own = [size for slot in found for size in sizes(slot, layer(0, HEADS)) if size is not None]
        assert min(own, default=4) == lowest


def test_the_experts_that_a_router_picks_stay() -> None:
    found = slots(space_of("mixtral"), "experts", levels=17)
    assert sizes(found[0], found[0].axes[0]) == [None, 5, 4, 3, 2]


@pytest.mark.parametrize(
    ("round_to", "expected"), [(8, 8), (24, 24), ({"ffn": 16}, 16), ({"heads": 2}, 1), (None, 1)], ids=str
)
def test_sizes_are_multiples(round_to: Any, expected: int) -> None:
    own = [
        size for size in sizes(slots(space_of("llama"), "ffn", levels=99, round_to=round_to)[0], layer(0, FFN)) if size
    ]
    assert own == [n for n in range(79, 0, -1) if n % expected == 0]


@pytest.mark.parametrize("divisor", [2, 3, 4, 6])
def test_heads_over_all_groups_are_multiples(divisor: int) -> None:
    space = space_of("llama", hidden_size=96, num_attention_heads=24, num_key_value_heads=4, head_dim=4)
    heads = layer(0, HEADS)
    own = [size for size in sizes(slots(space, "heads", levels=99, round_to=divisor)[0], heads) if size]
    assert own == [n for n in range(5, 0, -1) if 4 * n % divisor == 0]


@pytest.mark.parametrize("divisor", [2, 3, 4])
def test_heads_are_multiples_where_their_groups_go_too(divisor: int) -> None:
    space = space_of("llama", hidden_size=96, num_attention_heads=24, num_key_value_heads=4, head_dim=4)
    heads, groups = layer(0, HEADS), layer(0, GROUPS)
    first = slots(space, "heads", "kv_groups", levels=99, round_to={"heads": divisor})[0]
    states = {(level.sizes.get(heads, 6), level.sizes.get(groups, 4)) for level in first.levels}
    assert states == {(h, g) for h in range(1, 7) for g in range(1, 5) if h * g % divisor == 0}


def test_sublayers_go_whole_as_the_last_level_of_what_is_in_them() -> None:
    found = slots(space_of("llama"), "ffn", "heads", drop=True)
    assert names(found) == [layer(0, HEADS), layer(0, FFN), layer(1, HEADS), layer(1, FFN)]
    for i, slot in enumerate(found):
        block = layer(i // 2, "self_attn" if i % 2 == 0 else "mlp")
        assert slot.levels[-1] == Level(dropped=(block,))
        assert not any(level.dropped for level in slot.levels[:-1])


def test_sublayers_in_which_nothing_is_cut_are_slots_of_their_own() -> None:
    found = slots(space_of("llama"), "ffn", drop=True)
    assert names(found) == [layer(0, "self_attn"), layer(0, FFN), layer(1, "self_attn"), layer(1, FFN)]
    assert found[0].levels == (Level(), Level(dropped=(layer(0, "self_attn"),)))
    assert found[0].axes == ()


def test_layers_go_whole_where_sizes_are_uniform_and_one_always_stays() -> None:
    space = space_of("llama", num_hidden_layers=3)
    found = slots(space, "ffn", uniform=True, drop=True)
    blocks = [layer(i, "x")[:-2] for i in range(3)]
    dropping = [slot for slot in found if not slot.axes]
    assert len(dropping) == 2
    assert all(slot.levels == (Level(), Level(dropped=(slot.name,))) and slot.name in blocks for slot in dropping)


def test_the_only_layer_stays() -> None:
    found = slots(space_of("llama", num_hidden_layers=1), "ffn", uniform=True, drop=True)
    assert names(found) == [layer(0, FFN)]


def test_only_what_is_allowed_is_a_level() -> None:
    space = space_of("llama", num_attention_heads=8, num_key_value_heads=4)
    asked: list[dict[str, int]] = []

    def allowed(found: Any) -> bool:
        asked.append(dict(found))
        return bool(found.get("heads", 8) % 2 == 0 and found.get("ffn", 80) != 40)

    found = slots(space, "heads", "kv_groups", "ffn", uniform=True, levels=80, allowed=allowed)
    attention, ffn = found
    heads, groups = layer(1, HEADS), layer(1, GROUPS)
    states = {(level.sizes.get(heads, 2), level.sizes.get(groups, 4)) for level in attention.levels}
    assert states == {(2, 4), (2, 3), (2, 2), (2, 1), (1, 4), (1, 2)}  # heads over all groups that stay are even
    assert sizes(ffn, layer(0, FFN)) == [None, *(n for n in range(79, 0, -1) if n != 40)]
    assert {"heads": 3, "kv_groups": 3} in asked  # one head in each of three groups


def test_what_stays_whole_need_be_no_multiple() -> None:
    """Both members of a slot may be whole while the other is cut."""
    space = space_of("llama", num_attention_heads=8, num_key_value_heads=4)
    first = slots(space, "heads", "kv_groups", levels=99, round_to={"kv_groups": 3})[0]
    states = {(level.sizes.get(layer(0, HEADS), 2), level.sizes.get(layer(0, GROUPS), 4)) for level in first.levels}
    assert states == {(2, 4), (1, 4), (2, 3), (1, 3)}


def test_where_sizes_are_free_nobody_is_asked() -> None:
    def allowed(_: Any) -> bool:
        raise AssertionError

    assert slots(space_of("llama"), "ffn", allowed=allowed)


def test_a_kind_of_which_no_size_is_allowed_is_no_slot() -> None:
    space = space_of("llama")
    found = slots(space, "heads", "ffn", uniform=True, allowed=lambda found: "heads" not in found)
    assert names(found) == ["ffn"]


def test_errors() -> None:
    space = space_of("llama")
    with pytest.raises(SecateurError, match="levels must be at least 2, not 1"):
        slots(space, "ffn", levels=1)
    with pytest.raises(SecateurError, match="keep_at_least, limits and round_to leave nothing to cut"):
        slots(space, "ffn", round_to=81)
    with pytest.raises(SecateurError, match="keep_at_least, limits and round_to leave nothing to cut"):
        slots(space, "ffn", keep=0.999)
