"""2:4 weights for the sparse tensor cores of NVIDIA GPUs, in memory: which fit, which stay dense and why.

There is no file of it: how torch packs a weight depends on the backend and on the GPU, and a packed tensor is no
checkpoint. The dense file with its zeros is what is kept; `to_semi_structured` packs it after loading, in moments.
"""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError, nearest
from secateur.measure.latency import time_models
from secateur.progress import Track, quiet
from secateur.ship.example import Example, without_cache
from secateur.ship.proof import Agreement
from secateur.space.trace import Inputs

BACKENDS = ("cusparselt", "cutlass")
NEEDS = "2:4 kernels need an NVIDIA GPU of Ampere or newer"


@dataclass(frozen=True)
class SemiStructured:
    """Which weights run on sparse tensor cores.

    Attributes:
        backend: cusparselt or cutlass.
        converted: weights that are packed (of a plan: that will be), by name.
        left: weights that stay dense, with the reason.
        bytes_before: of the weights that are converted.
        bytes_after: of the same, packed: the kept half, and two bits for each.
    """

    backend: str
    converted: list[str]
    left: dict[str, str]
    bytes_before: int
    bytes_after: int


def plan_semi_structured(model: nn.Module, *, backend: str = "cusparselt") -> SemiStructured:
    """Which weights the 2:4 kernels of torch can take. It needs no GPU, and changes nothing.

    Args:
        model: any module, with values.
        backend: cusparselt (NVIDIA's library), or cutlass (kernels that torch brings along, for compute capability
            8.x).

    Raises:
        SecateurError: for another backend.
    """
    constraints = _constraints(backend)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    converted: list[str] = []
    left: dict[str, str] = {}
    before = after = 0
    seen: set[int] = set()
    for path, module in model.named_modules():
        for leaf, weight in module.named_parameters(recurse=False):
            if weight.dim() < 2 or id(weight) in seen:
                continue
            seen.add(id(weight))
            name = f"{path}.{leaf}" if path else leaf
            others = [other for other in owners[id(weight)] if other != name]
            reason = _why_not(module, leaf, weight, others, constraints, backend)
            if reason is None:
                size = weight.numel() * weight.element_size()
                converted.append(name)
                before += size
                after += size // 2 + weight.numel() // 8 * (2 if weight.dtype == torch.float32 else 1)
            else:
                left[name] = reason
    return SemiStructured(backend, converted, left, before, after)


def to_semi_structured(model: nn.Module, *, backend: str = "cusparselt") -> SemiStructured:
    """Pack every 2:4 weight that fits, in place; the model then runs forward only, on that GPU.

    Args:
        model: on an NVIDIA GPU, in float16 or bfloat16 (cutlass: float32 too, of which every second number is zero).
        backend: cusparselt (NVIDIA's library), or cutlass (kernels that torch brings along, for compute capability
            8.x).

    Raises:
        SecateurError: for another backend; there is no such GPU, or the model is not on it; no weight fits.
    """
    plan = plan_semi_structured(model, backend=backend)
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    require_sparse_gpu(place, backend)
    if not plan.converted:
        some = "; ".join(f"{name}: {reason}" for name, reason in list(plan.left.items())[:3])
        raise SecateurError(f"{type(model).__name__} has no weight that 2:4 kernels could take ({some})")
    kind = _tensor_class(backend)
    for name in plan.converted:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # that the API is a prototype
            packed = kind.from_dense(getattr(owner, leaf).detach().contiguous())
        setattr(owner, leaf, nn.Parameter(packed, requires_grad=False))
    return plan


def try_semi_structured(
    model: nn.Module,
    inputs: Inputs,
    *,
    backend: str = "cusparselt",
    repeats: int = 20,
    seed: int = 0,
    track: Track = quiet,
) -> tuple[nn.Module, SemiStructured, dict[str, Any]]:
    """A packed copy of a model beside the dense one: how far apart their results are, and how long they take.

    Args:
        model: as for `to_semi_structured`; it stays as it is.
        inputs: arguments of one forward pass; None = made for a Hugging Face model.
        backend: cusparselt or cutlass.
        repeats: samples of each time, taken in turns.
        seed: of the random inputs.
        track: shows progress.

    Returns:
        the packed copy; what was packed; and ``inputs`` (shapes), ``max_abs_error``, ``max_rel_error`` (of the largest
        value), ``dense`` and ``sparse`` (median, low and high quartile in seconds), ``speedup``.

    Raises:
        SecateurError: as `to_semi_structured`; or the results differ by more than 16-bit floats explain.
    """
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    name = require_sparse_gpu(place, backend)
    given = Example.of(model, inputs, dynamic=False)
    example = given.fresh({}, torch.Generator().manual_seed(seed))
    sparse = copy.deepcopy(model)
    told = to_semi_structured(sparse, backend=backend)
    agreement = Agreement(model, "the packed model", 2e-2)
    leaves: list[list[torch.Tensor]] = []
    for one in (model, sparse):
        with without_cache(one):
            found = pytree.tree_leaves(one(**example, **given.constants))
            leaves.append([x for x in found if isinstance(x, torch.Tensor)])
    for index, (ours, theirs) in enumerate(zip(*leaves, strict=True)):
        agreement.add(f"output {index}", ours, theirs, example.get("attention_mask"))
    dense_time, sparse_time = time_models([model, sparse], example, repeats=repeats, track=track)
    measured = {
        "device": name,
        "inputs": {key: list(value.shape) for key, value in example.items()},
        "max_abs_error": agreement.largest,
        "max_rel_error": agreement.relative,
        "dense": asdict(dense_time),
        "sparse": asdict(sparse_time),
        "speedup": dense_time.median / sparse_time.median,
    }
    return sparse, told, measured


def require_sparse_gpu(device: torch.device | str, backend: str = "cusparselt") -> str:
    """Check that a device has sparse tensor cores that torch can use; returns its name.

    Args:
        device: where the weights are.
        backend: what will run them.

    Raises:
        SecateurError: it has none, with what torch says.
    """
    _constraints(backend)
    place = torch.device(device)
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device is available"
        raise SecateurError(f"{NEEDS}; torch says: {built}")
    if torch.version.cuda is None:
        raise SecateurError(f"{NEEDS}; torch says: this is ROCm {torch.version.hip}")
    if place.type != "cuda":
        raise SecateurError(f"{NEEDS}, and the model is on {place}: move it there (--device cuda)")
    name, capability = torch.cuda.get_device_name(place), torch.cuda.get_device_capability(place)
    if capability < (8, 0):
        shown = ".".join(map(str, capability))
        raise SecateurError(f"{NEEDS} (compute capability 8.0); torch says: {name} has {shown}")
    if backend == "cutlass" and capability[0] != 8:
        shown = ".".join(map(str, capability))
        raise SecateurError(f"torch has CUTLASS kernels for compute capability 8.x alone, and {name} has {shown}: "
                            "take the backend cusparselt")  # fmt: skip
    if backend == "cusparselt" and not torch.backends.cusparselt.is_available():
        raise SecateurError("this torch is built without cuSPARSELt: take the backend cutlass")
    return name


def _tensor_class(backend: str) -> Any:
    """The class of tensors; called itself, because `torch.sparse.to_sparse_semi_structured` chooses by a global."""
    if backend not in BACKENDS:
        raise SecateurError(f"there is no backend {backend!r} for 2:4{nearest(backend, BACKENDS)}")
    cutlass = backend == "cutlass"
    return (
        torch.sparse.SparseSemiStructuredTensorCUTLASS if cutlass else torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    )


def _constraints(backend: str) -> Mapping[torch.dtype, Any]:
    """Type of numbers -> the smallest sizes that it is made for, as torch has them."""
    found: Mapping[torch.dtype, Any] = _tensor_class(backend)._DTYPE_SHAPE_CONSTRAINTS
    return found


def _why_not(
    module: nn.Module,
    leaf: str,
    weight: torch.Tensor,
    others: list[str],
    constraints: Mapping[torch.dtype, Any],
    backend: str,
) -> str | None:
    """Why a weight stays dense; None where it fits."""
    kind = type(module).__name__
    if type(module) is not nn.Linear or leaf != "weight":
        return f"{leaf} of a {kind}: torch has 2:4 kernels for nn.Linear alone"
    if others:
        return f"is {others[0]} too, which reads it otherwise"
    if weight.dtype not in constraints or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        known = [t for t in (torch.float16, torch.bfloat16, torch.float32) if t in constraints]
        return f"{_short(weight.dtype)}: {backend} takes {', '.join(map(_short, known))}"
    limits = constraints[weight.dtype]
    rows, columns = weight.shape
    for what, size, least in (("outputs", rows, limits.sparse_min_rows), ("inputs", columns, limits.sparse_min_cols)):
        if size % least:
            return f"{size} {what} are no multiple of {least}"
    n, m = (1, 2) if weight.dtype == torch.float32 else (2, 4)
    broken = float(((weight.detach().reshape(-1, m) != 0).sum(1) > n).float().mean())
    if broken:
        return f"not {n}:{m}: {100 * broken:.3g}% of the groups of {m} hold more than {n} numbers"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
