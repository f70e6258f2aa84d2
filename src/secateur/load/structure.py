"""The classes of Hugging Face models that were cut beyond what a stock config describes."""

import functools
import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.load import modeling_secateur
from secateur.load.modeling_secateur import CutConfig, CutModel

FORMAT = 1
MODELING = "modeling_secateur.py"
OWN_TYPE = "secateur_"
"""What stands before the stock model type in the type of a cut model."""


def stock_class(kind: type) -> type | None:
    """The class itself, or the one under it, that is transformers' own; None where only a user's class is."""
    if getattr(kind, "is_secateur_model", False) or issubclass(kind, CutConfig):
        return next(base for base in kind.__mro__ if base.__module__.startswith("transformers."))
    return kind if kind.__module__.startswith("transformers.") else None


@functools.cache
def cut_classes(stock: Any, stock_config: Any) -> tuple[Any, Any]:
    """The config class and the model class of a cut model, as `modeling_file` defines them.

    Args:
        stock: transformers' model class.
        stock_config: and its config class.
    """

    def save_pretrained(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        stock.save_pretrained(self, save_directory, *args, **kwargs)
        Path(save_directory, MODELING).write_text(modeling_file(stock, stock_config), encoding="utf-8")

    config = type(
        f"Secateur{stock_config.__name__}",
        (CutConfig, stock_config),
        {
            "__doc__": CutConfig.__doc__,
            "__module__": __name__,
            "__init__": CutConfig.__init__,  # a config class without one of its own is given one
            "model_type": f"{OWN_TYPE}{stock_config.model_type}",
        },
    )
    body = {
        "__doc__": CutModel.__doc__,
        "__module__": __name__,
        "config_class": config,
        "save_pretrained": save_pretrained,
    }
    model = type(f"Secateur{stock.__name__}", (CutModel, stock), body)
    return config, model


def modeling_file(stock: Any, stock_config: Any) -> str:
    """The text of the file that stock transformers runs to load a cut model: it needs torch and transformers alone."""
    text = inspect.getsource(modeling_secateur)
    text = re.sub(r"  # (type: ignore|noqa).*", "", text)
    imports = [f"from {kind.__module__} import {kind.__name__}" for kind in (stock_config, stock)]
    text = text.replace("from torch import nn\n", "from torch import nn\n" + "\n".join(sorted(imports)) + "\n", 1)
    config, model = (kind.__name__ for kind in cut_classes(stock, stock_config))
    return f'''{text}

class {config}(CutConfig, {stock_config.__name__}):
    """{stock_config.__name__} with the sizes of the pruned model."""

    model_type = "{OWN_TYPE}{stock_config.model_type}"  # without this file, transformers refuses to load the folder
    __init__ = CutConfig.__init__


class {model}(CutModel, {stock.__name__}):
    """{stock.__name__} without what was cut."""

    config_class = {config}
'''


def recorded_classes(config: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """The config class and the model class for the content of a config.json, where it is of a cut model.

    Nothing of the folder is run: the classes are Secateur's own, over those of the installed transformers.

    Raises:
        SecateurError: The record is of another format, or names no class of transformers.
    """
    record = config.get("secateur")
    if not isinstance(record, Mapping):
        return None
    if record.get("format") != FORMAT:
        raise SecateurError(f"config.json: the structure is of format {record.get('format')}, and not of {FORMAT}")
    stock, stock_config = (_transformers_class(str(record.get(key))) for key in ("model", "config_class"))
    return cut_classes(stock, stock_config)


def class_path(kind: type) -> str:
    """``module:class``, as `recorded_classes` reads it."""
    return f"{kind.__module__}:{kind.__qualname__}"


def _transformers_class(path: str) -> type:
    module, _, name = path.partition(":")
    found = None
    if module.startswith("transformers."):
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            found = None
    if not isinstance(found, type):
        raise SecateurError(f"config.json: {path} is no class of the installed transformers; update transformers")
    return found
