# SPDX-License-Identifier: Apache-2.0
"""Find the backbone in a checkpoint's dict, recognize its format and check its values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmeformer.checkpoints.formats import Format, detect
from mmeformer.checkpoints.report import shorten
from mmeformer.errors import CheckpointError

# Containers: mmengine, mmcv and timm; the reference and DeiT.
_CONTAINERS = ("state_dict", "model")
# Moving averages of the weights beside the weights themselves: timm; DeiT; others.
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")
# Counters of mmengine's and PyTorch's averaged models.
_COUNTERS = ("steps", "n_averaged")
_SAVED_BY_MMENGINE = "ema_state_dict"
BACKBONE = "backbone."
_WRAPPERS = r"(?:(?:module|model|backbone)\.)*"
"""Start of a name that says where a backbone is: parallel training, Lightning, a detector."""

WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class ParsedCheckpoint:
    """The backbone in a checkpoint, and the rest of its content.

    Args:
        source: the file, for messages.
        format: format of the backbone's tensors.
        backbone: name without prefix -> tensor of the backbone.
        prefix: start of those names in the file, such as ``"backbone."``; may be empty.
        other_tensors: name -> tensor outside the backbone, such as a detector's neck and heads.
        meta: the container's ``meta`` dict, or an empty one.
        other_entries: name -> value of the container's other entries, such as ``optimizer``.
        notes, warnings: of the choice of the weights, for reports.
    """

    source: str
    format: Format
    backbone: dict[str, Tensor]
    prefix: str
    other_tensors: dict[str, Tensor]
    meta: dict[object, object]
    other_entries: dict[str, object]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def other_parts(self) -> str:
        """Name the parts of the model that ``other_tensors`` belong to, for reports."""
        parts = dict.fromkeys(name.split(".", 1)[0] for name in self.other_tensors)
        return f"other parts of the model ({shorten(list(parts))})"


def parse_checkpoint(
    content: Mapping[str, object],
    source: str,
    prefix: str | None = None,
    key: str | None = None,
    ema: bool = False,
) -> ParsedCheckpoint:
    """Find the backbone's tensors in a checkpoint's dict.

    Args:
        content: the file's dict: bare tensors, or a container with ``state_dict`` or ``model``.
        source: the file, for messages.
        prefix: start of the backbone's names, such as ``"student.backbone."``; None finds it if it
            is made of ``module.``, ``model.``, ``backbone.`` and ``_orig_mod.``, in any order.
        key: entry of the container that holds the tensors; None takes the usual ones.
        ema: take the moving averages of the weights.

    Raises:
        CheckpointError: there is no state dict or no such entry, no backbone in it, or it holds
            values that are not tensors.
    """
    averages = _find_averages(content)
    if ema and averages is None:
        raise CheckpointError(
            f"{source} has no moving averages (EMA) beside its weights; its entries are "
            f"{shorten(list(map(str, content)))}"
        )
    state, entries, chosen = _find_state_dict(content, source, averages if ema else key)
    state = {
        without_compilation(name): tensor for name, tensor in state.items() if name not in _COUNTERS
    }
    prefix = _find_prefix(state, source) if prefix is None else _given_prefix(state, prefix)
    backbone = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    names = list(state)
    if not backbone:
        raise CheckpointError(
            f"{source} has no tensor whose name starts with prefix {prefix!r}; its names are "
            f"{shorten(names)}"
        )
    form = detect(backbone)
    if form is None:
        raise CheckpointError(
            f"{source} holds no EfficientFormer in a known format: its tensors are named "
            f"{shorten(names)}. If the backbone is deeper inside, set prefix= "
            f"(convert_checkpoint.py: --prefix){_suggest(names)}"
        )
    meta = entries.pop("meta", None)
    # Necks and heads are named as in the model itself, without what wraps it.
    wrapper = prefix.partition(BACKBONE)[0]
    parsed = ParsedCheckpoint(
        source=source,
        format=form,
        backbone=backbone,
        prefix=prefix,
        other_tensors={
            name.removeprefix(wrapper): tensor
            for name, tensor in state.items()
            if not name.startswith(prefix)
        },
        meta=dict(meta) if isinstance(meta, Mapping) else {},
        other_entries=entries,
    )
    _report_averages(parsed, chosen, averages)
    return parsed


def _find_averages(content: Mapping[str, object]) -> str | None:
    """The entry with the moving averages of the weights, or None."""
    saved = content.get(_SAVED_BY_MMENGINE)
    if isinstance(saved, Mapping) and "steps" in saved and "state_dict" in content:
        # mmengine's EMAHook saves the averages as the model's weights, and the last weights beside.
        return "state_dict"
    for name in _AVERAGES:
        inner = content.get(name)
        if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
            return name
    return None


def _report_averages(parsed: ParsedCheckpoint, chosen: str | None, averages: str | None) -> None:
    if averages is None:
        return
    if chosen == averages:
        parsed.notes.append(
            f"the weights are the moving averages (EMA) of the training, {chosen!r}"
        )
    else:
        parsed.warnings.append(
            f"the weights are the last ones of the training, {chosen!r}; the file also holds their "
            f"moving averages (EMA), {averages!r}, which usually score better: take them with "
            "ema=True (convert_checkpoint.py: --ema)"
        )


def without_compilation(name: str) -> str:
    """``name`` without the wrappers of torch.compile, which may be anywhere."""
    return re.sub(r"(^|\.)(_orig_mod\.)+", r"\1", name)


def _find_prefix(state: Mapping[str, Tensor], source: str) -> str:
    """Start of the backbone's names: the longest one made of known wrappers."""
    found: dict[str, list[str]] = {}
    for name in state:
        prefix = re.match(_WRAPPERS, name)[0]  # type: ignore[index]  # it matches nothing, too
        found.setdefault(prefix, []).append(name.removeprefix(prefix))
    inside = [prefix for prefix in found if BACKBONE in prefix]
    if not inside:
        # A wrapper may hold more than the model, such as the loss.
        known = [prefix for prefix, names in found.items() if detect(names)] or [""]
        return max(known, key=lambda prefix: len(found.get(prefix, ())))
    backbones = [prefix for prefix in inside if detect(found[prefix])] or inside
    if len(backbones) > 1:
        raise CheckpointError(
            f"{source} holds several backbones, {', '.join(backbones)}: choose one with prefix= "
            "(convert_checkpoint.py: --prefix)"
        )
    return backbones[0]


def _given_prefix(state: Mapping[str, Tensor], prefix: str) -> str:
    """``prefix`` as it stands in the names: complete, and below what wraps the whole model."""
    if prefix and not prefix.endswith("."):
        prefix += "."
    prefix = without_compilation(prefix)
    if not any(name.startswith(prefix) for name in state):
        for name in state:
            if match := re.match(rf"((?:(?:module|model)\.)+){re.escape(prefix)}", name):
                return match[0]
    return prefix


def _suggest(names: list[str]) -> str:
    """Prefixes that look like a backbone's, as the end of a message."""
    found = dict.fromkeys(
        match[0] for name in names if (match := re.match(rf".*?{re.escape(BACKBONE)}", name))
    )
    return f", such as {shorten(list(found), 3)}" if found else ""


def _find_state_dict(
    content: Mapping[str, object], source: str, key: str | None
) -> tuple[dict[str, Tensor], dict[str, object], str | None]:
    """Return the state dict of a checkpoint, the entries beside it, and its own entry's name."""
    found: Mapping[str, object] = content
    entries: dict[str, object] = {}
    if key is not None and not isinstance(content.get(key), Mapping):
        raise CheckpointError(
            f"{source} has no tensors under {key!r}: its entries are "
            f"{shorten([str(name) for name in content])}"
        )
    chosen = None
    for name in _CONTAINERS if key is None else (key,):
        inner = content.get(name)
        if isinstance(inner, Mapping):
            chosen, found = name, inner
            entries = {other: value for other, value in content.items() if other != name}
            break
    if not found:
        raise CheckpointError(f"{source} holds no tensors: use a file that holds a state dict")
    state = {
        name: value
        for name, value in found.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if len(state) < len(found):
        invalid = [str(name) for name in found if name not in state]
        dicts = [
            str(name)
            for name, value in found.items()
            if isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())
        ]
        hint = f". Tensors are under {shorten(dicts)}: choose with key= (--key)" if dicts else ""
        raise CheckpointError(
            f"{source} has no state dict: expected tensors, or a dict of tensors under "
            f"{' or '.join(map(repr, _CONTAINERS))}, but these entries are something else: "
            f"{shorten(invalid)}{hint}"
        )
    return state, entries, chosen


def check_values(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise for tensors that cannot be weights.

    Args:
        tensors: name in the file -> tensor.
        source: the file, for messages.

    Raises:
        CheckpointError: a tensor is integer, quantized, 8-bit or sparse, or has NaN or infinite
            values; the message names it.
    """
    for name, tensor in tensors.items():
        if tensor.dtype in WEIGHT_TYPES and tensor.layout is torch.strided:
            # As float32, the type of the model's weights: a larger number would become infinite.
            finite = torch.isfinite(tensor.float())
            if not finite.all():
                raise CheckpointError(
                    f"{source}: tensor {name} has {int((~finite).sum())} of {tensor.numel()} "
                    "values that are NaN or infinite. The training diverged or the file is "
                    "damaged: use an earlier checkpoint or download it again"
                )
        elif not name.endswith("num_batches_tracked"):
            raise CheckpointError(
                f"{source}: tensor {name} is of type {_type_name(tensor)}, but weights must be "
                "dense floating point tensors of at least 16 bits. Convert it to float32 (a "
                "quantized model must be exported from its float weights)"
            )


def _type_name(tensor: Tensor) -> str:
    layout = "" if tensor.layout is torch.strided else f", {tensor.layout}"
    return f"{tensor.dtype}{layout}".replace("torch.", "")
