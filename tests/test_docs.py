"""Every Python block and every secateur command of the README and of docs/ runs."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from secateur.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Enough to run every step of a command; the documented ones take the whole of the calibration data.
SMALL = {
    "prune": ["--samples", "16", "--score-samples", "4", "--top-k", "2"],
    "eval": ["--samples", "8"],
    "inspect": [],
    "stats": [],
    "apply": [],
    "run": [],
    "profile": ["--levels", "2", "--repeats", "2"],
    "survey": ["--samples", "16"],
    "distill": ["--samples", "16", "--eval-every", "99"],
    "sensitivity": ["--samples", "2"],
    "check": ["--samples", "8"],
    "advise": [],
    "bench": [],
    "export": [],
    "report": [],
    "compare": [],
}
SHORT = {"--tokens": "4k", "--epochs": "1"}  # what commands say themselves, and would take too long
OPTIONS_OF_MINITRON = ("--score-samples", "4", "--top-k", "2")


def blocks(language: str) -> list[tuple[str, str]]:
    """(where, text) of every block in a language."""
    found = []
    for page in PAGES:
        matches = [m for m in BLOCK.finditer(page.read_text()) if m[1] == language]
        found += [(f"{page.name}-{i}", m[2]) for i, m in enumerate(matches)]
    return found


def commands() -> list[tuple[str, list[str]]]:
    """(where, words) of every secateur command, in the order of the pages."""
    found = []
    for where, text in blocks("bash"):
        lines = text.replace("\\\n", " ").replace("\n    --", " --").splitlines()
        found += [(where, shlex.split(line, comments=True)) for line in lines if line.startswith("secateur ")]
    return found


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the paths of the docs are right and results do no harm."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture(autouse=True)
def _there(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and commands run in this process: importing torch anew for each took most of the time."""
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(workplace))


def test_commands_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert {words[1] for _, words in commands()} == set(SMALL)
    for where, words in commands():
        minitron = ("--method" not in words or "minitron" in words) and "--no-measure" not in words
        small = [w for w in SMALL[words[1]] if minitron or w not in OPTIONS_OF_MINITRON]
        pairs = zip(small[::2], small[1::2], strict=True)  # what a command says itself stays
        small = [w for option, value in pairs if option not in words for w in (option, value)]
        said = [SHORT.get(option, word) for option, word in pairwise(words)]
        code = main([*said, *small])
        assert code == 0, f"{where}: {shlex.join(words)}: {capsys.readouterr().err}"


@pytest.mark.parametrize(("where", "text"), blocks("python"), ids=[where for where, _ in blocks("python")])
def test_python_block_runs(where: str, text: str) -> None:
    exec(compile(text, where, "exec"), {"__name__": where})


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
