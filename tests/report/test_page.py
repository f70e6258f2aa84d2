"""The page of a run: what it says, what it leaves out, and that nothing in it can run."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import runs_by_hand as by_hand

from secateur.choose.plan import Plan
from secateur.errors import SecateurError
from secateur.report import PAGE, add_page, compare, page, write_report
from secateur.report.charts import Chart, Series, svg


class Text(HTMLParser):
    """What a reader sees, the sections by their ids, and all elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.hidden = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.hidden += tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag == "style"

    def handle_data(self, data: str) -> None:
        if not self.hidden and data.strip():
            self.words.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return " | ".join(self.words)

    @property
    def sections(self) -> list[str]:
        return [str(own["id"]) for tag, own in self.tags if tag == "section" and "id" in own]


def read(folder: Path) -> Text:
    return Text(page(folder, shown="out/small"))


def test_a_cut_before_and_after(tmp_path: Path) -> None:
    found = read(by_hand.structural(tmp_path / "small"))
    assert found.sections == ["before-after", "cuts", "search", "reproduce"]
    assert "70.0% of the parameters, perplexity 16.00 \N{RIGHTWARDS ARROW} 18.56." in found.text
    text = found.text.replace("\N{MINUS SIGN}", "-")
    assert "parameters | 2,000,000 | 1,400,000 | -30.0%" in text
    assert "multiply-accumulates | 30,000,000 | 21,000,000 | -30.0%" in text
    assert "memory: weights and KV cache of 1 x 4,096 tokens | 11.44 MiB | 8.01 MiB | -30.0%" in text
    assert "files of the weights | 4.77 MiB | 2.86 MiB | -40.0%" in text  # the plan's masks are no weights
    assert "perplexity | 16.00 | 18.56 | +16.0%" in text
    assert "KL from the dense model, nats per token | \N{EN DASH} | 0.148" in text
    assert "81.0%" in text
    assert "parameters that a token meets" not in text
    assert "secateur | bench | models/dense | out/small" in text
    assert "secateur | distill | --teacher | models/dense | --student | out/small | --data" in text
    assert "secateur | prune | models/dense | --out | 'out/it'\"'\"'s | small' | --budget | params=70%" in text
    for name in ("torch", "python", "platform"):
        assert name in found.words


def test_what_was_cut_where(tmp_path: Path) -> None:
    found = read(by_hand.structural(tmp_path / "small"))
    text = found.text
    for row in (
        "layers.0 | 100% | 100%", "layers.1 | 65% | 50%", "layers.2: no self_attn | 75% | 100%",
        "layers.3: dropped | 0% | 0%",
    ):  # fmt: skip
        assert row in text
    assert "260,000 of 400,000 parameters" in {own.get("title") for _, own in found.tags}


def test_an_older_report_shows_its_plan(tmp_path: Path) -> None:
    report = by_hand.base(costs=by_hand.costs(), measured=by_hand.quality())
    del report["format"], report["made"], report["bytes"]
    axes = {
        f"model.layers.{i}.mlp.ffn": {"kind": "ffn", "size": 512, "kept": kept} for i, kept in ((10, 128), (2, 256))
    }
    plan = {"format": 1, "axes": axes, "dropped": ["model.layers.3", "model.layers.4.self_attn"], "masks": {}}
    text = read(by_hand.write(tmp_path / "small", report, plan=plan)).text
    assert "written by secateur 0.1.0, before reports had a format" in text
    assert "layers.2 | 50% | layers.3: dropped | layers.4: no self_attn | layers.10 | 25%" in text
    assert "No command made this" in text


def test_masks_are_said_to_make_nothing_faster(tmp_path: Path) -> None:
    found = read(by_hand.masked(tmp_path / "small"))
    assert found.sections == ["before-after", "zeros", "reproduce"]
    assert "50.0% of the masked weights are zero, perplexity 16.00" in found.text
    assert "Zeros make nothing faster here" in found.text
    assert "bench" not in found.text
    assert "layer | q_proj | down_proj | layers.0 | 40.0% | 45.0% | layers.1 | 50.0% | 55.0%" in found.text
    assert "No calibration data was seen at model.layers.0.q: masked by magnitude." in found.text


def test_a_search_shows_its_front_and_what_it_missed(tmp_path: Path) -> None:
    found = read(by_hand.front(tmp_path / "small"))
    assert found.sections == ["before-after", "cuts", "search", "latency", "reproduce"]
    for words in (
        "chosen, expected", "chosen, measured", "Trials brought the measured kl from 0.4 to 0.21.",
        "The budget was not met: latency is 5 ms, and should be 4 ms at most.", "stopped before it was proven best",
        "a forward pass takes 5 ms, the dense model's 6.4 ms: 1.28 times as fast", "pruned, predicted",
    ):  # fmt: skip
        assert words in found.text


def test_a_recipe_has_its_steps_and_curves(tmp_path: Path) -> None:
    found = read(by_hand.recipe(tmp_path / "small"))
    assert found.sections == ["before-after", "steps", "cuts", "healing", "reproduce"]
    for words in (
        "1. prune | minitron; params=70% | 1,400,000", "2. distill | 100 steps; 205k tokens",
        "perplexity 24.60 \N{RIGHTWARDS ARROW} 17.33", "multiply-accumulates | 30,000,000 | 21,000,000",
        "2. distill: loss in training.", "2. distill: perplexity on held-out data.",
        "KL from the teacher | 0.47 | 0.094",
        "perplexity | 24.60 | 17.33 | 16.00", "Step 1. prune: not repaired, though they lost inputs: lm_head.weight.",
    ):  # fmt: skip
        assert words in found.text
    assert "Nothing was trained" not in found.text
    assert [tag for tag, _ in found.tags].count("svg") == 3


def test_a_distillation_is_measured_against_its_teacher(tmp_path: Path) -> None:
    text = read(by_hand.distilled(tmp_path / "small")).text.replace("\N{MINUS SIGN}", "-")
    assert "70.0% of the parameters, perplexity 16.00 \N{RIGHTWARDS ARROW} 17.33." in text
    assert "dense model | models/dense | pruned model | out/small" in text
    assert "parameters | 2,000,000 | 1,400,000 | -30.0%" in text
    assert "The plan was not saved: none is there." in text


def test_measurements_beside_the_report(tmp_path: Path) -> None:
    folder = by_hand.structural(tmp_path / "small")
    by_hand.beside(folder, sensitivity=by_hand.SENSITIVITY, bench=by_hand.BENCH)
    found = read(folder)
    assert found.sections == ["before-after", "cuts", "search", "sensitivity", "latency", "reproduce"]
    for words in (
        "increase of kl, on calib.npy. Measured with 12.5 passes over the data; one by one it takes 96.",
        "ffn | axis | 25% gone | 50% gone | 75% gone | layers.0 | 0.002 | 0.03 | 0.4",
        "weights, 75% zero | layer | q_proj | o_proj | down_proj | layers.0 | 0.2 | 0.2 | 0.2", "dropped whole",
        "Measured against models/dense (torch), on cpu, 2 threads: out/small (torch) is 1.41 times as fast in",
        "out/masked (torch) is neither faster nor slower in prefill, as far as the noise shows (0.97 to 1.06), neither",
        "Zeros were multiplied like any other number.",
        "43.2 ms | 41.9 ms to 44.9 ms", "7.63 MiB | 6.96 MiB",
    ):  # fmt: skip
        assert words in found.text
    assert "was not measured" not in found.text
    shades = [
        float(style.partition(":")[2]) for _, own in found.tags if (style := own.get("style") or "").startswith("--t")
    ]
    assert (min(shades), max(shades)) == (0, 1)
    assert "is of another model" not in found.text
    by_hand.beside(folder, sensitivity=by_hand.SENSITIVITY | {"fingerprint": "0" * 64, "losses": {"a": {"0.5": 1e-6}}})
    text = read(folder).text
    assert "The sensitivity beside this run is of another model, models/dense." in text
    assert "<0.0001" in text


def test_sensitivity_of_fastnas_stands_in_the_report(tmp_path: Path) -> None:
    table = {f"layers.{i}.channels": {"32": 0.0, "24": 0.1 * (i + 1), "16": 0.5, "4": 2.5} for i in range(3)}
    told: dict[str, Any] = {
        "sensitivity": table,
        "score": {"name": "closeness", "dense": 0.0, "candidates": 9},
        "method": "fastnas",
    }
    text = read(by_hand.write(tmp_path / "small", by_hand.base(costs=by_hand.costs(), **told))).text
    assert "What is lost by the score closeness where one axis alone is cut" in text
    assert "axis | 20% gone | 50% gone | 90% gone | layers.0 | 0.1 | 0.5 | 2.50" in text
    assert "Quality was not measured" in text


def test_nothing_runs_and_nothing_is_loaded(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script><img src=http://x onerror=alert(2)>&\"'"
    folder = by_hand.structural(tmp_path / "small", model={"name": bad, "fingerprint": bad}, method=bad, dropped=[bad])
    report = json.loads((folder / "report.json").read_text())
    report["options"] = {bad: bad}
    report["where"][0]["name"] = bad
    report["search"]["score"] = f"$x^2$ {bad}"
    report["made"] = {"command": [bad], "versions": {bad: bad}}
    bench = json.loads(json.dumps(by_hand.BENCH).replace("out/small", "<script>alert(3)</script>"))
    by_hand.write(folder, report, bench=bench)
    html = page(folder, shown=bad)
    compare([folder, by_hand.masked(tmp_path / "other")], tmp_path / "both.html")
    for text in (html, (tmp_path / "both.html").read_text()):
        found = Text(text)
        assert not {tag for tag, _ in found.tags} & {"script", "img", "iframe", "object", "embed", "base", "form"}
        assert not [own for _, own in found.tags if any(name.startswith("on") for name in own)]
        # Names of namespaces are no addresses that anything is loaded from.
        links = [own[key] or "" for _, own in found.tags for key in ("href", "src", "xlink:href") if key in own]
        assert all(link.startswith(("#", "data:")) for link in links)
        assert "url(" not in re.sub(r"url\(#\w+\)", "", text)
        assert "@import" not in text
        assert "default-src 'none'" in text
        assert "<script>" in found.text  # as text


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    for make in (by_hand.structural, by_hand.front, by_hand.recipe):
        folder = make(tmp_path / make.__name__)
        assert page(folder) == page(folder)


def test_strange_reports_are_shown_as_far_as_they_go(tmp_path: Path) -> None:
    """Reports of other methods, of older versions, with infinities: whatever is there must not break the page."""
    strange: list[dict[str, object]] = [
        {"method": "x"},
        {"costs": {"params": {"pruned": 5}}},
        {"costs": {"params": {"dense": 0, "pruned": 0}, "memory": 3}, "measured": {"perplexity": {"dense": "inf"}}},
        {"method": None, "measured": {"accuracy": {"dense": 0.9, "pruned": "nan"}, "top1": None}, "where": [{}, 3]},
        {"steps": [{}, 3, {"step": "prune", "training": {"history": [1, {"step": 1}]}}], "seconds": []},
        {"method": "search", "levels": {"front": [{}, {}]}, "search": {"candidates": [{}]}, "target": {"params": 1}},
        {"method": "m", "sparsity": {"tensors": {"a": {"elements": 0}}, "masked": {"elements": 0}}, "latency": []},
        {"method": "m", "sensitivity": {"a": {"x": 1}, "b": []}, "model": "text", "made": "text", "options": [1]},
        {"costs": {"params": {"dense": 10**400, "pruned": 5}, "memory": {"pruned": 5, "kv_seq_len": "long"}}},
        {"method": "m", "sparsity": {"masked": {"elements": 5, "zeros": None}}, "latency": {"dense": "x"}},
        {"method": "m", "latency": {"dense": "x", "predicted": 0.1, "measured": 0.2}, "options": {"n": -(10**400)}},
        {
            "method": "m",
            "levels": {"front": [{"params": 1, "expected": 2}, {"params": 2, "expected": 1}], "measure": []},
            "target": {"params": {}},
        },
        {"method": "half of a character: \ud800"},
    ]
    for i, report in enumerate(strange):
        html = page(by_hand.write(tmp_path / str(i), report))
        assert "before reports had a format" in html
    text = read(tmp_path / "2").text
    assert "perplexity infinite" in text or "infinite" in text
    compare([tmp_path / str(i) for i in range(len(strange))], tmp_path / "all.html")
    by_hand.beside(tmp_path / "0", bench=by_hand.BENCH | {"models": [{"name": "no times"}, *by_hand.BENCH["models"]]})
    assert "no times" in page(tmp_path / "0")


def test_sections_are_folded_where_there_is_much(tmp_path: Path) -> None:
    rows = [
        {"name": f"layers.{i}.channels", "dropped": [], "axes": {"channels": {"dense": 64, "pruned": 9}}}
        for i in range(95)
    ]
    html = page(by_hand.write(tmp_path / "cnn", by_hand.base(costs=by_hand.costs(), where=rows)))
    assert "55 more" in html
    assert html.count("14%") == 95


# --- several runs ---


def test_runs_side_by_side(tmp_path: Path) -> None:
    folders = [
        by_hand.structural(tmp_path / "a/small"),
        by_hand.front(tmp_path / "b/small"),
        by_hand.masked(tmp_path / "m"),
    ]
    other = json.loads((folders[1] / "report.json").read_text())
    other["options"] |= {"top_k": 12, "trials": 100}
    (folders[1] / "report.json").write_text(json.dumps(other))
    out = compare(folders, tmp_path / "runs.html")
    found = Text(out.read_text())
    text = found.text.replace("\N{MINUS SIGN}", "-")
    assert "3 ways to prune models/dense" in text
    assert "dense | a/small | b/small | m" in text
    assert "perplexity | 16.00 | 18.56 | +16.0% | 17.25 | +7.8% | 16.90 | +5.6%" in text
    assert "Perplexity against size" in text
    assert "top_k | 10 | 12 | 10" in text
    assert "trials | \N{EN DASH} | 100 | \N{EN DASH}" in text
    assert "budget | params=70% | params=70% | sparsity=50%" in text
    best = [i for i, (tag, own) in enumerate(found.tags) if own.get("class") == "best"]
    assert len(best) == 4  # parameters, which two runs share, not zero, and perplexity; all else is alike
    assert "parameters that are not zero | 2,000,000 | 1,400,000 | -30.0% | 1,400,000 | -30.0% | 1,100,000" in text
    assert "To bear in mind" not in text


def test_masks_are_not_best_beside_a_deeper_cut_and_long_names_keep_their_ends(tmp_path: Path) -> None:
    names = [f"sweep-of-budgets-and-masks-{i}" for i in range(2)]
    half = by_hand.structural(tmp_path / names[0], costs=by_hand.costs(0.5))
    html = compare([half, by_hand.masked(tmp_path / names[1])], tmp_path / "runs.html").read_text()
    assert html.count('class="best">1,000,000') == 2  # of the parameters, and of those that are not zero
    assert 'class="best">1,100,000' not in html
    assert all(f"sweep-of-b\N{HORIZONTAL ELLIPSIS}nd-masks-{i}" in html for i in range(2))


def test_runs_of_other_models_are_not_ranked(tmp_path: Path) -> None:
    other = {"model": {"name": "other"}, "costs": by_hand.costs(0.6), "measured": by_hand.quality(17.0)}
    one, two = by_hand.structural(tmp_path / "one"), by_hand.structural(tmp_path / "two", **other)
    text = compare([one, two], tmp_path / "runs.html").read_text()
    assert "These runs began with 2 different dense models (one: models/dense (ffffffff); two: other (other))" in text
    assert 'class="best"' not in text
    assert "<svg" not in text
    three = by_hand.structural(tmp_path / "three", measured=by_hand.quality(19.0, tokens=80))
    text = compare([one, three], tmp_path / "runs.html", overwrite=True).read_text()
    assert "Quality was not measured on the same data" in text
    assert 'class="best"' not in text


def test_a_distilled_run_stands_beside_the_one_it_came_from(tmp_path: Path) -> None:
    out = compare(
        [by_hand.structural(tmp_path / "cut"), by_hand.distilled(tmp_path / "healed")], tmp_path / "runs.html"
    )
    text = Text(out.read_text()).text
    assert "different dense models" not in text
    assert "2 ways to prune models/dense" in text


# --- what is refused ---


def damaged(folder: Path) -> Path:
    by_hand.structural(folder)
    (folder / "report.json").write_text('{"format": 1,')
    return folder


def other_format(folder: Path) -> Path:
    return by_hand.structural(folder, format=2, secateur="9.9")


def format_as_text(folder: Path) -> Path:
    return by_hand.structural(folder, format="1")


def too_deep(folder: Path) -> Path:
    by_hand.structural(folder)
    (folder / "report.json").write_text("[" * 100_000)
    return folder


def no_object(folder: Path) -> Path:
    by_hand.structural(folder)
    (folder / "report.json").write_text("[1, 2]")
    return folder


def bad_bench(folder: Path) -> Path:
    by_hand.structural(folder)
    (folder / "bench.json").write_text('{"format": 1, "kind": "sensitivity"}')
    return folder


def old_sensitivity(folder: Path) -> Path:
    by_hand.structural(folder)
    (folder / "sensitivity.json").write_text('{"format": 7, "kind": "sensitivity"}')
    return folder


def newer_plan(folder: Path) -> Path:
    by_hand.structural(folder)
    (folder / "plan.json").write_text('{"format": 3, "axes": {}, "dropped": [], "masks": {}}')
    return folder


def no_run(folder: Path) -> Path:
    return by_hand.write(folder, {"architectures": ["Llama"]})


def with_runs_below(folder: Path) -> Path:
    by_hand.structural(folder / "small")
    by_hand.structural(folder / "deeper/other")
    return folder


def missing(folder: Path) -> Path:
    return folder


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (damaged, "report.json: cannot be read"),
        (other_format, "report.json: written by secateur 9.9, format 2; this version reads format 1"),
        (format_as_text, "format '1'; this version reads format 1"),
        (too_deep, "report.json: cannot be read (maximum recursion depth exceeded"),
        (no_object, "report.json: it holds a list, and should be a JSON object"),
        (no_run, "this is no report of a run"),
        (bad_bench, "bench.json: it should be of kind 'bench', and is of 'sensitivity'"),
        (old_sensitivity, "sensitivity.json: written by secateur of an unknown version, format 7"),
        (newer_plan, "plan.json: written by secateur of an unknown version, format 3; this version reads format 1 and"),
        (with_runs_below, "no report.json is in it, so it is no run; these are: "),
        (missing, "no such folder"),
    ],
)
def test_what_cannot_be_shown(tmp_path: Path, make: Callable[[Path], Path], said: str) -> None:
    folder = make(tmp_path / "run")
    with pytest.raises(SecateurError) as caught:
        write_report(folder)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.html"))


def test_plans_of_every_format_are_read(tmp_path: Path) -> None:
    folder = by_hand.structural(tmp_path / "run")
    Plan(origin={"method": "minitron"}).save(folder)
    content = json.loads((folder / "plan.json").read_text())
    for number in (1, content["format"]):
        (folder / "plan.json").write_text(json.dumps({**content, "format": number}))
        assert "minitron" in write_report(folder).read_text()


def test_runs_below_and_above_are_named(tmp_path: Path) -> None:
    folder = with_runs_below(tmp_path / "runs")
    with pytest.raises(SecateurError, match=r"these are: .*runs/small, .*runs/deeper/other$"):
        page(folder)
    (folder / "small/files").mkdir()
    with pytest.raises(SecateurError, match=r"the folder above is: .*runs/small$"):
        page(folder / "small/files")


def test_a_file_that_is_not_ours_stays(tmp_path: Path) -> None:
    folder = by_hand.masked(tmp_path / "run")
    assert write_report(folder) == folder / PAGE
    assert write_report(folder).read_text().startswith("<!DOCTYPE html>")  # made again
    elsewhere = write_report(folder, tmp_path / "page.html")
    with pytest.raises(SecateurError, match=r"page.html: exists already; .*--overwrite"):
        write_report(folder, elsewhere)
    write_report(folder, elsewhere, overwrite=True)
    for path in (folder / PAGE, elsewhere):
        path.write_text("<html>mine</html>")
        with pytest.raises(SecateurError, match="exists, and is no page of secateur"):
            write_report(folder, path, overwrite=True)
        assert path.read_text() == "<html>mine</html>"
    with pytest.raises(SecateurError, match="is no page of secateur"):
        write_report(folder)
    for name, said in (("page.txt", "a page is an .html file"), ("no/page.html", "there is no folder")):
        with pytest.raises(SecateurError, match=said):
            write_report(folder, tmp_path / name)
    assert not list(tmp_path.rglob(".*partial*"))
    with pytest.raises(SecateurError, match="compare takes two runs or more, not 1"):
        compare([folder], tmp_path / "c.html")
    with pytest.raises(SecateurError, match="is given twice"):
        compare([folder, tmp_path / "run/../run"], tmp_path / "c.html")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut, masks = by_hand.structural(tmp_path / "cut"), by_hand.masked(tmp_path / "masks")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.backends.backend_svg", None)
    assert "<svg" not in page(masks)  # nothing to draw
    with pytest.raises(SecateurError, match=r"matplotlib is missing .*pip install 'secateur\[report\]'"):
        page(cut)
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(SecateurError, match=r"jinja2, which is missing: pip install 'secateur\[report\]'"):
        page(masks)
    said = add_page(masks, "out/masks")
    assert said is not None
    assert said.startswith("report.html was not written (")
    assert said.endswith("secateur report out/masks")
    assert not (masks / PAGE).exists()


def test_a_fault_of_ours_costs_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = by_hand.masked(tmp_path / "run")

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bar of no length")

    monkeypatch.setattr("secateur.report.grids.zeros", broken)
    assert "ZeroDivisionError: a bar of no length; please report it" in str(add_page(folder, "run"))
    with pytest.raises(ZeroDivisionError):
        page(folder)


# --- drawings ---


def test_a_drawing_takes_its_colours_from_the_page() -> None:
    chart = Chart(
        "What <b>", "x & y", "$z$", [Series("one", [(1.0, 2.0), (2e6, 3.0)]), Series("", [(5.0, 1.0)], big=True)]
    )
    found = svg(chart)
    assert found == svg(chart)
    assert found.startswith('<svg class="chart" role="img" viewBox="0 0 ')
    assert "var(--series-1)" in found
    assert "var(--ink)" in found
    colours = set(re.findall(r"#[0-9a-fA-F]{6}\b", found))
    assert colours <= {"#ffffff"}
    for text in ("<title>What &lt;b&gt;</title>", ">x &amp; y</text>", ">$z$</text>", ">one</text>"):
        assert text in found
    assert "date" not in found.lower()
