"""Tiny mixtures of experts, state-space models and hybrids."""

from typing import Any

from tiny import tiny

SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **{"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 28},
        "shared_expert_intermediate_size": 36,
    },
    "deepseek_v3": {
        **{"num_hidden_layers": 3, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
        **{"num_experts_per_tok": 2, "moe_intermediate_size": 28, "n_shared_experts": 2, "first_k_dense_replace": 1},
        **{"q_lora_rank": 20, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 14},
    },
    "gpt_oss": {
        **{"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 12, "sliding_window": 5},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mamba2": {
        **{"num_heads": 6, "head_dim": 16, "state_size": 10, "n_groups": 2, "expand": 2, "chunk_size": 8},
        "conv_kernel": 4,
    },
    "nemotron_h": {
        **{"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
        **{"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 10, "n_groups": 2, "chunk_size": 8},
        **{"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "n_group": 1, "topk_group": 1},
        **{"moe_shared_expert_intermediate_size": 36, "n_shared_experts": 1, "head_dim": 12, "moe_latent_size": None},
    },
    "jamba": {
        **{"num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 10, "mamba_expand": 2},
        **{"mamba_dt_rank": 5, "attn_layer_period": 4, "attn_layer_offset": 3, "expert_layer_period": 2},
        "expert_layer_offset": 1,
    },
    "bamba": {
        **{"num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_n_heads": 6, "mamba_d_head": 16},
        **{"mamba_n_groups": 1, "mamba_d_state": 10, "mamba_expand": 2, "mamba_chunk_size": 8},
    },
}
"""What each config has beside the sizes that all have."""


def mixture(name: str, **options: Any) -> Any:
    """A random tiny model of one of these."""
    return tiny(name, **{**SIZES[name], **options})
