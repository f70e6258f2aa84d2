"""The house plan, enforced: who may import whom, what an import costs, how long a file may be."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
PACKAGE = SRC / "secateur"
# Data flows down this list, so a room may import the ones before it.
ROOMS = ["load", "space", "score", "choose", "cut", "mend", "train", "measure", "ship"]
LEAVES = ["errors", "progress", "files", "world"]
ABOVE = ["", "__main__", "walk", "methods", "recipe", "report", "cli"]  # "" is the package's __init__
KNOWN = {*ROOMS, *LEAVES, *ABOVE}
EXTRAS = ["transformers", "datasets", "pyarrow", "tokenizers", "matplotlib", "jinja2", "onnx", "openvino", "lm_eval"]
EXTRAS += ["lightning", "accelerate", "tensorboard", "peft", "wandb", "onnxruntime", "onnxscript", "mkdocs", "megatron"]
MAX_FILE, MAX_FUNCTION = 500, 80


def python(code: str, *args: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that sees src/ first; `more` is for its environment."""
    env = {**os.environ, "PYTHONPATH": str(SRC), **more}
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=env, check=False)


def module_name(path: Path, root: Path = SRC) -> str:
    """Return ``secateur.space.trace`` for ``src/secateur/space/trace.py``."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def part(module: str) -> str:
    """Return the room, leaf or upper module that `module` belongs to; "" is the package itself."""
    return module.split(".")[1] if "." in module else ""


# Who may import whom


def imported(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield (line, part of secateur) for every import in `source`, at any depth, relative ones too."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *filter(None, [node.module])])
            # `from secateur import space` imports the room; any other name is the package's own.
            names = [f"{target}.{a.name}" if target == "secateur" and a.name in KNOWN else target for a in node.names]
        else:
            continue
        yield from ((node.lineno, part(name)) for name in names if name.split(".")[0] == "secateur")


def offences(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return one line for every import in `source` that the house plan forbids to `module`."""
    here = part(module)
    if here in ABOVE:
        return []
    if here in LEAVES:
        allowed = LEAVES[: LEAVES.index(here) + 1]
    elif here in ROOMS:
        allowed = [*ROOMS[: ROOMS.index(here) + 1], *LEAVES]
    else:
        return [f"{module}: {here!r} is no room of the house plan"]
    found = imported(source, module, is_package)
    return [f"{module}:{line} imports {to or 'secateur'!r}" for line, to in found if to not in allowed]


def test_no_module_imports_against_the_flow() -> None:
    found = [o for m, p in MODULES.items() for o in offences(p.read_text("utf8"), m, p.name == "__init__.py")]
    assert MODULES
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        ("secateur.score.taylor", "from secateur.choose.budget import Budget", 1),
        ("secateur.score.taylor", "import secateur.choose.budget as b", 1),
        ("secateur.score.taylor", "import torch, secateur.ship", 1),
        ("secateur.score.taylor", "from ..choose import budget", 1),
        ("secateur.score.taylor", "from .. import choose", 1),
        ("secateur.score.taylor", "from secateur import space, choose, errors", 1),
        ("secateur.score.taylor", "def f():\n    if 1:\n        from secateur import prune", 1),
        ("secateur.score.taylor", "import secateur", 1),
        ("secateur.score.taylor", "from secateur.walk import walk\nfrom secateur.cli import main", 2),
        ("secateur.score.taylor", "from secateur.helpers import f", 1),
        ("secateur.score.taylor", "from secateur.space import Axis\nfrom . import norms\nfrom ..errors import E", 0),
        ("secateur.score.taylor", "import torch\nfrom secateurs import x", 0),
        ("secateur.score.__init__", "from .taylor import f", 0),
        ("secateur.errors", "from secateur.progress import quiet", 1),
        ("secateur.errors", "import secateur.space", 1),
        ("secateur.files", "from secateur.errors import SecateurError", 0),
        ("secateur.files", "from secateur.load import data", 1),
        ("secateur.helpers", "", 1),
        ("secateur.walk", "from secateur.ship import save", 0),
        ("secateur.methods.minitron", "from secateur import cut", 0),
        ("secateur", "from secateur.ship import save", 0),
    ],
)
def test_the_import_check_sees_every_form_of_import(module: str, source: str, count: int) -> None:
    is_package = module.endswith(".__init__")
    assert len(offences(source, module.removesuffix(".__init__"), is_package)) == count


# What an import costs

IMPORT_COST = """
import time, sys, torch
began = time.process_time()
import secateur
print(time.process_time() - began, *(name for name in sys.argv[1:] if name in sys.modules))
"""


def test_importing_the_package_is_quick_and_loads_no_extra(tmp_path: Path) -> None:
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}  # as in any installation
    seconds = []
    for _ in range(3):  # the first one compiles
        done = python(IMPORT_COST, *EXTRAS, **compiled)
        assert done.returncode == 0, done.stderr
        took, *loaded = done.stdout.split()
        assert not loaded
        seconds.append(float(took))
    assert min(seconds) < 0.3


# What the core needs

IMPORT_WITHOUT = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in sys.argv[1].split(','):
            raise ModuleNotFoundError(f'{name} is not a core dependency', name=name)

sys.meta_path.insert(0, Blocked())
for name in sys.argv[2].split(','):
    importlib.import_module(name)
"""


def test_every_module_imports_with_the_core_dependencies_alone() -> None:
    modules = [m for m in MODULES if not m.endswith("__main__")]
    done = python(IMPORT_WITHOUT, ",".join([*EXTRAS, "pytest", "hypothesis"]), ",".join(modules))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["transformers", "pyarrow.parquet", "tokenizers"])
def test_the_core_check_sees_an_extra(name: str) -> None:
    done = python(IMPORT_WITHOUT, ",".join(EXTRAS), name)
    assert done.returncode != 0
    assert "is not a core dependency" in done.stderr


# How long things may be


def too_long(source: str, name: str) -> list[str]:
    """Return one line for a file of 500 lines or more, and for every function of 80 lines or more."""
    lines = len(source.splitlines())
    found = [f"{name}: {lines} lines"] if lines >= MAX_FILE else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length >= MAX_FUNCTION:
                found.append(f"{name}:{node.lineno} {node.name}: {length} lines")
    return found


def test_files_and_functions_are_short() -> None:
    paths = [p for folder in (SRC, ROOT / "tests") for p in sorted(folder.rglob("*.py"))]
    found = [o for p in paths for o in too_long(p.read_text("utf8"), str(p.relative_to(ROOT)))]
    assert not found, "\n".join(found)


def test_the_length_check_sees_long_files_and_functions() -> None:
    assert too_long("x = 1\n" * 499, "f") == []
    assert too_long("x = 1\n" * 500, "f") == ["f: 500 lines"]
    assert too_long("class C:\n    def m(self):\n" + "        x = 1\n" * 78, "f") == []
    assert too_long("class C:\n    def m(self):\n" + "        x = 1\n" * 79, "f") == ["f:2 m: 80 lines"]
