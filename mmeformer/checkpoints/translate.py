# SPDX-License-Identifier: Apache-2.0
"""Translate state dicts between our names and shapes and those of any format; pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mmeformer.backbones import EfficientFormer, EfficientFormerV2
from mmeformer.backbones.base import PyramidBackbone
from mmeformer.checkpoints.formats import NO_PLACE, TABLE, Format
from mmeformer.variants import VARIANTS, Architecture, Variant


@dataclass
class Translation:
    """A state dict in our names.

    Args:
        tensors: our name -> tensor in our shape.
        origin: our name -> name in the file.
        dropped: rule -> names in the file.
        unexplained: names in the file that match none of our tensors and no rule.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    unexplained: list[str] = field(default_factory=list)


def to_native(
    state: Mapping[str, Tensor],
    form: Format,
    family: str,
    architecture: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
) -> Translation:
    """Translate a backbone's state dict to our names and shapes.

    Args:
        state: name in ``form`` (no prefix) -> tensor.
        form: format of ``state``.
        family: ``"v1"`` or ``"v2"``.
        architecture: of the backbone.
        shapes: all our names that may occur -> our shape; a flat bias table that is not square
            takes its grid from here.
    """
    result = Translation()
    for name, shape in shapes.items():
        if form.holds(name) and (foreign := form.name(name, family, architecture)) in state:
            result.tensors[name] = native_layout(name, state[foreign], shape)
            result.origin[name] = foreign
    known = set(result.origin.values())
    for foreign in state:
        if foreign in known:
            continue
        if rule := form.rule(foreign):
            result.dropped.setdefault(rule, []).append(foreign)
        else:
            result.unexplained.append(foreign)
    return result


def native_layout(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reshape a tensor of any format to our layout; one that does not fit is returned as it is.

    Layer scales become (C,). Flat bias tables (heads, n) become (heads, rows, columns): the grid of
    ``shape`` if it has n entries, else a square.
    """
    if name.endswith(".gamma") and tensor.dim() == 3 and tensor.shape[1:] == (1, 1):
        return tensor[:, 0, 0]
    if name.endswith(TABLE) and tensor.dim() == 2:
        heads, entries = tensor.shape
        side = math.isqrt(entries)
        if math.prod(shape[1:]) == entries:
            return tensor.reshape(heads, *shape[1:])
        if side * side == entries:
            return tensor.reshape(heads, side, side)
    return tensor


def from_native(
    tensors: Mapping[str, Tensor], form: Format, family: str, architecture: Architecture
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Translate a state dict from our names and shapes to those of ``form``.

    Returns:
        The new state dict, and rule -> our names that were dropped.
    """
    state: dict[str, Tensor] = {}
    dropped: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if form.holds(name):
            foreign = form.name(name, family, architecture)
            state[foreign] = form.layout(name, tensor, family)
        else:
            dropped.setdefault(NO_PLACE, []).append(name)
    return state, dropped


def backbone_shapes(
    family: str, arch: str | Mapping[str, Any], bias_grid: int | Sequence[int] = 7
) -> dict[str, tuple[int, ...]]:
    """Return our names and shapes of a whole backbone (all stages), without allocating it.

    Args:
        family: ``"v1"`` or ``"v2"``.
        arch: as in the backbone's constructor.
        bias_grid: as there.
    """
    with torch.device("meta"):
        backbone = {"v1": EfficientFormer, "v2": EfficientFormerV2}[family](
            arch, bias_grid=bias_grid
        )
    return {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}


@cache
def _published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Return our names and shapes of a variant, without the norms of its pyramid levels."""
    shapes = backbone_shapes(VARIANTS[name].family, VARIANTS[name].arch)
    return {key: shape for key, shape in shapes.items() if not key.startswith("norms.")}


@dataclass(frozen=True)
class VariantMatch:
    """Match of a state dict with a published variant: ``matched`` of ``total`` tensors."""

    variant: Variant
    matched: int
    total: int

    @property
    def complete(self) -> bool:
        """Whether every tensor of the variant is there, in its shape."""
        return self.matched == self.total

    def __str__(self) -> str:
        if self.complete:
            return self.variant.name
        return f"{self.matched} of the {self.total} tensors of {self.variant.name}"


def identify_variant(state: Mapping[str, Tensor], form: Format) -> VariantMatch | None:
    """Find the published variant that fits a backbone's state dict best.

    Names and shapes are compared with the rows of :mod:`mmeformer.variants`; bias tables of any
    grid fit, and the norms of the pyramid levels are not needed.

    Args:
        state: name in ``form`` (no prefix) -> tensor.
        form: format of ``state``.

    Returns:
        The best match, or None if not a single tensor fits.
    """
    best, best_score = None, 0.0
    for variant in VARIANTS.values():
        if variant.family not in form.families:
            continue
        shapes = _published_shapes(variant.name)
        found = to_native(state, form, variant.family, variant.architecture, shapes)
        matched = sum(fits(name, tensor, shapes[name]) for name, tensor in found.tensors.items())
        score = matched / (len(shapes) + len(found.unexplained))
        if score > best_score:
            best, best_score = VariantMatch(variant, matched, len(shapes)), score
    return best


def variant_name(backbone: PyramidBackbone) -> str:
    """Return the name of the published variant that a backbone is, or that of its class."""
    ours = backbone.architecture
    for variant in VARIANTS.values():
        theirs = variant.architecture
        if variant.family == backbone.family and all(
            getattr(theirs, field) == getattr(ours, field)
            for field in ("widths", "depths", "attention_blocks", "mlp_ratios")
        ):
            return variant.name
    return f"{type(backbone).__name__} of a custom size"


def fits(name: str, tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether ``tensor`` (our layout) can be loaded as ``name``; a bias table may have any grid."""
    if name.endswith(TABLE):
        return tensor.dim() == 3 and tensor.shape[0] == shape[0] and tensor.numel() > 0
    return tuple(tensor.shape) == tuple(shape)
