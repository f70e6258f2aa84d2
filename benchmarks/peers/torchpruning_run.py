"""Prune with Torch-Pruning, in its own environment: see README.md beside this file.

`python torchpruning_run.py digits OUT --importance magnitude|taylor --scope global|uniform|progressive` cuts the
bundled classifier to half its MACs, `minilm OUT` heads and FFN units of all-MiniLM-L6-v2 to 70% of the encoder's
parameters, `llama OUT` FFN units of the bundled language model to several sizes (`--whole`: heads and the hidden size
too, as in Torch-Pruning's own example for language models). The ratio that Torch-Pruning wants is found by bisection,
or (progressive) the model is cut in many small steps until it fits. The last line of stdout is one JSON object.
"""

import argparse
import copy
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from digits_task import EXAMPLE, Task, finish, macs
from torch import nn

LLAMA = Path(__file__).resolve().parents[2] / "examples" / "models" / "pydoc-llama"
STEPS = 100
"""Of the progressive way, from the whole model to nothing."""


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Prune with Torch-Pruning.")
    parser.add_argument("job", choices=["digits", "minilm", "llama"])
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--importance", choices=["magnitude", "taylor"], default="taylor")
    parser.add_argument("--scope", choices=["global", "uniform", "progressive"], default="global")
    parser.add_argument("--budget", type=float, help="share of MACs (digits: 0.5) or parameters (0.7)")
    parser.add_argument("--model", type=Path, default=Path("/work/peers/minilm"), help="of minilm")
    parser.add_argument("--loss", default="contrastive", help="of minilm: contrastive, direction or norm")
    parser.add_argument("--keep-heads", action="store_true", help="of minilm: cut FFN units alone")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.7, 0.6, 0.5], help="of llama")
    parser.add_argument("--whole", action="store_true", help="of llama: heads and the hidden size too")
    return parser.parse_args()


def judge(args: argparse.Namespace) -> Any:
    """The importance, with Torch-Pruning's defaults."""
    importance: Any = import_module("torch_pruning").importance
    return importance.GroupTaylorImportance() if args.importance == "taylor" else importance.GroupMagnitudeImportance()


def bisect(
    make: Callable[[float], Any], cost: Callable[[Any], float], limit: float, steps: int = 12
) -> tuple[Any, float]:
    """The most costly model that keeps the limit, and its ratio."""
    low, high, best = 0.0, 1.0, None
    for _ in range(steps):
        ratio = (low + high) / 2
        model = make(ratio)
        used = cost(model)
        if used > limit:
            low = ratio
            continue
        high = ratio
        if best is None or used > best[0]:
            best = used, model, ratio
    if best is None:
        raise SystemExit("no ratio keeps the limit")
    return best[1], best[2]


def with_gradients(model: Any, source: Any) -> Any:
    """A copy of a model that has the gradients of another one."""
    model = copy.deepcopy(model)
    for mine, theirs in zip(model.parameters(), source.parameters(), strict=True):
        mine.grad = None if theirs.grad is None else theirs.grad.clone()
    return model


def digits(args: argparse.Namespace) -> dict[str, Any]:
    """The classifier at half its MACs; gradients of Taylor over the 2,000 calibration images."""
    pruning: Any = import_module("torch_pruning")
    task, begin = Task(), time.perf_counter()
    dense = task.trained()
    limit = (args.budget or 0.5) * macs(dense)

    def gradients(model: nn.Module) -> None:
        model.zero_grad()
        if args.importance == "taylor":
            for x, y in zip(*(torch.split(part, 250) for part in task.calib), strict=True):
                nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]

    def pruner(model: Any, ratio: float, steps: int = 1) -> Any:
        options = {"global_pruning": args.scope != "uniform", "ignored_layers": [model.fc], "iterative_steps": steps}
        options |= {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
        return pruning.pruner.BasePruner(model, EXAMPLE, judge(args), pruning_ratio=ratio, **options)

    def make(ratio: float) -> nn.Module:
        model: nn.Module = with_gradients(dense, dense)
        pruner(model, ratio).step()
        return model

    result: dict[str, Any] = {"dense_macs": macs(dense)}
    if args.scope == "progressive":
        model, done = dense, 0
        steps = pruner(model, 1.0, STEPS)
        while macs(model) > limit and done < STEPS:
            gradients(model)
            steps.step()
            done += 1
        result["steps"] = done
    else:
        gradients(dense)
        model, result["ratio"] = bisect(make, macs, limit)
    model.zero_grad()
    result["prune_s"] = round(time.perf_counter() - begin, 1)
    return result | task.measured(model, args.out / f"tp-{args.importance}-{args.scope}.pt")


def minilm(args: argparse.Namespace) -> dict[str, Any]:
    """The encoder at 70% of its parameters; one ratio for heads and FFN units."""
    pruning: Any = import_module("torch_pruning")
    task: Any = import_module("minilm")
    dense, tokenizer = task.load(args.model)
    calibration, unseen = task.sentences()
    embeddings = task.embed(dense, tokenizer, unseen)
    whole, batches, begin = task.encoder(dense), task.batches(tokenizer, calibration), time.perf_counter()
    if args.importance == "taylor":
        loss = task.Loss(args.loss)
        for batch in batches:
            loss(dense(**batch).last_hidden_state, batch["attention_mask"]).backward()

    def make(ratio: float) -> Any:
        model = with_gradients(dense, dense)
        attention = [layer.attention.self for layer in model.encoder.layer]
        heads = {getattr(m, name): m.num_attention_heads for m in attention for name in ("query", "key", "value")}
        ends = [end.dense for layer in model.encoder.layer for end in (layer.attention.output, layer.output)]
        options = {"ignored_layers": [model.embeddings, *ends], "num_heads": heads, "prune_head_dims": False}
        options |= {"in_channel_groups": {}, "out_channel_groups": {}, "global_pruning": args.scope == "global"}
        options |= {"prune_num_heads": not args.keep_heads, "head_pruning_ratio": 0.0 if args.keep_heads else ratio}
        options |= {"output_transform": lambda output: output.last_hidden_state}
        pruner = pruning.pruner.BasePruner(model, batches[0], judge(args), pruning_ratio=ratio, **options)
        pruner.step()
        for m in attention:
            m.num_attention_heads = m.query.out_features // m.attention_head_size
            m.all_head_size = m.query.out_features
        return model

    model, ratio = bisect(make, task.encoder, (args.budget or 0.7) * whole)
    model.zero_grad()
    how = args.loss if args.importance == "taylor" else None
    result: dict[str, Any] = {"prune_s": round(time.perf_counter() - begin, 1), "ratio": ratio, "loss": how}
    result["keep_heads"] = args.keep_heads
    name = "-".join(filter(None, ["tp-minilm", args.importance, how, args.scope, "ffn" if args.keep_heads else ""]))
    result |= task.measured(model, tokenizer, unseen, embeddings, whole) | {"saved": str(args.out / f"{name}.pt")}
    torch.save(model, result["saved"])
    return result


@torch.no_grad()
def perplexity(model: Any, rows: torch.Tensor) -> float:
    """exp(mean next-token loss), each row on its own."""
    total = 0.0
    for ids in torch.split(rows, 16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += float(nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
    return float(torch.tensor(total / (len(rows) * (rows.shape[1] - 1))).exp())


def llama(args: argparse.Namespace) -> dict[str, Any]:
    """The language model at shares of its parameters; gradients of Taylor over all 512 calibration rows."""
    pruning: Any = import_module("torch_pruning")
    transformers: Any = import_module("transformers")
    numpy: Any = import_module("numpy")
    rows = {n: torch.from_numpy(numpy.load(LLAMA / f"{n}_ids.npy").astype("int64")) for n in ("calib", "val")}
    form = {"dtype": torch.float32, "attn_implementation": "eager"}
    dense = transformers.AutoModelForCausalLM.from_pretrained(LLAMA, **form).eval()
    whole, begin = sum(p.numel() for p in dense.parameters()), time.perf_counter()
    if args.importance == "taylor":
        for ids in torch.split(rows["calib"], 8):
            dense(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    result: dict[str, Any] = {"gradients_s": round(time.perf_counter() - begin, 1), "rows": []}

    def make(ratio: float) -> Any:
        model = with_gradients(dense, dense)
        ends = [end for layer in model.model.layers for end in (layer.mlp.gate_proj, layer.mlp.up_proj)]
        ignored = [m for m in model.modules() if not list(m.children()) and not any(m is end for end in ends)]
        options: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
        if args.whole:
            counts = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
            counts["v_proj"] = counts["k_proj"]
            blocks = [layer.self_attn for layer in model.model.layers]
            options["num_heads"] = {getattr(m, name): count for m in blocks for name, count in counts.items()}
            options |= {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": ratio}
            ignored = [model.lm_head]
        options |= {"global_pruning": args.scope == "global", "ignored_layers": ignored}
        options |= {"output_transform": lambda output: output.logits}
        inputs = {"input_ids": rows["calib"][:1, :8], "use_cache": False}
        pruning.pruner.BasePruner(model, inputs, judge(args), pruning_ratio=ratio, **options).step()
        return model

    for budget in args.budgets:
        begin = time.perf_counter()
        model, ratio = bisect(make, lambda m: sum(p.numel() for p in m.parameters()), budget * whole)
        model.zero_grad()
        row = {"budget": budget, "ratio": ratio, "prune_s": round(time.perf_counter() - begin, 1)}
        row["params"] = sum(p.numel() for p in model.parameters())
        row["perplexity"] = round(perplexity(model, rows["val"]), 3)
        row["ffn"] = [layer.mlp.gate_proj.out_features for layer in model.model.layers]
        row["saved"] = str(args.out / f"tp-llama-{args.importance}-{args.scope}-{budget:g}.pt")
        torch.save(model, row["saved"])
        result["rows"].append(row)
    return result | {"whole": args.whole, "dense_params": whole}


def main() -> None:
    """Prune, measure, save, and print one line."""
    args = options()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    job = {"digits": digits, "minilm": minilm, "llama": llama}[args.job]
    result = {"peer": "torch-pruning", "job": args.job, "importance": args.importance, "scope": args.scope}
    finish(result | job(args), "torch", "torch-pruning", *([] if args.job == "digits" else ["transformers"]))


if __name__ == "__main__":
    main()
