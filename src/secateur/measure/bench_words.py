"""What a bench says, in plain sentences."""

import math

from secateur.measure.bench import ALIKE, Bench, Ratio

SHOWN = {"torch": "torch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
"""Runtime -> how people write it."""
MASKED = 0.1
"""Share of zeros, beyond those of the model that it is compared with, from which a model counts as masked."""
SAME = 0.98
"""Share of the multiply-accumulates from which nothing counts as removed."""
_TYPES = 0.5
_WIDE = 0.25
_BUSY = 0.5
_EXACT = 6


def sentences(bench: Bench) -> list[str]:
    """All that there is to say of the times: against what, how far from the ideal, and why zeros save nothing."""
    found = [*_how(bench), *_machine(bench)]
    for index in range(len(bench.models)):
        found += _compared(bench, index)
    found += _masked(bench)
    found += _decoding(bench)
    return found


def times(value: float) -> str:
    """A ratio, such as 1.95x."""
    return f"{value:.2f}x"


def against(found: Ratio) -> str:
    """A ratio with its interval."""
    return f"{times(found.value)} ({found.low:.2f} to {found.high:.2f})"


def _how(bench: Bench) -> list[str]:
    rounds = bench.setting["rounds"]
    found = [f"Times are medians of {rounds} rounds; every round times all models, one after the other."]
    if len(bench.models) > 1:
        kind = "" if rounds >= _EXACT else " (of Student's t, because there are so few rounds)"
        found.append(
            "A speed-up is the median of the ratios of two times of one round, and the range beside it the interval"
            f"{kind} that holds the true median with a confidence of 95%. A difference is within the noise where that "
            f"interval, widened by {ALIKE:.0%}, holds 1."
        )
    return found


def _machine(bench: Bench) -> list[str]:
    found = []
    load, cores = bench.machine.get("load"), bench.machine.get("cores")
    if load is not None and cores and load > _BUSY * cores:
        found.append(
            f"The machine was busy before anything was timed (load {load:.1f} on {cores} cores): trust the ratios more "
            "than the times."
        )
    spreads = {
        f"{what} of {_name(bench, index)}": (own.high - own.low) / own.median
        for index, model in enumerate(bench.models)
        for what in model.passes
        if (own := bench.timing(index, what)) is not None and own.median
    }
    worst = max(spreads, key=lambda key: spreads[key])
    if spreads[worst] > _WIDE:
        found.append(
            f"Half of the times of {worst} spread over {spreads[worst]:.0%} of their median: more repeats, or a "
            "machine with nothing else to do, would tell more."
        )
    return found


def _compared(bench: Bench, index: int) -> list[str]:
    """One sentence for each pass; against the first model of its runtime, and that one against the first of all."""
    base = bench.first_of(bench.models[index].runtime)
    base = base if index != base else 0
    if index == base:
        return []
    found = []
    for what in bench.models[index].passes:
        measured = bench.ratio(index, what, to=base)
        if measured is None:
            continue
        text = f"{_name(bench, index)}: {what} {against(measured)} against {_name(bench, base)}"
        text += ", within the noise" if measured.within_noise else ""
        ideal = bench.ideal(index, to=base)
        if ideal is not None and what != "decode" and ideal > 1 / SAME and _same_type(bench, index, base):
            text += f"; its multiply-accumulates allow {times(ideal)}, so that is {measured.value / ideal:.0%} of it"
        found.append(f"{text}.")
    return found


def _same_type(bench: Bench, index: int, base: int) -> bool:
    """Whether both hold numbers of about as many bytes: multiply-accumulates of INT8 cost less than those of floats."""
    own, first = (bench.models[i].facts for i in (index, base))
    if not own.bytes or not own.params or not first.bytes or not first.params:
        return True
    return abs(math.log((own.bytes / own.params) / (first.bytes / first.params))) < _TYPES


def _masked(bench: Bench) -> list[str]:
    found = []
    for index, model in enumerate(bench.models):
        base = bench.first_of(model.runtime)
        share, name = model.facts.zeros, _name(bench, index)
        zeros = f"{share:.0%} of the weights of {name} are zero"
        if index == base:
            if share > MASKED:
                found.append(f"{zeros}, which makes nothing faster: dense kernels multiply zeros.")
            continue
        ideal = bench.ideal(index, to=base)
        if share - bench.models[base].facts.zeros <= MASKED or (ideal is not None and ideal > 1 / SAME):
            continue
        for what in model.passes:
            measured = bench.ratio(index, what, to=base)
            if measured is None:
                continue
            if measured.within_noise:
                text = f"measured {against(measured)} in {what}: within the noise, as expected"
                found.append(f"{zeros}; {text}, because dense kernels multiply zeros.")
            else:
                text = f"measured {against(measured)} in {what}"
                found.append(f"{zeros}; {text}. That is not because of the zeros: dense kernels multiply them.")
        found += _smaller(bench, index, base)
    return found


def _smaller(bench: Bench, index: int, base: int) -> list[str]:
    own, first = (bench.models[i].facts.bytes_compressed for i in (index, base))
    if not own or not first:
        return []
    return [f"What the zeros of {_name(bench, index)} buy is size: compressed it takes {own / first:.0%} of the bytes."]


def _decoding(bench: Bench) -> list[str]:
    if not any("decode" in model.passes for model in bench.models):
        return []
    found = [
        "Decoding reads every weight once for each token, so memory sets its pace more than arithmetic: its speed-up "
        "follows the bytes, and that of prefill the multiply-accumulates."
    ]
    for index, model in enumerate(bench.models):
        if "prefill" in model.passes and "decode" not in model.passes:
            found.append(f"{_name(bench, index)} has no key/value cache, so its decoding was not timed.")
    return found


def _name(bench: Bench, index: int) -> str:
    """Short, and with the runtime where there are several."""
    model = bench.models[index]
    several = len({other.runtime for other in bench.models}) > 1
    return f"{model.name} ({SHOWN[model.runtime]})" if several else model.name
