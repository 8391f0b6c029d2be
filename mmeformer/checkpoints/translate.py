# SPDX-License-Identifier: Apache-2.0
"""Carry state dicts between our names and shapes and those of any format; pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from mmeformer.backbones import EfficientFormer, EfficientFormerV2
from mmeformer.checkpoints.formats import NO_PLACE, Format
from mmeformer.variants import VARIANTS, Architecture, Variant

TABLE = ".attention_bias.table"


@dataclass
class Translation:
    """A state dict in our names.

    Args:
        tensors: our name -> tensor in our shape.
        origin: our name -> name in the file.
        dropped: rule -> names in the file.
        unexplained: names in the file that nothing accounts for.
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
        state: names of ``form`` (no prefix) -> tensors.
        form: format of ``state``.
        family: ``"v1"`` or ``"v2"``.
        architecture: of the backbone.
        shapes: all our names that may occur -> our shapes; a flat bias table that is not square
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
    """Bring a tensor of any format to our layout; one that cannot be is returned as it is.

    Layer scales become (C,). Flat bias tables (heads, n) become (heads, rows, columns): ``shape``'s
    grid if it has n entries, else a square.
    """
    if name.endswith(".gamma") and tensor.dim() == 3 and tensor.shape[1:] == (1, 1):
        return tensor[:, 0, 0]
    if name.endswith(TABLE) and tensor.dim() == 2:
        entries = tensor.shape[1]
        side = math.isqrt(entries)
        if math.prod(shape[1:]) == entries:
            return tensor.unflatten(1, tuple(shape[1:]))
        if side * side == entries:
            return tensor.unflatten(1, (side, side))
    return tensor


def from_native(
    tensors: Mapping[str, Tensor], form: Format, family: str, architecture: Architecture
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Translate from our names and shapes; returns the new state dict and rule -> names dropped."""
    state, dropped = {}, {}
    for name, tensor in tensors.items():
        if form.holds(name):
            foreign = form.name(name, family, architecture)
            state[foreign] = form.layout(name, tensor, family)
        else:
            dropped.setdefault(NO_PLACE, []).append(name)
    return state, dropped


def skeleton(family: str, arch, bias_grid=7) -> dict[str, tuple[int, ...]]:
    """Our names and shapes of a whole backbone (all stages), without allocating it.

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
def _published_skeleton(name: str) -> dict[str, tuple[int, ...]]:
    return skeleton(VARIANTS[name].family, VARIANTS[name].arch)


@dataclass(frozen=True)
class Likeness:
    """How much of a published variant a state dict holds: ``held`` of ``total`` tensors."""

    variant: Variant
    held: int
    total: int

    @property
    def complete(self) -> bool:
        """Whether every tensor of the variant is there, in its shape."""
        return self.held == self.total

    def __str__(self) -> str:
        if self.complete:
            return self.variant.name
        return f"{self.held} of the {self.total} tensors of {self.variant.name}"


def identify(state: Mapping[str, Tensor], form: Format) -> Likeness | None:
    """The published variant that a backbone's state dict (names of ``form``) is most like.

    Compares names and shapes with the rows of :mod:`mmeformer.variants`; bias tables of any grid
    fit. None if not a single tensor fits.
    """
    best = None
    for variant in VARIANTS.values():
        if variant.family not in form.families:
            continue
        # A variant is whole without the norms of its pyramid.
        shapes = {
            name: shape
            for name, shape in _published_skeleton(variant.name).items()
            if not name.startswith("norms.")
        }
        found = to_native(state, form, variant.family, variant.architecture, shapes)
        held = sum(fits(name, tensor, shapes[name]) for name, tensor in found.tensors.items())
        strangers = len(found.unexplained)
        score = held / (len(shapes) + strangers)
        if held and (best is None or score > best[0]):
            best = score, Likeness(variant, held, len(shapes))
    return best[1] if best else None


def fits(name: str, tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether ``tensor`` (our layout) can serve as ``name``; a bias table may have any grid."""
    if name.endswith(TABLE):
        return tensor.dim() == 3 and tensor.shape[0] == shape[0] and tensor.numel() > 0
    return tuple(tensor.shape) == tuple(shape)
