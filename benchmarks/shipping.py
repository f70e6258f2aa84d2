"""What really gets smaller and faster, measured: structured cuts, masks, and the chain prune -> ONNX -> INT8.

    llama    a random Llama of 341M parameters against its cut to half of its MACs; torch and ONNX Runtime
    resnet   a ResNet-50 of random weights, 1 and 8 images of 224 x 224, the same
    masked   both, with 70% zeros
    chain    the bundled model, pruned to 70% and repaired (distilled, with --distil 500k), as ONNX, as INT8
    blocks   the bundled classifier at half of its MACs, channels in multiples of 1 to 16
    digits   the bundled classifier, pruned to half of its MACs, repaired, fine-tuned, as ONNX, as INT8

    .venv/bin/python benchmarks/shipping.py                       # all; needs 16 GB and an idle machine
    .venv/bin/python benchmarks/shipping.py --runs chain,digits
    .venv/bin/python benchmarks/shipping.py --small               # tiny sizes, to try it out; results stay in --out

What is done is kept under --out and not done again; --again does. Every part times all of its models in one run.
"""

import argparse
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import ROOT, bundled_model, record, tokens
from torch import nn
from torch.nn import functional

import secateur
from secateur.measure.onnx import OnnxModel
from secateur.ship.onnx import export_onnx
from secateur.ship.quantize import quantize_onnx

Row = dict[str, Any]


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, and a way around them."""

    def __init__(self, inputs: int, inside: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * inside
        self.conv1, self.bn1 = nn.Conv2d(inputs, inside, 1, bias=False), nn.BatchNorm2d(inside)
        self.conv2, self.bn2 = nn.Conv2d(inside, inside, 3, stride, 1, bias=False), nn.BatchNorm2d(inside)
        self.conv3, self.bn3 = nn.Conv2d(inside, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.down: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inputs, H, W] -> [N, 4 inside, H / stride, W / stride]."""
        inner = functional.relu(self.bn1(self.conv1(x)))
        inner = functional.relu(self.bn2(self.conv2(inner)))
        return functional.relu(self.bn3(self.conv3(inner)) + self.down(x))


class ResNet(nn.Module):
    """ResNet-50 by default: 3, 4, 6 and 3 blocks."""

    def __init__(self, blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        layers, inputs = [], width
        for stage, count in enumerate(blocks):
            for block in range(count):
                inside = width * 2**stage
                layers.append(Bottleneck(inputs, inside, 2 if stage and block == 0 else 1))
                inputs = 4 * inside
        self.layers, self.fc = nn.Sequential(*layers), nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W] -> logits [N, classes]."""
        x = functional.max_pool2d(functional.relu(self.bn(self.conv(x))), 3, 2, 1)
        result: torch.Tensor = self.fc(self.layers(x).mean((2, 3)))
        return result


def resnet(*, small: bool = False) -> nn.Module:
    """Of random weights, always the same."""
    torch.manual_seed(0)
    return (ResNet((1, 1), 16, 10) if small else ResNet()).eval()


def llama(*, small: bool = False) -> nn.Module:
    """Of random weights, always the same: 341M parameters, 308M of them in 24 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "vocab_size": 32000}
    if small:
        sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "vocab_size": 500}
    heads = {"num_attention_heads": sizes["hidden_size"] // 64 * (2 if small else 1)}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=True, max_position_embeddings=2048)
    made: nn.Module = LlamaForCausalLM(config).eval()
    return made


@dataclass(frozen=True)
class Setup:
    """Where results go, and how much is done."""

    out: Path
    small: bool
    threads: int
    repeats: int
    distil: str | None

    def folder(self, name: str) -> Path:
        """Of a part; made."""
        path = self.out / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def bench(self, name: str, models: Sequence[Path], *options: str) -> Row:
        """Run ``secateur bench``, which prints its tables; returns what it wrote."""
        target = self.folder(name) / "bench.json"
        words = [sys.executable, "-m", "secateur", "bench", *map(str, models), "--out", str(target), "--overwrite"]
        words += ["--threads", str(self.threads), "--repeats", str(self.repeats), *options]
        path = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
        subprocess.run(words, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path})
        found: Row = json.loads(target.read_text())
        return found


def kept(folder: Path, make: Callable[[], None]) -> Path:
    """A model folder; made where it is not there yet."""
    if not folder.exists():
        make()
    return folder


# --- structured cuts and masks of random models ---


def random_llamas(setup: Setup) -> dict[str, Path]:
    """Dense; cut to half of its MACs, alike in all layers; 70% zeros. All in float32."""
    folder = setup.folder("llama-models")
    # Half of the MACs of every layer, in multiples of 64; which units go is nothing that a clock could see.
    half = {"hidden": 704, "ffn": 1920, "heads": 11, "kv_groups": 11}
    if setup.small:
        half = {"hidden": 32, "ffn": 128, "heads": 1, "kv_groups": 1}

    def cut(budget: str | dict[str, int], name: str, **how: Any) -> Path:
        def make() -> None:
            found = secateur.prune(llama(small=setup.small), budget, **how)
            secateur.save(found.model, folder / name, plan=found.plan)

        return kept(folder / name, make)

    return {
        "dense": kept(folder / "dense", lambda: void(secateur.save(llama(small=setup.small), folder / "dense"))),
        "cut": cut(half, "cut", method="minitron", data=torch.arange(256).reshape(4, 64), mend="none"),
        "masked": cut("sparsity=70%", "masked", method="magnitude"),
    }


def random_resnets(setup: Setup) -> dict[str, Path]:
    """The same of the ResNet."""
    folder, image = setup.folder("resnet-models"), torch.zeros(1, 3, *[64 if setup.small else 224] * 2)
    built: dict[str, Any] = {"constructor": "shipping:resnet", "arguments": {"small": setup.small}}
    sizes = {"round_to": 4 if setup.small else 32}

    def cut(budget: str | None, name: str, **how: Any) -> Path:
        def make() -> None:
            model = resnet(small=setup.small)
            if budget is None:
                secateur.save(model, folder / name, **built)
            else:
                found = secateur.prune(model, budget, inputs=image, **how)
                secateur.save(found.model, folder / name, plan=found.plan, **built)

        return kept(folder / name, make)

    return {
        "dense": cut(None, "dense"),
        "cut": cut("macs=50%", "cut", method="structural", scope="local", **sizes),
        "masked": cut("sparsity=70%", "masked", method="magnitude"),
    }


def run_llama(setup: Setup) -> Row:
    """Prefill of 256 tokens, and decoding."""
    models = random_llamas(setup)
    length = ("--seq", "32", "--decode", "4") if setup.small else ("--seq", "256", "--decode", "16")
    return setup.bench("llama", [models["dense"], models["cut"]], "--onnx", *length)


def run_resnet(setup: Setup) -> Row:
    """One image, and eight at a time."""
    models = random_resnets(setup)
    pair = [models["dense"], models["cut"]]
    return {str(n): setup.bench(f"resnet-{n}", pair, "--onnx", "--input-shape", image_shape(setup, n)) for n in (1, 8)}


def run_masked(setup: Setup) -> Row:
    """Both, with 70% zeros; MACs are the same, and so should the times be."""
    words, pictures = random_llamas(setup), random_resnets(setup)
    length = ("--seq", "32" if setup.small else "256", "--decode", "0")
    pair = ("dense", "masked")
    return {
        "llama": setup.bench("masked-llama", [words[name] for name in pair], "--onnx", *length),
        "resnet": setup.bench(
            "masked-resnet", [pictures[name] for name in pair], "--onnx", "--input-shape", image_shape(setup)
        ),
    }


def image_shape(setup: Setup, count: int = 1) -> str:
    """Of some images."""
    return f"{count},3,64,64" if setup.small else f"{count},3,224,224"


# --- the chain: does each optimisation compound? ---


def run_chain(setup: Setup) -> Row:
    """The bundled language model: pruned, exported, quantised; and quantised without pruning."""
    folder, dense = setup.folder("chain-models"), bundled_model()
    count = 8 if setup.small else 320
    rows = tokens("val_ids.npy").flatten()[: count * 256].reshape(count, 256)
    quick: dict[str, Any] = {"levels": 5, "trials": 4, "probes": 2, "score_samples": 4} if setup.small else {}
    samples = 16 if setup.small else 512

    def prune() -> None:
        budget, data = "params=70%", tokens("calib_ids.npy")[:samples]
        found = secateur.prune(dense, budget, method="search", data=data, **quick)
        secateur.save(found.model, folder / "cut", plan=found.plan)

    def distil() -> None:
        student, data = secateur.load(folder / "cut"), tokens("train_ids.npy")
        healed = secateur.distill(dense, student, data, tokens=setup.distil, batch_size=8)
        secateur.save(healed.model, folder / "distilled")

    whole = kept(folder / "dense", lambda: void(secateur.save(dense, folder / "dense")))
    stages = {"dense": whole, "cut": kept(folder / "cut", prune)}
    if setup.distil:
        stages["distilled"] = kept(folder / "distilled", distil)
    last = list(stages)[-1]
    for name in ("dense", last):
        exported, quantised = folder / f"{name}.onnx", folder / f"{name}-int8.onnx"
        if not quantised.exists():
            example = {"input_ids": rows[:1, :64]}
            export_onnx(secateur.load(stages[name]), example, exported, cache=True, overwrite=True)
            quantize_onnx(exported, quantised)
        stages |= {exported.stem + " ONNX": exported, f"{name} INT8": quantised}

    def quality(model: nn.Module) -> float:
        return float(secateur.evaluate(model, rows, batch_size=8)["perplexity"])

    length = ("--seq", "32", "--decode", "4") if setup.small else ("--seq", "256", "--decode", "32")
    found = setup.bench("chain", list(stages.values()), *length)
    table = stage_table(stages, found, quality, "perplexity")
    print_stages(table, "perplexity", "prefill")
    return {"stages": table, "compounding": compounding(table, last, "prefill", math.log), "bench": found}


def run_digits(setup: Setup) -> Row:
    """The bundled classifier: pruned, repaired, fine-tuned, exported, quantised; and quantised without pruning."""
    sys.path.insert(0, str(ROOT))
    digits: Any = importlib.import_module("examples.digits.digits")
    folder, example = setup.folder("digits-models"), torch.zeros(2, 1, 24, 24)
    dense, calibration = digits.trained(), list(digits.calibration())
    x, y = digits.images("test", 250 if setup.small else 4000)
    test = list(zip(torch.split(x, 250), torch.split(y, 250), strict=True))
    built: dict[str, Any] = {"constructor": "examples.digits.digits:make_model"}
    quick: dict[str, Any] = {"levels": 5, "trials": 4, "probes": 2, "score_samples": 64} if setup.small else {}

    def prune(name: str, round_to: int) -> None:
        how = {**quick, "method": "search", "round_to": round_to}
        found = secateur.prune(dense, "macs=50%", data=calibration, inputs=example, **how)
        secateur.save(found.model, folder / name, plan=found.plan, **built)

    def tune(name: str) -> None:
        images, labels = digits.images("train", 256 if setup.small else 20000)
        batches = list(zip(torch.split(images, 128), torch.split(labels, 128), strict=True))
        healed = secateur.finetune(secateur.load(folder / name), batches, epochs=1 if setup.small else 5)
        secateur.save(healed.model, folder / f"{name} tuned", **built)

    stages = {"dense": kept(folder / "dense", lambda: void(secateur.save(dense, folder / "dense", **built)))}
    for name, round_to in (("cut", 16), ("any sizes", 1)):  # blocked kernels want multiples of 16 channels
        stages[name] = kept(folder / name, lambda: prune(name, round_to))  # noqa: B023 - called at once
        stages[f"{name} tuned"] = kept(folder / f"{name} tuned", lambda: tune(name))  # noqa: B023 - the same
    for name in ("dense", "cut tuned", "any sizes tuned"):
        exported, quantised = folder / f"{name}.onnx", folder / f"{name}-int8.onnx"
        if not quantised.exists():
            export_onnx(secateur.load(stages[name]), example, exported, overwrite=True)
            quantize_onnx(exported, quantised, mode="static", calibration=calibration)
        stages |= {f"{name} ONNX": exported, f"{name} INT8": quantised}

    def quality(model: nn.Module) -> float:
        return float(secateur.evaluate(model, test)["accuracy"])

    found = setup.bench("digits", list(stages.values()), "--input-shape", "64,1,24,24")
    table = stage_table(stages, found, quality, "accuracy")
    print_stages(table, "accuracy", "forward")
    return {"stages": table, "compounding": compounding(table, "cut tuned", "forward", lambda a: -a), "bench": found}


def stage_table(
    stages: dict[str, Path], found: Row, quality: Callable[[nn.Module], float], measure: str
) -> dict[str, Row]:
    """Stage -> size, times, and how good it is."""
    table: dict[str, Row] = {}
    for (name, path), timed in zip(stages.items(), found["models"], strict=True):
        model = OnnxModel(path) if path.suffix == ".onnx" else secateur.load(path)
        sizes = {key: timed[key] for key in ("params", "bytes", "bytes_compressed", "peak_memory")}
        times = {what: {k: own[k] for k in ("median", "speedup")} for what, own in timed["times"].items()}
        table[name] = {"runtime": timed["runtime"], **sizes, "times": times, measure: quality(model)}
    return table


def print_stages(table: dict[str, Row], measure: str, what: str) -> None:
    """One line for each stage."""
    dense = table["dense"]
    columns = f"{'MB':>7} {'smaller':>8} {'compressed':>11} {'ms':>9} {'faster':>7} {measure:>11}"
    print(f"\n{'stage':<22} {'runtime':<12} {columns}")
    for name, own in table.items():
        timed, size = own["times"][what], own["bytes"]
        print(
            f"{name:<22} {own['runtime']:<12} {size / 1e6:7.2f} {dense['bytes'] / size:7.2f}x "
            f"{own['bytes_compressed'] / 1e6:11.2f} {1000 * timed['median']:9.3f} {timed['speedup']:6.2f}x "
            f"{own[measure]:11.4f}"
        )


def compounding(table: dict[str, Row], last: str, what: str, loss: Callable[[float], float]) -> Row:
    """What pruning and INT8 give alone, what that would be together, and what it is; both in ONNX Runtime.

    Factors of bytes and of time multiply; what each costs in loss (nats per token, or accuracy) adds up.
    """
    measure = "perplexity" if "perplexity" in table["dense"] else "accuracy"
    dense, cut, int8, both = (table[n] for n in ("dense ONNX", f"{last} ONNX", "dense INT8", f"{last} INT8"))
    found: Row = {}
    kinds: dict[str, Callable[[Row], float]] = {
        "bytes": lambda row: row["bytes"],
        "seconds": lambda row: row["times"][what]["median"],
    }
    for name, of in kinds.items():
        pruned, quantised, together = (of(dense) / of(own) for own in (cut, int8, both))
        found[name] = {"pruned": pruned, "int8": quantised, "product": pruned * quantised, "together": together}
    lost = [loss(own[measure]) - loss(dense[measure]) for own in (cut, int8, both)]
    found["loss"] = {"pruned": lost[0], "int8": lost[1], "sum": lost[0] + lost[1], "together": lost[2]}
    for name, own in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in own.items()))
    return found


def run_blocks(setup: Setup) -> Row:
    """The bundled classifier at half of its MACs, channels in multiples of 1, 2, 4, 8 and 16."""
    sys.path.insert(0, str(ROOT))
    digits: Any = importlib.import_module("examples.digits.digits")
    folder, example, dense = setup.folder("blocks-models"), torch.zeros(2, 1, 24, 24), digits.trained()
    built: dict[str, Any] = {"constructor": "examples.digits.digits:make_model"}

    def cut(name: str, round_to: int) -> None:
        how: dict[str, Any] = {"method": "structural", "scope": "local", "round_to": round_to}
        found = secateur.prune(dense, "macs=50%", inputs=example, **how)
        secateur.save(found.model, folder / name, plan=found.plan, **built)

    models = [kept(folder / "dense", lambda: void(secateur.save(dense, folder / "dense", **built)))]
    for size in (1, 2, 4, 8, 16):
        models.append(kept(folder / f"by {size}", lambda: cut(f"by {size}", size)))  # noqa: B023 - called at once
    return setup.bench("blocks", models, "--onnx", "--input-shape", "64,1,24,24")


def void(_: object) -> None:
    """For functions whose result nobody needs."""


PARTS: dict[str, Callable[[Setup], Row]] = {
    "llama": run_llama,
    "resnet": run_resnet,
    "masked": run_masked,
    "chain": run_chain,
    "digits": run_digits,
    "blocks": run_blocks,
}


def main() -> None:
    """Run what is asked for, and collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="out/shipping, or out/shipping-small")
    parser.add_argument("--runs", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=None, help="20, or 3 of --small")
    parser.add_argument("--distil", default=None, help="tokens to distil the pruned language model on, such as 500k")
    parser.add_argument("--again", action="store_true", help="measure anew; models that are there stay")
    given = parser.parse_args()
    chosen = given.runs.split(",")
    for name in chosen:
        if name not in PARTS:
            parser.error(f"there is no part {name!r}; known: {', '.join(PARTS)}")
    out = (given.out or Path("out") / ("shipping-small" if given.small else "shipping")).resolve()
    torch.set_num_threads(given.threads)
    sys.modules.setdefault("shipping", sys.modules[__name__])  # what is saved names its constructor so
    setup = Setup(out, given.small, given.threads, given.repeats or (3 if given.small else 20), given.distil)
    for name in chosen:
        path = out / f"{name}.json"
        if path.exists() and not given.again:
            print(f"{name}: done, in {path}")
            continue
        print(f"\n=== {name}")
        found = PARTS[name](setup)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        shutil.move(partial, path)
    parts = {name: json.loads((out / f"{name}.json").read_text()) for name in PARTS if (out / f"{name}.json").exists()}
    if not given.small:
        record("shipping", parts)


if __name__ == "__main__":
    main()
