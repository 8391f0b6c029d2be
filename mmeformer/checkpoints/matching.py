# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint belongs to a model.

mmengine loads what happens to fit and logs the rest, so that a wrong file ends in a score of zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from mmeformer.checkpoints.contents import check_values, take_apart
from mmeformer.checkpoints.load import describe
from mmeformer.checkpoints.translate import identify
from mmeformer.errors import CheckpointError

NAMED = 3


def require_match(model: nn.Module, checkpoint: Mapping, source: str, part: str = "") -> None:
    """Raise unless the file has every tensor of the model, in its shape and with sound numbers.

    Args:
        model: may be wrapped (DDP, test-time augmentation).
        checkpoint: content of the file.
        source: the file, for messages.
        part: compare only names that begin with this, such as ``"backbone."``.

    Raises:
        CheckpointError: names the first tensors that are missing or of another shape, and what the
            file seems to hold instead; or one that holds NaN or is not of floating point numbers.
    """
    while hasattr(model, "module"):
        model = model.module
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{source} has no state dict: it is not the file you want")
    state = {re.sub(r"^module\.", "", str(name)): tensor for name, tensor in state.items()}
    shapes = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in state.items()}
    ours = model.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in ours.items() if name.startswith(part)}
    missing = [name for name in wanted if name not in shapes]
    misshapen = [
        f"{name} {shapes[name]} in place of {shape}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    if not missing and not misshapen:
        numbers = {
            name: state[name]
            for name, tensor in ours.items()
            if tensor.is_floating_point() and isinstance(state.get(name), Tensor)
        }
        check_values(numbers, source)
        return
    problems = [
        f"{len(names)} tensors are {kind} ({', '.join(names[:NAMED])}"
        f"{', ...' if len(names) > NAMED else ''})"
        for kind, names in (("missing in it", missing), ("of another shape", misshapen))
        if names
    ]
    raise CheckpointError(
        f"{source} is not of this config's model: {'; '.join(problems)}"
        f"{_kinship(model, checkpoint)}. Take the checkpoint that was trained with this config, "
        "or the config of this checkpoint; tools/convert_checkpoint.py converts files of the "
        "reference implementation"
    )


def _kinship(model: nn.Module, checkpoint: Mapping) -> str:
    """What backbones the file and the model have, as far as they differ and can be told."""
    try:
        contents = take_apart(checkpoint, "")
        found = identify(contents.backbone, contents.form)
    except CheckpointError:
        return "; it holds none of our backbones"
    backbone = getattr(model, "backbone", None)
    if found is None or not hasattr(backbone, "architecture"):
        return ""
    expected = describe(backbone)
    return "" if str(found) == expected else f"; it holds {found}, the model has {expected}"
