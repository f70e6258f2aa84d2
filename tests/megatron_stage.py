"""One process of a pipeline of two: prunes its stage of each model of a folder, and writes what it has then."""

import sys
from pathlib import Path
from typing import Any

import megatron_models as megatron
import torch

import secateur
from secateur import SecateurError
from secateur.load.megatron import opened

STAGES, LAYERS = 2, 4
TIED = {"share_embeddings_and_output_weights": True}
JOBS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, int]]] = {
    "tied": (
        megatron.LLAMA,
        TIED,
        {"hidden_size": 44, "ffn_hidden_size": 20, "num_attention_heads": 6, "num_layers": 3},
    ),
    "moe": ({**megatron.LLAMA, **megatron.MOE}, {}, {"num_moe_experts": 5, "hidden_size": 48, "num_layers": 3}),
}
DATA = torch.randint(0, megatron.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1))


def stage_of(name: str, rank: int = 0, stages: int = 1) -> Any:
    """A stage of a model, or all of it, with weights that its names alone decide."""
    sizes, given, _ = JOBS[name]
    config = megatron.config_of(
        **{**sizes, "num_layers": LAYERS, "pipeline_model_parallel_size": stages, "pipeline_dtype": torch.float64}
    )
    model = megatron.gpt(config, rank, stages, **given)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            whole = global_name(path, rank * LAYERS // stages)
            whole = "embedding.word_embeddings.weight" if given == TIED and "output_layer" in whole else whole
            seed = sum((place + 1) * ord(letter) for place, letter in enumerate(whole))
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            parameter.copy_(1 + 0.1 * drawn if parameter.dim() == 1 else 0.1 * drawn)
    return model


def global_name(path: str, before: int) -> str:
    """What a tensor of a stage is called in the whole model, where so many layers come before."""
    parts = path.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + before)
    return ".".join(parts)


def main(folder: Path, rank: int) -> None:
    """Prune all jobs; a failure is an exit with another code than 0."""
    with megatron.on_cpu(folder, rank, STAGES):
        for name, (_, _, dims) in JOBS.items():
            result = secateur.prune(stage_of(name, rank, STAGES), dims, data=DATA)
            model: Any = result.model
            numbers = [layer.layer_number for layer in model.decoder.layers]
            with torch.no_grad():
                logits = opened(model)(DATA)
            weights = {k: v for k, v in model.state_dict().items() if v is not None}
            config = model.config
            shares = (config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage)
            found = {"plan": (result.plan.kept, result.plan.dropped), "numbers": numbers, "logits": logits}
            found |= {"weights": weights, "shares": shares, "layers": config.num_layers, "report": result.report}
            torch.save(found, folder / f"{name}.{rank}.pt")
        try:
            secateur.prune(stage_of("tied", rank, STAGES), "params=80%", method="structural", data=DATA)
        except SecateurError as error:
            (folder / f"refused.{rank}").write_text(str(error))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
