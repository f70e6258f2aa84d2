"""A Megatron-Core model over two pipeline stages, each a process: the same as in one process, to the last bit."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron_models as megatron
import megatron_stage as stage
import pytest
import torch

import secateur

SECONDS = 200
SCRIPT = Path(stage.__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have written, which prune their stages together."""
    where = tmp_path_factory.mktemp("stages")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(where), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(stage.STAGES)
    ]
    try:
        told = [worker.communicate(timeout=SECONDS)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, text in zip(workers, told, strict=True):
        assert worker.returncode == 0, text[-3000:]
    return where


@pytest.fixture(scope="module", autouse=True)
def _megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with megatron.on_cpu(tmp_path_factory.mktemp("gloo")):
        yield


@pytest.mark.parametrize("name", stage.JOBS)
def test_two_stages_end_with_the_weights_of_one_process(name: str, folder: Path) -> None:
    whole = secateur.prune(stage.stage_of(name), stage.JOBS[name][2], mend="none", data=stage.DATA)
    one: Any = whole.model
    found: list[dict[str, Any]] = [
        torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(stage.STAGES)
    ]
    weights = {key: value for key, value in one.state_dict().items() if value is not None}
    counts = [len(part["numbers"]) for part in found]
    before = [0, counts[0]]
    for part, offset in zip(found, before, strict=True):
        assert part["plan"] == (whole.plan.kept, whole.plan.dropped)
        assert part["numbers"] == [offset + 1 + place for place in range(len(part["numbers"]))]
        assert part["layers"] == sum(counts) == one.config.num_layers
        assert part["shares"] == (tuple(counts) if counts[0] != counts[1] else (None, None))
        assert part["report"]["costs"] == whole.report["costs"]
    together = {
        stage.global_name(k, offset): v
        for part, offset in zip(found, before, strict=True)
        for k, v in part["weights"].items()
    }
    if name == "tied":
        assert torch.equal(together.pop("output_layer.weight"), together["embedding.word_embeddings.weight"])
    assert together.keys() == weights.keys()
    assert all(torch.equal(together[key], value) for key, value in weights.items())
    logits = megatron.run(one, stage.DATA)
    for part in found:
        assert torch.allclose(part["logits"], logits, rtol=1e-9, atol=1e-12)
    assert found[0]["report"]["model"] == found[1]["report"]["model"]  # one fingerprint of all stages


def test_layers_may_go_unevenly(folder: Path) -> None:
    parts = [torch.load(folder / f"tied.{rank}.pt", weights_only=False) for rank in range(stage.STAGES)]
    assert sorted(len(part["numbers"]) for part in parts) == [1, 2]


def test_what_does_not_work_over_stages_is_refused(folder: Path) -> None:
    for rank in range(stage.STAGES):
        assert "method structural does not work over pipeline stages" in (folder / f"refused.{rank}").read_text()
