"""Load saved folders the way a user does, in a process without secateur, and compare the outputs.

``python reload.py FOLDER`` prints one JSON line for each ``*.expect`` beside a saved model.
"""

import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for expect in sorted(folder.glob("*.expect"), key=lambda e: not e.name.startswith("plain+")):
        saved = expect.with_suffix("")
        try:
            message = _difference(saved, expect)
        except Exception as error:  # noqa: BLE001  # the report is the purpose
            message = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error) else ''}"
        sys.stdout.write(json.dumps({"name": saved.name, "message": message}) + "\n")
        sys.stdout.flush()


def _difference(saved: Path, expect: Path) -> str:
    """What is wrong with the model that comes back; empty when nothing is."""
    from outputs import outputs

    about = json.loads((expect / "about.json").read_text())
    model = _loaded(saved, about).eval()
    tensors = {k.removeprefix("in:"): v for k, v in load_file(expect / "inputs.safetensors").items()}
    given: Any = {**tensors, **about["rest"]}
    if about["positional"]:
        given = tuple(given[str(i)] for i in range(len(given)))
    wanted = load_file(expect / "outputs.safetensors")
    with torch.no_grad():
        got = outputs(model, given)
    for i, value in enumerate(got):
        if value.shape != wanted[str(i)].shape:
            return f"output {i} is {list(value.shape)}, it was {list(wanted[str(i)].shape)}"
        most = float(wanted[str(i)].abs().max()) if value.numel() else 0.0
        if not torch.allclose(value, wanted[str(i)], rtol=0, atol=1e-5 * most, equal_nan=True):  # parts are in float32
            return f"output {i} differs by {float((value - wanted[str(i)]).abs().max()):.1e}"
    return ""


def _loaded(saved: Path, about: dict[str, Any]) -> Any:
    config = json.loads((saved / "config.json").read_text()) if (saved / "config.json").exists() else {}
    if saved.name.startswith("plain+"):
        import secateur

        return _first(secateur.load(saved))
    for name in [n for n in sys.modules if n.partition(".")[0] == "secateur"]:
        del sys.modules[name]
    sys.modules["secateur"] = None  # type: ignore[assignment]  # stock transformers must do without; plain ones are done
    import transformers
    import transformers_zoo  # noqa: F401  # experts in float64

    own = getattr(transformers, about["class"], None)
    if own is not None and not config.get("auto_map"):
        return own.from_pretrained(saved, dtype="auto")
    for kind in config.get("auto_map", {}):
        if kind != "AutoConfig":
            return getattr(transformers, kind).from_pretrained(saved, trust_remote_code=True, dtype="auto")
    return importlib.import_module("transformers").AutoModel.from_pretrained(saved, trust_remote_code=True)


def _first(loaded: Any) -> Any:
    """The model, of those that come with more."""
    return loaded[0] if isinstance(loaded, tuple) else loaded


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
