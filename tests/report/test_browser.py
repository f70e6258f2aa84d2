"""The pages in a real browser: nothing is fetched, nothing complains, nothing sticks out, everything can be read."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs_by_hand as by_hand

from secateur.report import compare, page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
PHONE, LAPTOP = 390, 1280
# Of every element with text of its own: its colour and what it stands on, as the browser has worked them out. Shades
# are made by color-mix, so colours are drawn on a canvas, which knows all ways to write one.
CONTRASTS = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const drawn = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
    const style = getComputedStyle(element);
    if (!own || style.display === "none" || !element.getClientRects().length) continue;
    const under = [];
    for (let at = element; at; at = at.parentElement) under.unshift(getComputedStyle(at).backgroundColor);
    const ink = element.closest("svg") ? style.fill : style.color;
    const [a, b] = [light(drawn([...under, ink])), light(drawn(under))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), own]);
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A page of every kind of run, one with everything, and one of several runs."""
    place = tmp_path_factory.mktemp("pages")
    makers = (by_hand.structural, by_hand.front, by_hand.masked, by_hand.recipe, by_hand.distilled)
    folders = [make(place / make.__name__) for make in makers]
    measured = by_hand.structural(place / "measured", model={"name": "a-very-long-name" * 8, "fingerprint": "f" * 64})
    by_hand.beside(measured, sensitivity=by_hand.SENSITIVITY, bench=by_hand.BENCH)
    by_hand.structural(place / ("a-run-with-a-long-name" * 3))
    for folder in [*folders, measured]:
        (place / f"{folder.name}.html").write_text(page(folder), encoding="utf-8")
    compare([*folders, place / ("a-run-with-a-long-name" * 3)], place / "compare.html")
    return [*(place / f"{folder.name}.html" for folder in [*folders, measured]), place / "compare.html"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for all tests."""
    from playwright.sync_api import sync_playwright

    found = next((path for name in NAMES if (path := shutil.which(name)) is not None), None)
    if found is None:
        pytest.fail(f"no Chromium is installed (looked for {', '.join(NAMES)}): apt-get install chromium")
    with sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=found, args=QUIET)
        yield browser
        browser.close()


class Window:
    """A page of the browser that goes nowhere but to the file, and notes what it tried and said."""

    def __init__(self, browser: Any, width: int, scheme: str, *, scripts: bool = True) -> None:
        self.asked: list[str] = []
        self.said: list[str] = []
        size = {"width": width, "height": 900}
        self.context = browser.new_context(viewport=size, color_scheme=scheme, java_script_enabled=scripts)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.route("**/*", self._only_the_file)

    def _only_the_file(self, route: Any) -> None:
        if route.request.is_navigation_request() and route.request.url.startswith("file:"):
            route.continue_()
        else:
            self.asked.append(route.request.url)
            route.abort()

    def open(self, path: Path) -> None:
        """Show a page, with all that is folded away."""
        self.page.goto(path.as_uri(), wait_until="load")
        self.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")

    def __enter__(self) -> "Window":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, LAPTOP])
def test_pages_load_nothing_say_nothing_fit_and_can_be_read(
    browser: Any, pages: list[Path], width: int, scheme: str
) -> None:
    with Window(browser, width, scheme) as window:
        for path in pages:
            window.open(path)
            wide, high = window.page.evaluate("[document.documentElement.scrollWidth, document.body.scrollHeight]")
            assert wide <= width, f"{path.name} is {wide} pixels wide"
            assert high > 600
            poor = [f"{own[1][:40]}: {own[0]:.2f}" for own in window.page.evaluate(CONTRASTS) if own[0] < 4.5]
            assert not poor, f"{path.name}, {scheme}: {poor[:5]}"
            dark = window.page.evaluate("getComputedStyle(document.body).backgroundColor").startswith("rgb(1")
            assert dark == (scheme == "dark")
        assert window.asked == []
        assert window.said == []


def test_tables_that_are_too_wide_scroll_on_their_own(browser: Any, pages: list[Path]) -> None:
    with Window(browser, PHONE, "light") as window:
        window.open(pages[-1])
        boxes = window.page.evaluate(
            "[...document.querySelectorAll('.wide')].map((w) => [w.scrollWidth, w.clientWidth])"
        )
        assert any(inner > outer for inner, outer in boxes)


def test_curves_are_drawn_with_the_page_s_colours(browser: Any, pages: list[Path]) -> None:
    inks = {}
    for scheme in ("light", "dark"):
        with Window(browser, LAPTOP, scheme) as window:
            window.open(next(path for path in pages if path.stem == "recipe"))
            strokes = "[...document.querySelectorAll('svg path')].map((p) => getComputedStyle(p).stroke)"
            inks[scheme] = {own for own in window.page.evaluate(strokes) if own.startswith("rgb")}
            boxes = window.page.evaluate(
                "[...document.querySelectorAll('svg')].map((s) => s.getBoundingClientRect().width)"
            )
            assert len(boxes) == 3
            assert min(boxes) > 300
    assert len(inks["light"]) >= 2
    assert inks["light"].isdisjoint(inks["dark"])


def test_on_paper_it_is_light_and_unfolded(browser: Any, pages: list[Path]) -> None:
    with Window(browser, 794, "dark") as window:
        window.page.goto(next(path for path in pages if path.stem == "recipe").as_uri())
        window.page.emulate_media(media="print")
        assert window.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert window.page.get_by_text("tokens", exact=True).first.bounding_box()["height"] > 0
        poor = [own for own in window.page.evaluate(CONTRASTS) if own[0] < 4.5]
        assert not poor


def test_a_script_in_a_name_does_not_run(browser: Any, tmp_path: Path) -> None:
    bad = "<script>alert(1)</script><img src='http://127.0.0.1:9/x' onerror='alert(2)'>"
    folder = by_hand.structural(tmp_path / "run", model={"name": bad, "fingerprint": bad}, method=bad)
    (tmp_path / "bad.html").write_text(page(folder))
    with Window(browser, LAPTOP, "light") as window:
        window.open(tmp_path / "bad.html")
        assert window.page.get_by_text("<script>alert(1)</script>").count() > 0
        assert (window.asked, window.said) == ([], [])
