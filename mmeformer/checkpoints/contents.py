# SPDX-License-Identifier: Apache-2.0
"""Find the backbone inside a checkpoint's dict, name its format and check its numbers."""

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
class Contents:
    """A checkpoint taken apart.

    Args:
        form: format of the backbone's tensors.
        backbone: their names, without prefix -> tensors.
        prefix: what stood before those names, such as ``"backbone."``; may be empty.
        others: the tensors outside the prefix, such as a detector's neck and heads.
        meta: the container's ``meta`` dict, if any.
        entries: names of the container's other entries, such as ``optimizer``.
    """

    form: Format
    backbone: dict[str, Tensor]
    prefix: str
    others: dict[str, Tensor]
    meta: dict
    entries: list[str]

    def others_rule(self) -> str:
        """Name of the rule under which ``others`` are dropped: names the parts they belong to."""
        parts = dict.fromkeys(name.split(".", 1)[0] for name in self.others)
        return f"other parts of the model ({shorten(list(parts))})"


def take_apart(content: Mapping, source: str, prefix: str | None = None) -> Contents:
    """Find the backbone's tensors in what a file holds.

    Args:
        content: the file's dict: bare tensors, or a container with ``state_dict`` or ``model``.
        source: the file, for messages.
        prefix: where the backbone is, such as ``"backbone."``; None finds it by itself at the top
            or under ``backbone.``.

    Raises:
        CheckpointError: no state dict, no backbone in it, or values that are no tensors.
    """
    state, entries = _state_dict(content, source)
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
            f"{source} holds no EfficientFormer in a format known here: its tensors are named "
            f"{shorten(names)}. If the backbone lies deeper inside, name the place with prefix="
        )
    meta = content.get("meta")
    return Contents(
        form=form,
        backbone=backbone,
        prefix=prefix,
        others={name: tensor for name, tensor in state.items() if not name.startswith(prefix)},
        meta=dict(meta) if isinstance(meta, Mapping) else {},
        entries=[name for name in entries if name != "meta"],
    )


def _state_dict(content: Mapping, source: str) -> tuple[dict[str, Tensor], list[str]]:
    for key in _CONTAINERS:
        if isinstance(content.get(key), Mapping):
            state, entries = content[key], [name for name in content if name != key]
            break
    else:
        state, entries = content, []
    if not state:
        raise CheckpointError(f"{source} holds no tensors: it is not the file you want")
    strange = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(
            f"{source} has no state dict: expected tensors, or a dict of tensors under "
            f"{' or '.join(map(repr, _CONTAINERS))}, but these entries are something else: "
            f"{shorten(strange)}"
        )
    return dict(state), list(entries)


def check_values(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse numbers that cannot be weights.

    Args:
        tensors: names as in the file -> tensors.
        source: the file, for messages.

    Raises:
        CheckpointError: NaN or infinite values, whole numbers, 8-bit floats or a sparse tensor;
            names it.
    """
    for name, tensor in tensors.items():
        if tensor.dtype in WEIGHT_TYPES and tensor.layout is torch.strided:
            # As float32, which is what models hold: a larger number would be infinite there.
            finite = torch.isfinite(tensor.float())
            if not finite.all():
                raise CheckpointError(
                    f"{source}: tensor {name} has {int((~finite).sum())} of {tensor.numel()} "
                    "values that are NaN or infinite. The training diverged or the file is "
                    "damaged: take an earlier checkpoint or download it again"
                )
        elif not name.endswith("num_batches_tracked"):
            raise CheckpointError(
                f"{source}: tensor {name} is of type {_dtype(tensor)}, but weights are dense "
                "tensors of floating point numbers of at least 16 bits. Convert it to float32 (a "
                "quantised model must be exported from its float weights)"
            )


def _dtype(tensor: Tensor) -> str:
    layout = "" if tensor.layout is torch.strided else f", {tensor.layout}"
    return f"{tensor.dtype}{layout}".replace("torch.", "")
