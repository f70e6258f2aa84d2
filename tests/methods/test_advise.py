"""Each rule of ``advise`` by itself, its commands through the real parsers, and the facts on models that are known."""

import dataclasses
import importlib
import shlex
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixtures import mixture
from small_nets import Residual, pairs, shaken
from tiny import tiny, tokens
from torch import nn

from secateur.choose.budget import Budget
from secateur.errors import SecateurError
from secateur.methods import advise, cautions
from secateur.methods.advice import TARGETS, Advice, Wish
from secateur.methods.facts import Facts, Machine, Probe, gather, read_machine
from secateur.methods.verbs import plan

VNNI = Machine("a CPU", 2, ("avx512_vnni",), (), None, None, ("onnxruntime",))
AMPERE = dataclasses.replace(VNNI, gpu="A100", capability=(8, 0))
VOLTA = dataclasses.replace(VNNI, gpu="V100", capability=(7, 0))
OLD = dataclasses.replace(VNNI, int8=(), runtimes=())
LLM = Facts(
    name="models/llm", language=True, params=8_000_000_000, bytes=16_000_000_000, dtype="bfloat16",
    shares={"mlp": 0.7, "attention": 0.2, "embeddings": 0.1}, zeros=0.0, two_four=False, cut=False, batch_norms=0,
    kinds={"hidden": (4096,), "ffn": (14336,), "heads": (32,), "layers": (32,)}, untraced=None, uneven=(), product=4096,
    machine=VNNI, seconds=0.5, passed="1 x 128 tokens", busy=0.9,
)  # fmt: skip
CNN = dataclasses.replace(
    LLM, name="my_net:make", language=False, params=1_000_000, bytes=4_000_000, dtype="float32",
    shares={"convolutions": 0.95, "other": 0.05}, batch_norms=20, kinds={"channels": (16, 32)}, product=64,
)  # fmt: skip
MOE = dataclasses.replace(
    LLM, name="models/moe", shares={"experts": 0.9, "attention": 0.1}, kinds={**LLM.kinds, "experts": (64,)}
)


def changed(facts: Facts, **values: Any) -> Facts:
    return dataclasses.replace(facts, **values)


def wish(target: str = "cpu", *budget: str, data: str | None = None, inputs: tuple[str, ...] = ()) -> Wish:
    return Wish(target, Budget.parse(budget), data, inputs)


# rule, facts and wish for which it speaks, a word of what it says; facts and wish for which it is silent
STRATEGIES: list[tuple[str, Facts, Wish, str, Facts, Wish]] = [
    ("quantise_alone", LLM, wish("cpu", "memory=60%"), "Do not prune", LLM, wish("cpu", "memory=50%")),
    ("quantise_alone", CNN, wish("mobile", "memory=30%"), "INT8 alone", CNN, wish("mobile", "memory=30%", "macs=50%")),
    ("prune_then_int8", LLM, wish("cpu", "memory=27%"), "Prune to 50%", LLM, wish("cpu", "memory=10%")),
    ("train_smaller", LLM, wish("gpu", "params=1B"), "12%", LLM, wish("gpu", "params=3B")),
    ("masks_for_gpu", changed(LLM, machine=AMPERE), wish("gpu", "n:m=2:4"), "2:4 with alps",
     changed(LLM, machine=VOLTA), wish("gpu", "n:m=2:4")),
    ("masks_for_gpu", changed(LLM, machine=AMPERE), wish("gpu", "n:m=2:4"), "pack",
     changed(LLM, machine=AMPERE, product=512), wish("gpu", "n:m=2:4")),
    ("masks_for_size", LLM, wish("cpu", "sparsity=60%"), "nothing here runs faster", LLM, wish("cpu", "params=60%")),
    ("masks_only", changed(LLM, untraced="longformer guards"), wish(), "masks alone", LLM, wish()),
    ("to_latency", CNN, wish("cpu", "latency=60%"), "Search under the latency", CNN, wish("cpu", "macs=60%")),
    ("leave_it", changed(LLM, busy=0.2), wish(), "Do not prune for speed", changed(LLM, busy=0.6), wish()),
    ("leave_it", changed(LLM, busy=0.2), wish("gpu"), "larger batches",
     changed(LLM, busy=0.2), wish("cpu", "params=70%")),
    ("experts", MOE, wish("gpu"), "whole experts", LLM, wish("gpu")),
    ("convolutions", CNN, wish("mobile"), "then INT8", LLM, wish("mobile")),
    ("serve", LLM, wish("llm-serving"), "Quantise first", LLM, wish("gpu")),
]  # fmt: skip
CAUTIONS: list[tuple[str, Facts, Wish, str, Facts, Wish]] = [
    ("already_small", changed(LLM, busy=0.2), wish(), "20% of 500.00 ms", LLM, wish()),
    ("int8_first", LLM, wish("cpu"), "about 54% of the bfloat16", LLM, wish("cpu", "memory=60%")),
    ("int8_first", CNN, wish("mobile"), "89.6%", CNN, wish("gpu")),
    ("no_zeros", LLM, wish("mobile"), "densifies", LLM, wish("gpu")),
    ("two_four", changed(LLM, machine=AMPERE), wish("gpu"), "may pay", LLM, wish("cpu")),
    ("two_four", changed(LLM, machine=VOLTA), wish("gpu"), "7.0: it takes Ampere", LLM, wish("mobile")),
    ("two_four", changed(LLM, machine=AMPERE, product=512), wish("gpu"), "below 1024", LLM, wish("cpu")),
    ("two_four", LLM, wish("llm-serving"), "no GPU here", LLM, wish("cpu")),
    ("decoding", LLM, wish("llm-serving"), "16,000.0 MB", LLM, wish("gpu")),
    ("masked_already", changed(LLM, zeros=0.5, two_four=True), wish(), "They are 2:4",
     changed(LLM, zeros=0.01), wish()),
    ("pruned_already", changed(LLM, cut=True), wish(), "pruned before", LLM, wish()),
    ("batch_norm", CNN, wish(), "20 batch norms", LLM, wish()),
    ("embeddings", changed(LLM, shares={"embeddings": 0.5}), wish(), "hold 50%", LLM, wish()),
    ("odd_sizes", changed(LLM, uneven=("ffn = 100: GGUF",)), wish("llm-serving"), "ffn = 100",
     changed(LLM, uneven=("ffn = 100: GGUF",)), wish("cpu")),
    ("slow_int8", changed(LLM, machine=OLD), wish(), "no VNNI", LLM, wish()),
    ("runtimes", changed(LLM, machine=OLD), wish(), "secateur[onnx]", LLM, wish()),
    ("phone", CNN, wish("mobile"), "on the phone", CNN, wish("cpu")),
    ("no_data", changed(LLM, spread=0.25), wish(), "25% of full",
     changed(LLM, probes=(Probe("ffn", "x", 0.1, 0.1),)), wish()),
]  # fmt: skip


@pytest.mark.parametrize(("case", "where"), [
    *((case, advise) for case in STRATEGIES), *((case, cautions) for case in CAUTIONS)
], ids=lambda x: x[0] if isinstance(x, tuple) else "")  # fmt: skip
def test_a_rule_speaks_and_is_silent(case: tuple[str, Facts, Wish, str, Facts, Wish], where: Any) -> None:
    name, facts, asked, word, quiet_facts, quiet_wish = case
    rule: Callable[[Facts, Wish], Advice | None] = getattr(where, name)
    found = rule(facts, asked)
    assert found is not None
    assert found.rule == name
    assert word in f"{found.what} {found.why} {found.evidence}"
    assert found.why
    assert found.evidence
    assert rule(quiet_facts, quiet_wish) is None


def test_every_rule_of_the_tables_is_tested() -> None:
    said = {case[0] for case in STRATEGIES} | {"structure"}
    assert {rule.__name__ for rule in advise.STRATEGIES} == said
    assert {rule.__name__ for rule in cautions.WARNINGS} == {case[0] for case in CAUTIONS} | {"redundancy"}


def test_what_cannot_be_followed_gets_no_advice_that_needs_it() -> None:
    """No structure to cut; and what the exporter cannot follow has no INT8 file either."""
    for reason, exports in (("no axis was found", True), ("torch.export cannot trace Net: it branches", False)):
        found = advise.recommend(changed(CNN, untraced=reason, busy=0.1), wish("mobile"))
        assert (found.best.rule, found.others) == ("masks_only", ())
        assert any(" export " in words for words in found.best.commands) == exports


def test_onnx_is_timed_in_a_type_that_it_computes_in() -> None:
    for facts, typed in ((LLM, True), (changed(LLM, dtype="float32"), False)):
        times = [words for words in advise.recommend(facts, wish("cpu")).best.commands if " bench " in words]
        assert ["--onnx" in words and "--dtype float32" in words for words in times] == [typed]


def test_commands_for_a_result_of_ours_do_not_write_over_it() -> None:
    found = advise.recommend(changed(LLM, name="out/pruned"), wish("cpu"))
    words = [shlex.split(command) for command in found.best.commands]
    assert {w[w.index("--out") + 1] for w in words if "--out" in w} == {
        f"out/pruned-next/{name}" for name in ("pruned", "pruned-healed", "model.onnx")
    }
    assert words[-1][2:5] == ["out/pruned-next/pruned-healed", "--against", "out/pruned"]


def test_the_cheapest_kind_is_told_for_each_parameter() -> None:
    probes = (
        Probe("weights", "w", 0.001, 0.5), Probe("ffn", "a", 0.2, 0.1), Probe("ffn", "b", 0.2, 0.1),
        Probe("heads", "c", 0.1, 0.01), Probe("layers", "d", 3.0, 0.2),
    )  # fmt: skip
    found = cautions.redundancy(changed(LLM, probes=probes, measure="kl"), wish())
    assert found is not None
    assert "parameter: ffn; dearest: layers. Do not touch d" in found.what
    assert "ffn 0.020, heads 0.100, layers 0.150" in found.evidence
    one = cautions.redundancy(changed(LLM, probes=probes[1:2], measure="kl"), wish())
    assert one is not None
    assert "parameter: a." in one.what


@pytest.mark.parametrize(
    ("facts", "asked", "rule"),
    [
        (LLM, wish("cpu"), "structure"),
        (LLM, wish("llm-serving"), "serve"),
        (LLM, wish("llm-serving", "memory=60%"), "quantise_alone"),
        (LLM, wish("cpu", "memory=30%"), "prune_then_int8"),
        (LLM, wish("gpu", "params=20%"), "train_smaller"),
        (changed(LLM, busy=0.1), wish("cpu"), "leave_it"),
        (changed(LLM, busy=0.1), wish("cpu", "params=70%"), "structure"),
        (changed(LLM, machine=AMPERE), wish("gpu", "n:m=2:4"), "masks_for_gpu"),
        (changed(LLM, machine=VOLTA), wish("gpu", "n:m=2:4"), "masks_for_size"),
        (MOE, wish("llm-serving"), "experts"),
        (CNN, wish("mobile"), "convolutions"),
        (changed(CNN, untraced="an operator"), wish("mobile"), "masks_only"),
    ],
)
def test_the_first_strategy_that_applies_is_recommended(facts: Facts, asked: Wish, rule: str) -> None:
    found = advise.recommend(facts, asked)
    assert found.best.rule == rule
    assert rule not in {other.rule for other in found.others}


def test_an_unknown_target_names_the_nearest() -> None:
    with pytest.raises(SecateurError, match="no target 'cpus'; did you mean 'cpu'"):
        advise.recommend(LLM, wish("cpus"))


class ParsedError(Exception):
    """The options were all right."""


def parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, verb, *words = shlex.split(command)
    module = importlib.import_module(f"secateur.cli.{verb}")
    real: Callable[..., Any] = module.parse

    def stop(*given: Any) -> None:
        real(*given)
        raise ParsedError

    monkeypatch.setattr(module, "parse", stop)
    with pytest.raises(ParsedError):
        module.run(words)
    monkeypatch.undo()
    assert tool == "secateur"


def test_every_command_is_one_of_this_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    cases = [(facts, asked) for _, facts, asked, *_ in (*STRATEGIES, *CAUTIONS)]
    shape = ("--input-shape", "2,3,8,8")
    cases += [(facts, Wish(t, data="my_data:batches", inputs=shape)) for facts in (CNN, LLM) for t in TARGETS]
    cases += [(LLM, wish("cpu", "params=6B", "memory=8GiB")), (CNN, wish("cpu", "latency=12ms"))]
    for facts, asked in cases:
        found = advise.recommend(facts, asked)
        for advice in (found.best, *found.others, *found.warnings):
            seen.update(advice.commands)
    assert {command.split()[1] for command in seen} == {"prune", "distill", "export", "bench", "check", "stats"}
    for command in sorted(seen):
        parses(command, monkeypatch)
        words = shlex.split(command)
        for i, word in enumerate(words):
            if word == "--budget":
                Budget.parse([w for w in words[i + 1 :] if "=" in w and not w.startswith("--")])


def test_experts_can_be_cut_as_the_command_says() -> None:
    model = mixture("mixtral").float()
    facts = gather(model, name="moe", batches=[])
    assert facts.shares["experts"] > 0.3
    found = advise.experts(facts, wish("gpu"))
    assert found is not None
    words = shlex.split(found.commands[0])
    skip = [w for w in words[words.index("--skip") + 1 :] if not w.startswith("--")]
    skip = skip[: next((i for i, w in enumerate(skip) if w not in facts.kinds), len(skip))]
    decided = plan(model, "params=90%", data=tokens(4, 11), skip=skip, top_k=1, divisors={"experts": 1})
    assert {kept.kind for kept in decided.kept.values()} == {"experts"}
    assert not decided.dropped


# --- facts ---


def test_facts_of_a_language_model() -> None:
    model = tiny("llama", dtype=torch.float32, tie_word_embeddings=True)
    facts = gather(model, name="tiny", batches=[tokens(2, 11)], seconds=1e-9)
    total = sum(p.numel() for p in model.parameters())
    assert (facts.language, facts.params, facts.bytes, facts.dtype) == (True, total, 4 * total, "float32")
    assert facts.shares["embeddings"] == pytest.approx(320 * 48 / total)
    assert facts.shares["mlp"] == pytest.approx(2 * 3 * 48 * 80 / total)
    assert sum(facts.shares.values()) == pytest.approx(1)
    assert (facts.kinds["ffn"], facts.kinds["layers"], facts.untraced) == ((80,), (2,), None)
    assert (facts.zeros, facts.two_four, facts.measure, len(facts.probes)) == (0, False, "kl", 1)  # no time for more
    assert facts.busy is not None
    assert 0 < facts.busy <= 1


def test_probes_are_the_distance_of_one_cut_alone_and_deterministic() -> None:
    model = tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()  # nothing is lost where nothing was
    found = gather(model, name="tiny", batches=[tokens(2, 11)])
    again = gather(model, name="tiny", batches=[tokens(2, 11)])
    assert found.probes == again.probes
    loss = {probe.name: probe.loss for probe in found.probes}
    assert loss["model.layers.1.mlp.ffn"] == pytest.approx(0, abs=1e-6)
    assert loss["model.layers.1.mlp"] == pytest.approx(0, abs=1e-6)
    assert loss["model.layers.0.mlp.ffn"] > 1e-4
    share = {probe.name: probe.params for probe in found.probes}
    assert share["model.layers.0.mlp.ffn"] == pytest.approx(3 * 40 * 48 / found.params)
    assert share["model.layers.0.self_attn.q_proj.weight"] == pytest.approx(0.5 * 48 * 48 / found.params)


def test_facts_of_a_network_of_convolutions_and_of_masks() -> None:
    model = shaken(Residual())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and name != "conv.weight":
                parameter.view(-1, 4 if parameter.numel() % 4 == 0 else 1)[:, ::2] = 0
    facts = gather(model, name="net", inputs=torch.zeros(2, 3, 6, 6), batches=pairs())
    assert (facts.language, facts.batch_norms) == (False, 3)
    assert facts.shares["convolutions"] > 0.8
    assert 0.3 < facts.zeros < 0.5
    assert {probe.kind for probe in facts.probes} == {"weights", "channels"}
    with pytest.raises(SecateurError, match="has no parameters"):
        gather(nn.ReLU(), name="net", inputs=torch.zeros(2, 3))


def test_two_four_is_seen() -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))
    with torch.no_grad():
        for linear in net:
            linear.weight.view(-1, 4)[:, 1:3] = 0  # type: ignore[operator]  # a linear layer
    assert gather(net, name="net", inputs=torch.zeros(2, 8)).two_four
    with torch.no_grad():
        net[1].weight.fill_(0.0)[:, :5] = 1  # type: ignore[operator]
    assert not gather(net, name="net", inputs=torch.zeros(2, 8)).two_four


def test_flags_of_the_cpu_are_read() -> None:
    text = "processor\t: 0\nmodel name\t: Some Xeon\nflags\t\t: fpu avx2 avx512_vnni amx_int8 avx512_bf16\n"
    found = read_machine(text)
    assert (found.cpu, found.int8, found.bf16) == ("Some Xeon", ("avx512_vnni", "amx_int8"), ("avx512_bf16",))
    assert read_machine("Features\t: fp asimddp\n").int8 == ("asimddp",)
    assert read_machine("flags : fpu avx2").int8 == ()
