"""What a recipe says, and where it says it: values with their lines, overrides, and all that is wrong with them."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from secateur.errors import SecateurError, nearest

Where = tuple[str | int, ...]
"""Keys and indices that lead to a value."""
_EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")


class Sheet:
    """The values of a recipe, the places they stand at, and the problems found until now.

    Attributes:
        name: What to call the recipe in errors.
        values: The whole mapping.
    """

    def __init__(self, source: str | Path | Mapping[str, Any]) -> None:
        """Read a file, or take a mapping of the same form.

        Raises:
            SecateurError: There is no such file, or it is no YAML.
        """
        self._places: dict[Where, str] = {}
        self._problems: list[tuple[Where | None, str]] = []
        self._lined = not isinstance(source, Mapping)
        if isinstance(source, Mapping):
            self.name = "the recipe"
            self.values: dict[Any, Any] = copy.deepcopy(dict(source))
            return
        self.name = str(source)
        read = self._parsed(_text(Path(source)))
        if not isinstance(read, dict):
            raise SecateurError(f"{source}: a recipe is a mapping (model: ..., out: ..., steps: ...), not {read!r}")
        self.values = read

    def at(self, where: Where) -> Any:
        """The value at a place."""
        found: Any = self.values
        for key in where:
            found = found[key]
        return found

    def problem(self, where: Where | None, text: str) -> None:
        """Note that something is wrong with the value at a place; None = with no value of the recipe."""
        if (where, text) not in self._problems:
            self._problems.append((where, text))

    @property
    def sound(self) -> bool:
        """Whether no problem was found until now."""
        return not self._problems

    def check(self) -> None:
        """Raise one SecateurError that tells all problems, in the order of the recipe."""
        order: dict[Where | None, int] = {where: i for i, where in enumerate(self._places)}
        found = sorted(self._problems, key=lambda problem: order.get(self._known(problem[0]), len(order)))
        lines = [text if where is None else f"{self._place(where)}: {text}" for where, text in found]
        if len(lines) == 1:
            raise SecateurError(f"{self.name}, {lines[0]}")
        if lines:
            raise SecateurError("\n  ".join([f"{self.name} has {len(lines)} problems", *lines]))

    def override(self, path: str, value: Any) -> None:
        """Set one value: of a key at the top, of ``steps.N.option``, or ``steps.N.steps.M.option`` in a repeat, from 1.

        What stands above the last key must be there; the last key may be new, and is checked as all keys are.
        """
        keys = path.split(".")
        where: Where = ()
        try:
            while keys[0] == "steps" and len(keys) > 1 and where[-1:] in ((), ("repeat",)):
                where, keys = self._step(where, keys), keys[2:]
            for key in keys[:-1]:
                node = self._mapping(where)
                if key not in node:
                    raise SecateurError(f"there is no {key!r} to set something in{nearest(key, map(str, node))}")
                where = (*where, key)
            self._mapping(where)[keys[-1]] = value
        except SecateurError as error:
            self.problem(None, f"--set {path}: {error}")
            return
        where = (*where, keys[-1])
        self._places = {place: at for place, at in self._places.items() if place[: len(where)] != where}
        self._places[where] = f"--set {path}"

    def override_text(self, text: str) -> None:
        """Set what ``a.b=value`` says; the value is read as YAML."""
        path, sign, value = text.partition("=")
        if not sign or not path:
            self.problem(None, f"--set {text}: must read PATH=VALUE, such as steps.1.steps=3")
            return
        own = Sheet({})
        own.name = f"--set {path}"
        try:
            read = own._parsed(value)
            own.check()
        except SecateurError as error:
            self.problem(None, str(error))
            return
        self.override(path, read)

    def _mapping(self, where: Where) -> dict[Any, Any]:
        node = self.at(where)
        if not isinstance(node, dict):
            raise SecateurError(f"{where[-1]} is {node!r}, and has no parts to set")
        return node

    def _step(self, above: Where, keys: list[str]) -> Where:
        """Where the options of step N stand, of the whole recipe or of a repeat."""
        steps = self.at(above).get("steps")
        count = len(steps) if isinstance(steps, list) else 0
        number = int(keys[1]) if keys[1].isdecimal() else 0
        if not 1 <= number <= count:
            inside = " of that repeat" if above else ""
            raise SecateurError(f"there is no step {keys[1]!r}{inside}; they are numbered from 1 to {count}")
        step = self.at((*above, "steps", number - 1))
        if len(keys) < 3 or not isinstance(step, dict) or len(step) != 1:
            raise SecateurError(f"give an option of step {number}, such as steps.{number}.budget")
        name = next(iter(step))
        step[name] = {} if step[name] is None else step[name]
        if name == "repeat" and not isinstance(step[name], dict):
            raise SecateurError(f"repeat is {step[name]!r}, and has no parts to set")
        return (*above, "steps", number - 1, name)

    def _known(self, where: Where | None) -> Where | None:
        """The place itself, or the nearest one above it that is known; None if there is none."""
        while where and where not in self._places:
            where = where[:-1]
        return where if where in self._places else None

    def _place(self, where: Where) -> str:
        known = self._known(where)
        if known is not None and (known or self._lined):
            return self._places[known]
        # A mapping has no lines; steps are counted from 1, as in overrides.
        return ".".join(str(key + 1) if isinstance(key, int) else str(key) for key in where) or "the top"

    def _parsed(self, text: str) -> Any:
        """The value of a YAML text; its lines are noted."""
        name, loader = self.name, yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else self._value(loader, node, ())
        except yaml.MarkedYAMLError as error:
            line = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
            raise SecateurError(f"{name}{line}: this is no YAML ({error.problem or error.context})") from error
        except (yaml.YAMLError, ValueError) as error:  # control characters; a date such as 2026-99-99
            raise SecateurError(f"{name}: this is no YAML ({' '.join(str(error).split())})") from error
        except RecursionError as error:
            raise SecateurError(f"{name}: a value of this YAML holds itself") from error
        finally:
            loader.dispose()

    def _value(self, loader: yaml.SafeLoader, node: yaml.Node, where: Where) -> Any:
        self._places.setdefault(where, f"line {node.start_mark.line + 1}")
        if isinstance(node, yaml.MappingNode):
            return dict(self._entries(loader, node, where))
        if isinstance(node, yaml.SequenceNode):
            return [self._value(loader, part, (*where, i)) for i, part in enumerate(node.value)]
        text = str(node.value)
        if isinstance(node, yaml.ScalarNode) and node.style is None and _EXPONENT.fullmatch(text):
            return float(text)  # 1e-3 is a number to everybody but YAML 1.1
        return loader.construct_object(node)

    def _entries(self, loader: yaml.SafeLoader, node: yaml.MappingNode, where: Where) -> Iterator[tuple[str, Any]]:
        first: dict[str, str] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), f"line {key_node.start_mark.line + 1}"
            if key in first:
                self.problem((*where, key), f"{key} is given twice, at {first[key]} and {line}")
                continue
            self._places[(*where, key)] = first[key] = line
            yield key, self._value(loader, value_node, (*where, key))


def overridden(sheet: Sheet, overrides: Iterable[str] | Mapping[str, Any]) -> None:
    """Apply texts ``a.b=value``, or path -> value."""
    if isinstance(overrides, Mapping):
        for path, value in overrides.items():
            sheet.override(path, copy.deepcopy(value))
        return
    for text in [overrides] if isinstance(overrides, str) else overrides:
        sheet.override_text(text)


def _text(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except FileNotFoundError as error:
        beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise SecateurError(f"{path}: no such recipe{nearest(path.name, beside) if beside else ''}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SecateurError(f"{path}: cannot be read as a recipe ({error})") from error
