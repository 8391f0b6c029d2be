# SPDX-License-Identifier: Apache-2.0
"""Check that a checkpoint belongs to a model.

mmengine loads the tensors that happen to fit and only logs the rest, so a wrong file would show as
a score of zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from mmeformer.backbones.base import PyramidBackbone
from mmeformer.checkpoints.parse import check_values, parse_checkpoint
from mmeformer.checkpoints.translate import identify_variant, variant_name
from mmeformer.errors import CheckpointError

LISTED = 3
"""How many tensors of a kind an error lists."""


def require_match(
    model: nn.Module, checkpoint: Mapping[str, object], source: str, part: str = ""
) -> None:
    """Raise unless a checkpoint holds every tensor of a model, with its shape and finite values.

    Args:
        model: may be wrapped (DDP, test-time augmentation).
        checkpoint: content of the file.
        source: the file, for messages.
        part: compare only names that begin with this, such as ``"backbone."``.

    Raises:
        CheckpointError: tensors are missing or have another shape, or a tensor has NaN or is not
            floating point. The message names the first ones, and the variant that the file seems to
            hold instead.
    """
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{source} has no state dict: use a file that holds one")
    tensors = {
        re.sub(r"^module\.", "", str(name)): tensor
        for name, tensor in state.items()
        if isinstance(tensor, Tensor)
    }
    ours = model.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in ours.items() if name.startswith(part)}
    missing = [name for name in wanted if name not in tensors]
    wrong_shape = [
        f"{name} {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if not missing and not wrong_shape:
        weights = {
            name: tensors[name]
            for name, tensor in ours.items()
            if tensor.is_floating_point() and name in tensors
        }
        check_values(weights, source)
        return
    problems = [
        f"{len(names)} tensors {kind} ({', '.join(names[:LISTED])}"
        f"{', ...' if len(names) > LISTED else ''})"
        for kind, names in (("are missing", missing), ("have another shape", wrong_shape))
        if names
    ]
    raise CheckpointError(
        f"{source} does not fit this config's model: {'; '.join(problems)}"
        f"{_compare_backbones(model, checkpoint)}. Use the checkpoint that was trained with this "
        "config, or the config of this checkpoint; mmeformer convert converts files of "
        "the reference implementation"
    )


def _compare_backbones(model: nn.Module, checkpoint: Mapping[str, object]) -> str:
    """A clause that names the variants of the file and the model if they differ, else ``""``."""
    try:
        parsed = parse_checkpoint(checkpoint, "")
    except CheckpointError:
        return "; it holds no EfficientFormer"
    held = identify_variant(parsed.backbone, parsed.format)
    backbone = getattr(model, "backbone", None)
    if held is None or not isinstance(backbone, PyramidBackbone):
        return ""
    expected = variant_name(backbone)
    return "" if str(held) == expected else f"; it holds {held}, the model has {expected}"
