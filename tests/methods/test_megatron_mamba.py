"""Megatron-Core's MambaModel, a hybrid of Mamba-2, attention and MLP layers; its kernels are stand-ins in torch."""

from collections.abc import Iterator
from typing import Any

import megatron_models as megatron
import pytest
import torch

import secateur
from secateur.load import megatron_trace

DATA = torch.randint(0, megatron.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def _megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with megatron.on_cpu(tmp_path_factory.mktemp("gloo")):
        yield


def test_a_cut_is_the_dense_model_without_the_units_and_a_new_model_of_the_class() -> None:
    torch.manual_seed(0)
    model = megatron.mamba(megatron.config_of(**megatron.LLAMA, **megatron.MAMBA))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() == 2 else parameter.add_(torch.randn_like(parameter) * 0.1)
    space = secateur.discover(model, DATA)
    assert set(space.kinds()) == {"hidden", "ffn", "heads", "kv_groups", "ssm_heads", "ssm_head_dim", "layers"}
    plan = megatron.some_plan(space, "decoder.layers.2")
    cut: Any = secateur.apply(model, plan, space=space, inputs=DATA)
    logits, wanted = megatron.run(cut, DATA), megatron.expected(model, plan, DATA)
    assert float((logits - wanted).abs().max() / wanted.abs().max()) < 1e-6  # the scan has float32 in it
    assert cut.hybrid_override_pattern == "M*M-"
    new = megatron.rebuilt(cut)
    assert torch.equal(megatron.run(new, DATA), logits)
    assert megatron.facts(cut) == megatron.facts(new)


def test_dims_are_given_by_the_names_of_the_config() -> None:
    torch.manual_seed(0)
    model = megatron.mamba(megatron.config_of(**megatron.LLAMA, **megatron.MAMBA))
    dims = {"mamba_num_heads": 4, "mamba_head_dim": 6, "hidden_size": 44, "num_layers": 4}
    result = secateur.prune(model, dims, data=DATA, mend="none")
    assert {name: getattr(result.model.config, name) for name in dims} == dims
    units = result.plan.kept["decoder.layers.0.mixer.ssm_heads"].units
    assert sum(unit < 3 for unit in units) == 2  # as many of each group
    small: Any = result.model
    mixer = small.decoder.layers[0].mixer
    assert (mixer.nheads, mixer.headdim, mixer.cp.d_inner_local_tpcp) == (4, 6, 24)
    assert torch.equal(megatron.run(megatron.rebuilt(result.model), DATA), megatron.run(result.model, DATA))


def test_what_is_traced_in_place_of_the_kernels_computes_the_same() -> None:
    draw = torch.Generator().manual_seed(0)
    x, dt, skip = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((2, 9, 6, 5), (2, 9, 6), (6,)))
    b, c = (torch.randn(2, 9, 2, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    a, bias, z = -torch.rand(6, generator=draw, dtype=torch.float64), torch.zeros(6), torch.randn_like(x)
    options = {"D": skip, "dt_bias": bias, "dt_softplus": True, "z": z}
    wanted = megatron.chunk_scan(x, dt, a, b, c, 0, **options)
    assert torch.allclose(megatron_trace.chunk_scan(x, dt, a, b, c, 0, **options), wanted, rtol=1e-10)
    norm = megatron.GatedRMSNorm(12, 1e-5, 4, False, "cpu", torch.float64)
    y, gate = (torch.randn(3, 12, generator=draw, dtype=torch.float64) for _ in range(2))
    assert torch.allclose(megatron_trace.gated_norm(y, gate, norm.weight, 3, 1e-5), norm(y, gate))
