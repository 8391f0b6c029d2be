# SPDX-License-Identifier: Apache-2.0
"""Find the backbone in a checkpoint's dict, recognize its format and check its values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmeformer.checkpoints.formats import Format, detect
from mmeformer.checkpoints.report import shorten
from mmeformer.errors import CheckpointError

# Containers: mmengine, mmcv and timm; the reference and DeiT.
_CONTAINERS = ("state_dict", "model")
BACKBONE = "backbone."
WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class ParsedCheckpoint:
    """The backbone in a checkpoint, and the rest of its content.

    Args:
        format: format of the backbone's tensors.
        backbone: name without prefix -> tensor of the backbone.
        prefix: start of those names in the file, such as ``"backbone."``; may be empty.
        other_tensors: name -> tensor outside the backbone, such as a detector's neck and heads.
        meta: the container's ``meta`` dict, or an empty one.
        other_entries: name -> value of the container's other entries, such as ``optimizer``.
    """

    format: Format
    backbone: dict[str, Tensor]
    prefix: str
    other_tensors: dict[str, Tensor]
    meta: dict[object, object]
    other_entries: dict[str, object]

    def other_parts(self) -> str:
        """Name the parts of the model that ``other_tensors`` belong to, for reports."""
        parts = dict.fromkeys(name.split(".", 1)[0] for name in self.other_tensors)
        return f"other parts of the model ({shorten(list(parts))})"


def parse_checkpoint(
    content: Mapping[str, object], source: str, prefix: str | None = None
) -> ParsedCheckpoint:
    """Find the backbone's tensors in a checkpoint's dict.

    Args:
        content: the file's dict: bare tensors, or a container with ``state_dict`` or ``model``.
        source: the file, for messages.
        prefix: start of the backbone's names, such as ``"backbone."``; None looks for the backbone
            at the top and under ``backbone.``.

    Raises:
        CheckpointError: there is no state dict, no backbone in it, or it holds values that are not
            tensors.
    """
    state, entries = _find_state_dict(content, source)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if prefix is None:
        prefix = BACKBONE if any(name.startswith(BACKBONE) for name in state) else ""
    elif prefix and not prefix.endswith("."):
        prefix += "."
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
            f"{shorten(names)}. If the backbone is deeper inside, set prefix="
        )
    meta = entries.pop("meta", None)
    return ParsedCheckpoint(
        format=form,
        backbone=backbone,
        prefix=prefix,
        other_tensors={
            name: tensor for name, tensor in state.items() if not name.startswith(prefix)
        },
        meta=dict(meta) if isinstance(meta, Mapping) else {},
        other_entries=entries,
    )


def _find_state_dict(
    content: Mapping[str, object], source: str
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return the state dict of a checkpoint, and the entries beside it."""
    found: Mapping[str, object] = content
    entries: dict[str, object] = {}
    for key in _CONTAINERS:
        inner = content.get(key)
        if isinstance(inner, Mapping):
            found = inner
            entries = {name: value for name, value in content.items() if name != key}
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
        raise CheckpointError(
            f"{source} has no state dict: expected tensors, or a dict of tensors under "
            f"{' or '.join(map(repr, _CONTAINERS))}, but these entries are something else: "
            f"{shorten(invalid)}"
        )
    return state, entries


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
