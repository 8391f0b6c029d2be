# SPDX-License-Identifier: Apache-2.0
"""Compare the channels that a neck or head expects with those that the backbone gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmeformer.backbones.base import PyramidBackbone
from mmeformer.errors import UserError
from mmeformer.settings import LIBRARIES, type_name


class ChannelsError(UserError, ValueError):
    """A neck or head was made for another backbone; the message has the setting and its value."""


def require_channels(config: Mapping, model: Any) -> None:
    """Raise ChannelsError if the config has a neck or head for the maps of another backbone.

    PyTorch would fail in the first iteration, and necks of mmdet in an assertion without a text.

    Args:
        config: of any task. Settings named ``in_channels`` are compared.
        model: built from it; only backbones of this project are compared.
    """
    settings = config["model"]
    while hasattr(model, "module"):
        model, settings = model.module, settings.get("module", settings)
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, PyramidBackbone):
        return
    widths = [backbone.architecture.widths[index] for index in backbone.out_indices]
    for path, wanted, given in _expected(settings, model, widths):
        if wanted != given:
            raise ChannelsError(
                f"{path}={_plain(wanted)}, but the backbone's maps have {widths} channels "
                f"(out_indices {backbone.out_indices}): set {path}={_plain(given)}"
            )


def _expected(
    settings: Mapping, model: Any, widths: list[int]
) -> Iterator[tuple[str, list[int], list[int]]]:
    """Settings of what reads the backbone's maps: path, channels expected, channels given."""
    if neck := settings.get("neck"):
        path, module = "model.neck", model.neck
        if isinstance(neck, (list, tuple)):
            path, neck, module = "model.neck.0", neck[0], module[0]
        wanted = neck.get("in_channels")
        # A neck of the user may leave out maps.
        if isinstance(wanted, (list, tuple)) and type(module).__module__.startswith(LIBRARIES):
            yield f"{path}.in_channels", list(wanted), widths
        # Only this one gives the head the channels of the backbone.
        if type_name(neck) != "GlobalAveragePooling":
            return
    for name in ("head", "decode_head", "auxiliary_head"):
        head = settings.get(name) or {}
        if not isinstance(head, Mapping) or "in_channels" not in head:
            continue
        wanted, path = head["in_channels"], f"model.{name}.in_channels"
        # Heads take the last map if the setting does not say which; those of masks take all.
        index = head.get("in_index", -1)
        if isinstance(wanted, int) and isinstance(index, int):
            yield path, [wanted], [widths[index]]
        elif isinstance(wanted, (list, tuple)):
            given = [widths[i] for i in index] if isinstance(index, (list, tuple)) else widths
            yield path, list(wanted), given


def _plain(channels: list[int]) -> Any:
    return channels if len(channels) != 1 else channels[0]
