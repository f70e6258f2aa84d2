"""Several models side by side: what is noise, what is counted, and how much memory a model needs."""

import dataclasses
import json
import random
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_nets import Mobile, pictures, shaken
from tiny import tiny, tokens
from torch import nn

from secateur.errors import SecateurError
from secateur.measure import bench_memory
from secateur.measure.bench import (
    Bench,
    Benched,
    Facts,
    Pass,
    Ratio,
    bench,
    check_rounds,
    load_bench,
    ratio,
)
from secateur.measure.bench_facts import compressed, onnx_facts, onnx_files, tensor_chunks, torch_facts, torch_macs
from secateur.measure.bench_passes import Load, default_load, file_passes, is_language_model, token_load, torch_passes
from secateur.measure.bench_words import sentences
from secateur.measure.onnx import OnnxModel
from secateur.ship.onnx import export_onnx


def noisy(seconds: float, rounds: int, generator: random.Random, spread: float = 0.05) -> list[float]:
    return [seconds * generator.lognormvariate(0, spread) for _ in range(rounds)]


# --- what is noise ---


@pytest.mark.parametrize("rounds", [3, 4, 5, 6, 20])
def test_twice_as_fast_is_no_noise(rounds: int) -> None:
    draw = random.Random(rounds)
    found = ratio(noisy(2.0, rounds, draw), noisy(1.0, rounds, draw))
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(2, rel=0.15)
    assert not found.within_noise
    back = ratio(noisy(1.0, rounds, draw), noisy(2.0, rounds, draw))
    assert not back.within_noise
    assert back.value < 1


def test_the_interval_holds_the_true_ratio_in_95_of_100_runs() -> None:
    draw = random.Random(7)
    for rounds, true in ((4, 1.0), (10, 1.5), (20, 1.0)):
        runs = [ratio(noisy(true, rounds, draw), noisy(1.0, rounds, draw)) for _ in range(1000)]
        held = sum(found.low <= true <= found.high for found in runs) / len(runs)
        assert 0.93 < held < 0.995, f"{rounds} rounds: {held}"


def test_the_interval_is_that_of_the_sign_test() -> None:
    found = ratio([float(n) for n in range(1, 21)], [1.0] * 20)
    assert [found.low, found.high] == pytest.approx([6, 15])  # of 20: 5 on either side, 4.1%
    assert ratio([float(n) for n in range(1, 7)], [1.0] * 6).low == pytest.approx(1)  # of 6: all, 3.1%


def test_a_difference_of_less_than_two_per_cent_is_chance_of_place() -> None:
    assert Ratio(1.015, 1.01, 1.018).within_noise
    assert Ratio(0.985, 0.982, 0.99).within_noise
    assert not Ratio(1.05, 1.04, 1.06).within_noise
    assert Ratio(1.4, 0.9, 2.0).within_noise


@pytest.mark.parametrize(("first", "own"), [([1.0], [1.0]), ([1.0, 2.0], [1.0])], ids=str)
def test_a_ratio_needs_rounds(first: list[float], own: list[float]) -> None:
    with pytest.raises(SecateurError, match="two rounds or more, as many of each"):
        ratio(first, own)


class Machine:
    """A timer of a machine that gets slower with every sample; what runs says how long it takes."""

    def __init__(self, drift: float) -> None:
        self.speed, self.drift, self.took = 1.0, drift, 0.0

    def work(self, seconds: float) -> Callable[[], object]:
        def run() -> None:
            self.took += seconds

        return run

    def __call__(self, fn: Callable[[], object]) -> float:
        self.took = 0.0
        fn()
        self.speed *= 1 + self.drift
        return self.took * self.speed


def test_what_a_machine_drifts_is_no_difference() -> None:
    machine = Machine(0.03)
    models = [
        Benched(name, "torch", {"forward": Pass(machine.work(seconds), 4)})
        for name, seconds in (("dense", 1.0), ("cut", 0.5), ("copy", 1.0))
    ]
    found = bench(models, timer=machine, repeats=20)
    assert found.samples[0]["forward"][-1] > 5 * found.samples[0]["forward"][0]
    cut, copy = found.ratio(1, "forward"), found.ratio(2, "forward")
    assert cut is not None
    assert copy is not None
    assert cut.value == pytest.approx(2, rel=0.05)
    assert not cut.within_noise
    assert copy.within_noise
    assert found.ratio(0, "forward") == Ratio(1, 1, 1)


def test_what_must_be_reset_is_run_once_and_the_reset_takes_no_time() -> None:
    done: list[str] = []
    timed: list[int] = []

    def timer(fn: Callable[[], object]) -> float:
        before = done.count("reset")
        fn()
        timed.append(done.count("reset") - before)
        return 1.0

    own = Pass(lambda: done.append("run"), 3, lambda: done.append("reset"))
    bench([Benched("a", "torch", {"decode": own})], timer=timer, repeats=3, warmup=1)
    assert done == ["reset", "run"] * 4
    assert timed == [0, 0, 0]


# --- the file ---


def made(*, zeros: float = 0.0, macs: float = 100.0, seconds: float = 1.0, seed: int = 0) -> Bench:
    """Three models: dense; one to look at; dense again under ONNX Runtime."""
    draw = random.Random(seed)
    passes = {"prefill": Pass(lambda: None, 256), "decode": Pass(lambda: None, 16)}
    models = [
        Benched("dense", "torch", passes, Facts(1000, 1000, 4000, 3600, 5000, 100)),
        Benched("other", "torch", passes, Facts(1000, round(1000 * (1 - zeros)), 4000, 1800, 5000, macs)),
        Benched("dense", "onnxruntime", {"prefill": passes["prefill"]}, Facts(bytes=4100)),
    ]
    samples = [
        {what: noisy(own, 20, draw, 0.01) for what in model.passes}
        for model, own in zip(models, (1.0, seconds, 0.8), strict=True)
    ]
    machine = {"device": "a processor", "threads": 1, "load": 0.1, "cores": 2}
    return Bench(models, samples, machine, {"batch": 1, "seq": 256, "decode": 16, "rounds": 20})


def test_the_file_has_the_fields_of_the_format(tmp_path: Path) -> None:
    found = made(seconds=0.5, macs=50)
    found.notes = sentences(found)
    path = tmp_path / "new" / "bench.json"
    found.save(path)
    values = load_bench(path)
    assert set(values) == {"format", "kind", "secateur", "machine", "setting", "models", "notes"}
    dense, cut, exported = values["models"]
    sizes = {"params", "nonzero", "bytes", "bytes_compressed", "peak_memory", "macs"}
    assert set(cut) == {"name", "runtime", "times", *sizes}
    times = {"median", "low", "high", "repeats", "speedup", "speedup_low", "speedup_high", "within_noise", "per_second"}
    assert set(cut["times"]) == {"prefill", "decode"}
    assert set(cut["times"]["decode"]) == times
    assert cut["times"]["prefill"]["speedup"] == pytest.approx(2, rel=0.02)
    assert cut["times"]["prefill"]["within_noise"] is False
    assert cut["times"]["prefill"]["per_second"] == pytest.approx(512, rel=0.02)
    assert dense["times"]["decode"] | {"speedup": 1.0, "within_noise": True} == dense["times"]["decode"]
    assert (exported["macs"], exported["params"], list(exported["times"])) == (None, None, ["prefill"])
    assert [p.name for p in path.parent.iterdir()] == ["bench.json"]
    with pytest.raises(SecateurError, match="exists already"):
        found.save(path)
    found.save(path, overwrite=True)


def test_files_of_another_version_are_refused_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"format": 2, "kind": "bench"}))
    with pytest.raises(SecateurError, match=r"no bench.json of format 1 \(2\): make it anew"):
        load_bench(path)
    with pytest.raises(SecateurError, match="make it anew"):
        made().save(path, overwrite=True)
    path.write_text("{")
    with pytest.raises(SecateurError, match="no readable bench"):
        load_bench(path)


def test_zeros_are_said_to_save_nothing() -> None:
    told = "\n".join(sentences(made(zeros=0.7)))
    assert "70% of the weights of other (torch) are zero; measured " in told
    assert "within the noise, as expected, because dense kernels multiply zeros." in told
    assert "compressed it takes 50% of the bytes" in told
    faster = "\n".join(sentences(made(zeros=0.7, seconds=0.8)))
    assert "That is not because of the zeros" in faster
    assert "as expected" not in faster
    assert "are zero" not in "\n".join(sentences(made(zeros=0.7, macs=50, seconds=0.5)))  # structure went too
    assert "are zero" not in "\n".join(sentences(made()))


def test_what_the_macs_allow_is_said() -> None:
    told = "\n".join(sentences(made(macs=50, seconds=1 / 1.8)))
    assert "its multiply-accumulates allow 2.00x, so that is 90% of it." in told
    assert told.count("multiply-accumulates allow") == 1  # not of decoding
    assert "dense (ONNX Runtime): prefill 1.2" in told
    assert "against dense (torch)." in told
    assert "dense (ONNX Runtime) has no key/value cache, so its decoding was not timed." in told
    assert "follows the bytes" in told
    small = made(macs=50, seconds=1 / 1.8)
    small.models[1] = dataclasses.replace(small.models[1], facts=Facts(1000, 1000, 1100, macs=50))
    assert "multiply-accumulates allow" not in "\n".join(sentences(small))  # INT8: other arithmetic
    assert "busy" not in told


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "no model to bench"),
        ([Benched("a", "torch", {"forward": Pass(int, 1)})] * 2, "two models are named 'a' under torch"),
        ([Benched("a", "tensorrt", {"forward": Pass(int, 1)})], "no runtime 'tensorrt'"),
        ([Benched("a", "torch", {})], "nothing to time"),
    ],
    ids=str,
)
def test_models_that_cannot_be_benched(models: list[Benched], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        bench(models)


@pytest.mark.parametrize(("repeats", "seconds"), [(2, None), (5, 0.0)])
def test_rounds_that_say_nothing(repeats: int, seconds: float | None) -> None:
    with pytest.raises(SecateurError, match="must be"):
        check_rounds(repeats, seconds)


# --- what is counted ---


class Layers(nn.Module):
    """Every kind of convolution, and a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.mobile = Mobile()
        self.up = nn.ConvTranspose2d(3, 6, 2, 2, groups=3)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.up(x).flatten(2)
        return self.mobile(x), y @ y.transpose(1, 2)


def test_macs_of_a_cnn_are_the_same_in_both_runtimes(tmp_path: Path) -> None:
    model, images = shaken(Layers()), pictures()
    export_onnx(model, images, tmp_path / "net.onnx")
    file = OnnxModel(tmp_path / "net.onnx")
    found = onnx_facts(file.path, file.feed(images), len(images), compress=True)
    own = torch_facts(model, images, len(images), (), compress=True)
    assert found.macs == own.macs == pytest.approx(torch_macs(model, images) / len(images))
    pixels = 6 * 6
    assert images.shape[2:] == (6, 6)
    mobile = pixels * (12 * 27 + 12 * 9 + 16 * 12 + 16 * 36) + 64 * 5
    assert own.macs == mobile + pixels * 3 * 2 * 4 + 6 * 6 * 4 * pixels
    assert own.params == sum(p.numel() for p in model.parameters())
    assert own.params
    assert found.params == own.params + 8  # ONNX writes a group norm of 4 groups with ones and zeros of its own
    assert found.bytes == (tmp_path / "net.onnx").stat().st_size


def test_macs_of_a_llama_are_the_same_in_both_runtimes(tmp_path: Path) -> None:
    model, ids = tiny("llama", dtype=torch.float32, tie_word_embeddings=False), tokens()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:40] = 0
    export_onnx(model, {"input_ids": ids}, tmp_path / "llama.onnx")
    file = OnnxModel(tmp_path / "llama.onnx")
    found = onnx_facts(file.path, file.feed(ids), len(ids), compress=False)
    own = torch_facts(model, {"input_ids": ids}, len(ids), (), compress=False)
    layers = 2 * (48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 80)
    attention = 2 * 2 * 11 * 11 * 48
    assert own.macs == 11 * (layers + 48 * 320) + attention
    assert found.macs == pytest.approx(own.macs, rel=1e-3)  # the file multiplies positions with frequencies
    assert own.params is not None
    assert own.nonzero == own.params - 40 * 48
    assert (found.nonzero, found.bytes_compressed) == (found.params - 40 * 48 if found.params else 0, None)


def linear(folder: Path, name: str = "far.onnx") -> Path:
    """A product with a weight: `w` [6, 4] lies in a file of its own and holds 5 zeros."""
    weight = np.arange(24, dtype=np.float32).reshape(6, 4)
    weight.flat[:5] = 0
    port = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "far",
        [port("x", TensorProto.FLOAT, ["rows", 6])],
        [port("y", TensorProto.FLOAT, ["rows", 4])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array([7]), "shape")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save_model(model, folder / name, save_as_external_data=True, location="far.bin", size_threshold=0)
    return folder / name


def test_tensors_in_a_file_of_their_own_are_counted(tmp_path: Path) -> None:
    path = linear(tmp_path)
    found = onnx_facts(path, {"x": np.zeros((3, 6), np.float32)}, 3, compress=True)
    assert (found.params, found.nonzero, found.macs) == (24, 19, 24)
    files = onnx_files(path)
    assert [file.name for file in files] == ["far.onnx", "far.bin"]
    assert found.bytes == sum(file.stat().st_size for file in files)
    (tmp_path / "far.bin").unlink()
    with pytest.raises(SecateurError, match=r"far\.bin is missing beside it"):
        onnx_files(path)


def test_a_damaged_onnx_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"no graph at all")
    with pytest.raises(SecateurError, match="no ONNX file that can be read"):
        onnx_files(path)


def test_what_cannot_be_counted_is_not_guessed(tmp_path: Path) -> None:
    port = helper.make_tensor_value_info
    node = helper.make_node("Einsum", ["x", "x"], ["y"], equation="ij,kj->ik")
    values = port("x", TensorProto.FLOAT, [2, 3]), port("y", TensorProto.FLOAT, [2, 2])
    graph = helper.make_graph([node], "sum", [values[0]], [values[1]])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "e.onnx")
    assert onnx_facts(tmp_path / "e.onnx", {"x": np.zeros((2, 3), np.float32)}, 1, compress=False).macs is None


def test_compressed_bytes_are_those_of_zlib() -> None:
    tensors = [torch.randn(50, 70), torch.zeros(1000, dtype=torch.bfloat16)]
    raw = [x.view(torch.uint8).numpy().tobytes() for x in tensors]
    assert list(tensor_chunks(tensors)) == raw
    assert compressed(raw) == sum(len(zlib.compress(part, 6)) for part in raw)
    assert compressed([]) == 0


# --- what is timed ---


def test_decoding_always_begins_at_the_same_context() -> None:
    model = tiny("llama", dtype=torch.float32)
    load = token_load(320, seq=9, decode=4)
    passes = torch_passes(model, load)
    assert {what: own.count for what, own in passes.items()} == {"prefill": 9, "decode": 4}
    lengths: list[int] = []
    hook = model.register_forward_hook(
        lambda _, __, ___, result: lengths.append(getattr(result.past_key_values, "get_seq_length", int)()),
        with_kwargs=True,
    )
    for keep in (True, False):
        own = torch_passes(model, load, keep=keep)["decode"]
        for _ in range(2):
            lengths.clear()
            own()
            assert lengths[-5:] == [9, 10, 11, 12, 13]
            assert len(lengths) == (5 if keep else 6)  # the prompt is read anew where it is not kept
    hook.remove()
    assert list(torch_passes(model, token_load(320, seq=9, decode=0))) == ["prefill"]


def test_a_file_with_a_cache_decodes_and_one_without_does_not() -> None:
    calls: list[tuple[str, int]] = []

    class Generator:
        def start(self, ids: torch.Tensor) -> None:
            calls.append(("start", ids.shape[1]))

        def step(self, ids: torch.Tensor) -> None:
            calls.append(("step", ids.shape[1]))

    load = token_load(320, batch=2, seq=9, decode=3)
    fake: Any = nn.Identity()
    passes = file_passes(fake, load, Generator())  # type: ignore[arg-type]
    assert {what: own.count for what, own in passes.items()} == {"prefill": 18, "decode": 6}
    calls.clear()
    passes["decode"]()
    assert calls == [("start", 8), ("step", 1), *[("step", 1)] * 3]
    plain: Any = lambda input_ids: input_ids  # noqa: E731
    assert list(file_passes(plain, load)) == ["prefill"]


def test_what_is_a_language_model() -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    bert = BertForMaskedLM(config).eval()
    assert is_language_model(tiny("gpt2"))
    assert not is_language_model(bert)
    assert not is_language_model(nn.Linear(2, 2))
    assert list(torch_passes(bert, default_load(bert, 2))) == ["forward"]
    assert default_load(bert, 4).inputs["input_ids"].shape[0] == 4  # type: ignore[index,call-overload]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq": 20, "decode": 6, "longest": 25}, "20 tokens and 6 generated ones are more than the 25 positions"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"decode": -1}, "decode must be at least 0"),
        ({"seq": 1}, "seq must be at least 2"),
    ],
    ids=str,
)
def test_loads_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        token_load(320, **options)


def test_loads_fit_into_the_positions() -> None:
    load: Load = token_load(320, longest=100, decode=20)
    assert (load.seq, load.decode, load.samples) == (80, 20, 1)
    assert token_load(320, longest=2048).seq == 256


# --- memory ---

PEAK = """
import torch
from secateur.measure.bench_memory import forked, peak_memory
MIB = 1 << 20
def make():
    own = torch.ones(24 * MIB, dtype=torch.uint8)
    torch.ones(90 * MIB, dtype=torch.uint8)  # loading, which does not count
    def run():
        torch.ones(40 * MIB, dtype=torch.uint8)
        own.max()
    return run
def fails():
    raise MemoryError
found = forked(lambda: peak_memory(make, torch.device("cpu")))
print(found / MIB, forked(fails))
"""


@pytest.mark.skipif(not bench_memory.can_measure(torch.device("cpu")), reason="needs Linux's /proc")
def test_the_peak_is_that_of_a_known_allocation() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    mib, ended = done.stdout.split()
    assert 63 < float(mib) < 72
    assert ended == "None"


def test_free_memory_is_some_of_the_machine() -> None:
    free = bench_memory.available(torch.device("cpu"))
    assert free is None or 1 << 20 < free < 1 << 50
    assert bench_memory.available(torch.device("meta")) is None
