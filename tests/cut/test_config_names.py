"""What configs call sizes: words that mean another size in another family, and lists and patterns of layers."""

from types import SimpleNamespace

import pytest

from secateur.cut.config import Sizes, cut_lists, field_of, kinds_of
from secateur.errors import SecateurError

MIXTRAL = SimpleNamespace(hidden_size=48, intermediate_size=80, num_local_experts=8, num_attention_heads=4)
MAMBA2 = SimpleNamespace(hidden_size=48, num_heads=6, head_dim=16)
JAMBA = SimpleNamespace(hidden_size=48, intermediate_size=80, num_experts=8)
DEEPSEEK = SimpleNamespace(hidden_size=48, intermediate_size=80, moe_intermediate_size=28, n_routed_experts=8)


@pytest.mark.parametrize(
    ("config", "dense", "name", "kinds"),
    [
        (MIXTRAL, Sizes(hidden=48, expert_ffn=80, experts=8), "intermediate_size", ("expert_ffn",)),
        (MIXTRAL, Sizes(hidden=48, expert_ffn=80, experts=8), "moe_ffn_hidden_size", ("expert_ffn",)),
        (MIXTRAL, Sizes(hidden=48, expert_ffn=80, experts=8), "num_moe_experts", ("experts",)),
        (MAMBA2, Sizes(hidden=48, ssm_heads=6, ssm_head_dim=16), "num_heads", ("ssm_heads",)),
        (MAMBA2, Sizes(hidden=48, ssm_heads=6, ssm_head_dim=16), "mamba_head_dim", ("ssm_head_dim",)),
        (JAMBA, Sizes(ffn=80, expert_ffn=80, ssm_channels=96), "intermediate_size", ("ffn", "expert_ffn")),
        (DEEPSEEK, Sizes(ffn=80, expert_ffn=28), "intermediate_size", ("ffn",)),
        (DEEPSEEK, Sizes(ffn=80, expert_ffn=28, shared_expert_ffn=56), "moe_intermediate_size", ("expert_ffn",)),
        (DEEPSEEK, Sizes(ffn=80, shared_expert_ffn=56), "shared_expert_ffn", ("shared_expert_ffn",)),
    ],
)
def test_one_word_means_what_the_model_has(
    config: SimpleNamespace, dense: Sizes, name: str, kinds: tuple[str, ...]
) -> None:
    assert kinds_of(config, name, dense) == kinds


def test_a_word_that_means_nothing_names_the_nearest() -> None:
    with pytest.raises(SecateurError, match="the config has no size 'num_local_expert'; did you mean 'num_local_exper"):
        kinds_of(MIXTRAL, "num_local_expert", Sizes(experts=8))


def test_a_name_with_another_value_is_not_the_size() -> None:
    assert field_of(DEEPSEEK, "expert_ffn", 28) == "moe_intermediate_size"
    assert field_of(DEEPSEEK, "shared_expert_ffn", 56) is None
    assert field_of(SimpleNamespace(n_inner=None), "ffn", 80) == "n_inner"


def test_a_pattern_of_layers_loses_their_letters() -> None:
    values = {"hybrid_override_pattern": "M-M*", "layers_block_type": ["m", "f", "m", "a"], "name_pattern": "M-M*-"}
    assert cut_lists(values, [False, True, False, False]) == {
        "hybrid_override_pattern": "MM*",
        "layers_block_type": ["m", "m", "a"],
    }
