"""What breaks other structural pruners, each cut for real and compared with the zeroed original (DESIGN, section 3)."""

import warnings

import pytest
from check import examine

BREAKS: dict[str, tuple[str, set[str]]] = {
    "chunk and cat (C2f)": ("plain/yolov8", {"channels"}),
    "pixel shuffle": ("plain/espcn", {"channels"}),
    "channel shuffle by view": ("plain/shufflenet_v1", {"channels"}),
    "channel shuffle as an operator": ("plain/shufflenet_native", {"channels"}),
    "channel split and shuffle": ("plain/shufflenet_v2", {"channels"}),
    "NHWC permute, flatten, linear": ("plain/nhwc_flatten", {"channels"}),
    "einsum": ("plain/einsum", set()),
    "raw parameters": ("plain/functional_dict", {"channels"}),
    "stacked experts, bmm": ("plain/experts_bmm", set()),
    "GLU": ("plain/glu", {"ffn"}),
    "GLU module": ("plain/glu_module", {"channels"}),
    "depthwise with multiplier 2": ("plain/depthwise_multiplier", {"channels"}),
    "fused qkv": ("plain/vit", {"heads", "ffn"}),
    "last-dimension slices": ("plain/slice_halves", set()),
    "strided slices": ("plain/slice_strided", set()),
    "nn.TransformerEncoder": ("plain/transformer_encoder", {"hidden", "heads", "ffn"}),
    "nn.MultiheadAttention": ("plain/multihead_attention", {"heads"}),
    "frozen parameters, layers under no_grad": ("plain/frozen_body", set()),
    "nested nn.Sequential": ("plain/nested_sequential", set()),
    "a root nn.Sequential": ("plain/mlp", {"ffn"}),
    "tied embeddings": ("plain/gpt_tied", {"ffn"}),
    "shared modules": ("plain/shared_modules", set()),
    "LSTM": ("plain/lstm_bidirectional", set()),
    "GRU": ("plain/gru", set()),
    "OPT": ("opt", {"hidden", "heads", "ffn"}),
    "Phi-3": ("phi3", {"hidden", "kv_groups", "ffn"}),
    "GPT-2's Conv1D": ("gpt2", {"hidden", "heads", "ffn"}),
}


@pytest.mark.parametrize("case", BREAKS)
def test_known_failures_of_others_are_right_here(case: str) -> None:
    name, kinds = BREAKS[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = examine(name, quick=True)
    assert kinds <= set(record["kinds"])
    assert record["cuts"], record
    assert [(c["cut"], c.get("message")) for c in record["cuts"] if c["status"] != "pass"] == []
