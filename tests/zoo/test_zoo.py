"""A few very different architectures of the zoo; all of them run in `make zoo`."""

import warnings

import pytest
from check import examine

QUICK = (
    *("llama", "gpt2", "deberta-v2", "t5", "vit", "convnext", "whisper", "mixtral", "mamba2", "deepseek_v3"),
    *("plain/resnet_basic", "plain/shufflenet_v1", "plain/unet"),
)


@pytest.mark.parametrize("name", QUICK)
def test_every_kind_at_once_gives_the_right_model(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = examine(name, quick=True)
    assert record["cuts"], record
    assert [(c["cut"], c.get("message")) for c in record["cuts"] if c["status"] != "pass"] == []
