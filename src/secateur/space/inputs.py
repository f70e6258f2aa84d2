"""Inputs for one forward pass of any Hugging Face model, read off its forward signature and its config."""

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.load.megatron import Opened
from secateur.load.mode import evaluating

_PRIMES = (13, 11, 17, 7, 19, 23, 29, 31, 37, 41, 43)
_LONGER = (*_PRIMES, *(n for n in range(47, 1400, 2) if all(n % d for d in range(3, 38, 2))))
_SOUND = ("input_features", "input_values", "audio_values")
_PIXELS = ("pixel_values", "pixel_values_videos", "flattened_patches")
_PLACEHOLDERS = ("image_token_id", "image_token_index", "img_token_id", "image_patch_id", "media_placeholder_token_id")


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for one forward pass of a Hugging Face model, on the model's device.

    Batch and sequence lengths are primes that divide no dimension of the model, so that no size can be taken for
    another. Where the signature leaves a choice (several modalities, several layouts of sound), each is tried on fake
    tensors and the one that uses most of the model is taken.

    Raises:
        SecateurError: for a model without a config, or whose forward takes arguments that cannot be guessed.
    """
    config = getattr(model, "config", None)
    if isinstance(model, Opened):
        maker = _Maker(model, config)
        return {"input_ids": maker.ids(maker.free[0])}
    if not hasattr(config, "to_dict") or not any(True for _ in model.parameters()):
        raise SecateurError("only Hugging Face models have default inputs: pass `inputs`, a dict of arguments")
    maker = _Maker(model, config)
    with warnings.catch_warnings(), evaluating(model):
        warnings.simplefilter("ignore")
        choices = list(maker.choices())
        if not choices:
            raise SecateurError(f"no default inputs for {type(model).__name__}: pass `inputs`, a dict of arguments")
        plain = next((c for c in choices if set(c) == set(maker.base)), choices[0])
        if len(choices) == 1:
            return maker.finished(plain)
        return next((c for c in map(maker.finished, choices) if _runs(model, c)), maker.finished(plain))


def _runs(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the forward pass takes these inputs, on fake tensors."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    silenced = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        fake = {k: mode.from_tensor(v, static_shapes=True) for k, v in tensors.items()}
        with mode, torch.no_grad():
            model(**{**inputs, **fake})
    except Exception:  # noqa: BLE001  # the model's own code says in its own way that it wants something else
        return False
    finally:
        logging.disable(silenced)
        for module, attributes, buffers in kept:  # a forward pass may keep what it computed
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
    return True


class _Maker:
    """Makes values for the arguments of one model's forward."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.model, self.config = model, config
        self.base: list[str] = []
        self.arguments = dict(inspect.signature(model.forward).parameters)
        self.device = next(model.parameters()).device
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        sizes = {n for p in model.parameters() for n in p.shape}
        self.free = [p for p in _PRIMES if all(n % p for n in sizes)] or list(_PRIMES)
        self.long = [p for p in _LONGER if all(n % p for n in sizes)] or list(_LONGER)
        self.batch = 3 if all(n % 3 for n in sizes) else 5 if self.free[0] != 5 else 3
        self.makers: dict[str, Callable[[], Iterator[torch.Tensor]]] = {
            "input_ids": lambda: iter([self.ids(self.free[0])]),
            "decoder_input_ids": lambda: iter([self.ids(self.free[1 % len(self.free)])]),
            "qformer_input_ids": lambda: iter([self.ids(self.free[0])]),
            "inputs": self.any_input,
            "pixel_values": self.images,
            "pixel_values_videos": self.videos,
            "flattened_patches": self.patches,
            "input_features": self.features,
            "input_values": self.sound,
            "audio_values": self.sound,
            "bbox": lambda: iter([self.zeros(self.batch, self.free[0], 4, dtype=torch.long)]),
            "image_grid_thw": self.grid,
            "grid_thw": self.grid,
            "spatial_shapes": self.shapes,
            "past_values": self.series,
            "past_observed_mask": self.series,
        }

    # --- which arguments ---

    def choices(self) -> Iterator[dict[str, Any]]:
        """Sets of arguments, the one that uses most of the model first."""
        main = getattr(self.model, "main_input_name", None)
        first = next(iter(self.arguments), None)
        known = [n for n in self.arguments if n in self.makers]
        primary = main if isinstance(main, str) and main in known else first if first in known else None
        required = [n for n, p in self.arguments.items() if p.default is p.empty and p.kind not in _VARIADIC]
        if any(n not in self.makers for n in required):
            return
        decoder = ["decoder_input_ids"] if getattr(self.config, "is_encoder_decoder", False) else []
        base = [n for n in dict.fromkeys([primary or "", *required, *decoder]) if n in known]
        others = [n for n in known if n in (*_PIXELS, *_SOUND, "input_ids", "bbox") and n not in base]
        if "pixel_values" in known:
            others = [n for n in others if n != "pixel_values_videos"]
        self.base = base
        for names in dict.fromkeys(map(tuple, _subsets(base, others))):
            yield from self.filled(names)

    def filled(self, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """Every way to fill these arguments."""
        results: list[dict[str, Any]] = [{}]
        for name in names:
            results = [{**r, name: value} for r in results for value in self.makers[name]()]
        token = next((t for n in _PLACEHOLDERS if isinstance(t := getattr(self.config, n, None), int)), None)
        for result in results:
            if token is not None and "input_ids" in result and "pixel_values" in result:
                yield from self.with_placeholders(result, token)
            else:
                yield result

    def with_placeholders(self, inputs: dict[str, Any], token: int) -> Iterator[dict[str, Any]]:
        """Token ids with as many image tokens as the model makes features of an image."""
        sized: list[dict[str, Any]] = [{}]
        if "image_sizes" in self.arguments:
            size = inputs["pixel_values"].shape[-2:]
            sized.append({"image_sizes": torch.tensor([list(size)] * self.batch, device=self.device)})
        for extra in sized:
            count = self.image_features({"pixel_values": inputs["pixel_values"], **extra})
            if count is None or count % self.batch:
                continue
            count //= self.batch
            ids = self.ids(next((n for n in self.long if n >= count + 5), count + 6))
            ids[:, 2 : 2 + count] = token
            yield {**inputs, "input_ids": ids, **extra}

    def image_features(self, inputs: dict[str, Any]) -> int | None:
        """Rows of embeddings that the model makes of these images."""
        from torch._subclasses import FakeTensorMode

        inner: Any = next((m for m in self.model.modules() if hasattr(m, "get_image_features")), None)
        if inner is None:
            return None
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        wanted = inspect.signature(inner.get_image_features).parameters
        try:
            with mode, torch.no_grad():
                fake = {k: mode.from_tensor(v, static_shapes=True) for k, v in inputs.items() if k in wanted}
                result: Any = inner.get_image_features(**fake)
        except Exception:  # noqa: BLE001  # the model's own code
            return None
        result = getattr(result, "pooler_output", None) if hasattr(result, "keys") else result
        parts = [result] if isinstance(result, torch.Tensor) else list(result or [])
        return sum(prod(part.shape[:-1]) for part in parts) or None

    def finished(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs and, where it is accepted, the wish for no cache: a model that passes arguments on accepts it."""
        passes_on = any(p.kind is p.VAR_KEYWORD for p in self.arguments.values())
        caches = any(name == "use_cache" and value is True for name, value in _flat(self.config))
        accepted = "use_cache" in self.arguments or (passes_on and caches and "input_ids" in inputs)
        return {**inputs, "use_cache": False} if accepted else inputs

    # --- values ---

    def look(self, *names: str, part: str = "") -> Any:
        """First of these config fields that is set, in the config or in the sub-config named after `part`."""
        subs = [v for k, v in vars(self.config).items() if hasattr(v, "to_dict") and part and part in k]
        others = [v for v in vars(self.config).values() if hasattr(v, "to_dict")]
        for config in (*subs, self.config, *others):
            for name in names:
                value = getattr(config, name, None)
                if value is not None and not isinstance(value, (bool, str)):
                    return value
        return None

    def number(self, *names: str, part: str = "", default: int) -> int:
        """The same, an int."""
        value = self.look(*names, part=part)
        while isinstance(value, (list, tuple)) and value:
            value = value[0]
        return int(value) if value else default

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def ids(self, length: int) -> torch.Tensor:
        """Token ids [batch, length], all of one token that has no special meaning."""
        special = {v for k, v in _flat(self.config) if k.endswith(("_id", "_index")) and isinstance(v, int)}
        plain = next(n for n in range(3, 10_000) if n not in special)
        return torch.full((self.batch, length), plain, dtype=torch.long, device=self.device)

    def square(self) -> tuple[int, int]:
        size = self.look("image_size", "img_size", part="vision") or 64
        if hasattr(size, "get"):
            size = [size.get("height", 64), size.get("width", 64)]
        size = [size, size] if isinstance(size, int) else list(size)
        return int(size[0]), int(size[-1])

    def channels(self) -> int:
        return self.number("num_channels", "in_channels", "in_chans", "num_input_channels", part="vision", default=3)

    def images(self) -> Iterator[torch.Tensor]:
        """[batch, channels, height, width]; with frames or tiles before the channels; or rows of patches."""
        c, (h, w) = self.channels(), self.square()
        frames = self.look("num_frames", "max_num_tiles", part="vision")
        if isinstance(frames, int):
            yield self.zeros(self.batch, frames, c, h, w)
        if "pixel_values" in self.arguments and "image_sizes" in self.arguments:
            yield self.zeros(self.batch, 2, c, h, w)
        yield self.zeros(self.batch, c, h, w)
        if any("grid_thw" in n and p.default is p.empty for n, p in self.arguments.items()):
            yield self.zeros(16 * self.batch, self.patch_row())
        yield self.zeros(self.batch, 1, c, h, w)

    def videos(self) -> Iterator[torch.Tensor]:
        frames = self.number("num_frames", "frames_per_clip", part="vision", default=4)
        yield self.zeros(self.batch, frames, self.channels(), *self.square())

    def patch_row(self) -> int:
        patch = self.number("patch_size", part="vision", default=14)
        return self.channels() * patch**2 * self.number("temporal_patch_size", part="vision", default=1)

    def patches(self) -> Iterator[torch.Tensor]:
        yield self.zeros(self.batch, self.free[0], 2 + self.patch_row())

    def grid(self) -> Iterator[torch.Tensor]:
        yield torch.tensor([[1, 4, 4]] * self.batch, device=self.device)

    def shapes(self) -> Iterator[torch.Tensor]:
        yield torch.tensor([[4, 4]] * self.batch, device=self.device)

    def mels(self) -> int:
        names = ("num_mel_bins", "input_feat_per_channel", "feature_size", "input_feat_size", "mel_dim", "n_mel_bins")
        return self.number("feature_projection_input_dim", *names, "input_dim", part="audio", default=80)

    def features(self) -> Iterator[torch.Tensor]:
        """Spectrograms: [batch, bins, frames] of the length that the positions say, or [batch, frames, bins]."""
        positions = self.look("max_source_positions", part="audio")
        if isinstance(positions, int) and positions < 5000:
            yield self.zeros(self.batch, self.mels(), 2 * positions)
        frames = next((n for n in self.long if n > 64), 67)
        for bins in dict.fromkeys([self.mels(), self.number("hidden_size", part="audio", default=80)]):
            yield self.zeros(self.batch, frames, bins)
            yield self.zeros(self.batch, bins, frames)

    def sound(self) -> Iterator[torch.Tensor]:
        """Spectrograms [batch, frames, bins], or samples [batch, samples] or [batch, channels, samples]."""
        length = self.look("max_length")
        if isinstance(length, int) and self.look("num_mel_bins") and length > 20:
            yield self.zeros(self.batch, length, self.mels())
        strides, kernels = self.look("conv_stride", part="audio"), self.look("conv_kernel", part="audio")
        samples = 13
        if isinstance(strides, (list, tuple)) and isinstance(kernels, (list, tuple)):
            for stride, kernel in zip(reversed(strides), reversed(kernels), strict=False):
                samples = (samples - 1) * stride + kernel
        else:
            ratios = self.look("upsampling_ratios", "downsampling_ratios", "encoder_ratios", part="audio")
            samples = 13 * prod(ratios) if isinstance(ratios, (list, tuple)) else 1600
        yield self.zeros(self.batch, samples)
        yield self.zeros(self.batch, self.number("audio_channels", "channels", part="audio", default=1), samples)

    def series(self) -> Iterator[torch.Tensor]:
        length = self.number("context_length", default=32)
        yield self.zeros(self.batch, length, self.number("num_input_channels", "input_size", default=1))
        yield self.zeros(self.batch, length)

    def any_input(self) -> Iterator[torch.Tensor]:
        if self.look("vocab_size"):
            yield self.ids(self.number("max_position_embeddings", default=16))
        yield self.zeros(self.batch, self.free[0], self.number("d_model", default=32))


_VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def _subsets(base: list[str], others: list[str]) -> Iterator[list[str]]:
    """With all of the others, with each alone, with none."""
    yield [*base, *others]
    for other in others:
        yield [*base, other]
    yield base
    yield from ([other] for other in others)


def _flat(config: Any) -> Iterator[tuple[str, Any]]:
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            yield from _flat(value)
        else:
            yield name, value
