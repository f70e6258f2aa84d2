"""The documentation site: it builds strictly, has every page, name and command, and opens without network."""

import html
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import secateur
from secateur.cli import main
from secateur.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LOADS = ("script", "img", "iframe", "source", "video", "audio", "embed")
"""Tags whose `src` a browser fetches by itself; of `link` it depends on `rel`."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A process of its own: mkdocs counts the warnings that it logs (not with --quiet)."""
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    made = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    return folder


def settings() -> Any:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def listed(nav: Any) -> Iterator[str]:
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else listed(value)


def blocks(language: str) -> list[tuple[str, str]]:
    pages = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
    found = [(page.name, match) for page in pages for match in FENCE.finditer(page.read_text())]
    return [(where, match[2]) for where, match in found if match[1] == language]


class Fetched(HTMLParser):
    """What a browser fetches by itself when it opens a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag in LOADS:
            self.found.append(given.get("src", ""))
        elif tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.found.append(given.get("href", ""))
        self.found += re.findall(r"url\(\s*['\"]?([^'\")]+)", given.get("style", ""))


def test_every_page_is_in_the_nav() -> None:
    outside = {"benchmarks/README.md", "CONTRIBUTING.md", "CHANGELOG.md"}  # brought along by docs/hooks.py
    pages = list(listed(settings()["nav"]))
    assert len(pages) == len(set(pages))
    assert set(pages) - outside == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def test_it_builds_strictly(site: Path) -> None:
    for page in listed(settings()["nav"]):
        assert (site / page.replace("README.md", "index.md")).with_suffix(".html").exists(), page
    assert not list(site.rglob("*.py"))


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    page = (site / "reference.html").read_text()
    for name in secateur.__all__:
        _, found, after = page.partition(f'id="secateur.{name}"')
        assert found, name
        text = after.partition("<h3")[2] if after.startswith("></span>") else after  # an anchor before the heading
        entry = re.split(r"<h[2-4]", text, maxsplit=1)[0]
        assert "<p>" in entry, f"{name} has no text"
        shown = html.unescape(re.sub(r"<[^>]+>", "", entry))
        assert name[0].isupper() or f"{name}(" in shown, f"{name} is not the function"


def test_every_command_is_on_its_page() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| \[.*\]\([\w-]+\.md\) \|$", (DOCS / "cli.md").read_text(), re.MULTILINE)
    assert rows == list(VERBS.items())


def test_nothing_comes_from_the_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(list(DOCS.glob("*.md")))
    for page in pages:
        text, parser = page.read_text(), Fetched()
        parser.feed(text)
        assert len(parser.found) > 2
        far = [where for where in parser.found if re.match(r"(https?:)?//", where)]
        assert not far, f"{page.name}: {far}"
        assert 'class="mermaid"' not in text, f"{page.name}: mermaid is fetched from the network"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text()), sheet.name


def test_the_search_works_from_the_disk(site: Path) -> None:
    index = (site / "search" / "search_index.js").read_text()
    assert index.startswith("var __index = ")
    assert "secateur.prune" in index
    assert (site / "assets" / "iframe-worker.js").exists()
    assert 'src="assets/iframe-worker.js"' in (site / "index.html").read_text()


def test_what_pages_cite_comes_along(site: Path) -> None:
    cited = [found for page in DOCS.glob("*.md") for found in re.findall(r"\]\(\.\./(.*?)\)", page.read_text())]
    files = [where for where in cited if Path(where).suffix in (".json", ".yaml")]
    assert files
    for where in files:
        assert (site / where).read_bytes() == (ROOT / where).read_bytes()


def test_snippets_of_other_tools_are_python() -> None:
    """They cannot run here, and must at least be whole."""
    found = blocks("py")
    assert found
    for where, text in found:
        compile(text, where, "exec")


def test_commands_that_are_shown_only_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    """What takes too long for tests/test_docs.py is in sh, not in bash: recipes, which others test, and options."""
    lines = [line for _, text in blocks("sh") for line in text.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line, comments=True) for line in lines]
    commands = [words for words in found if words[:1] == ["secateur"]]
    assert commands
    for words in commands:
        if words[1] == "run":
            assert (ROOT / words[2]).parent == ROOT / "examples" / "recipes"
            assert (ROOT / words[2]).exists(), words
        assert main([words[1], "--help"]) == 0
        text = capsys.readouterr().out
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"{option}\b", text), f"{words[1]} has no {option}"


def test_no_page_is_unfinished() -> None:
    for page in DOCS.rglob("*.md"):
        assert "TODO" not in page.read_text(), page.name
