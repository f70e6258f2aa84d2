"""What every test runs under, one thread, so that a shared machine stays usable; and commands run in this process."""

import gc
from collections.abc import Callable, Generator

import pytest
import torch

from secateur.cli import main


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """What is left after a module stays: the garbage collector need not go through all of it again in each test."""
    result = yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()
    return result


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first: at the end they would keep one worker alone."""
    first = ("test_docs.py", "test_recipes_shipped.py")
    items.sort(key=lambda item: item.path.name not in first)


def pytest_collection_finish() -> None:
    """The same after the imports."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must succeed; returns what it prints."""

    def run(*words: object) -> str:
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; returns its one line."""

    def run(*words: object) -> str:
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err

    return run
