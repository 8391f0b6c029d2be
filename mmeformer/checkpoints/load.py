# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint of any published format into a backbone or a classifier, or raise."""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import update_init_info
from torch import Tensor, nn

from mmeformer.backbones.base import PyramidBackbone
from mmeformer.checkpoints import safe_load
from mmeformer.checkpoints.classifier import count_as_head, head_names, head_tensors
from mmeformer.checkpoints.formats import NATIVE, REFERENCE_DOWNSTREAM, TABLE
from mmeformer.checkpoints.parse import ParsedCheckpoint, check_values, parse_checkpoint
from mmeformer.checkpoints.report import NEW_COUNTERS, NEW_NORMS, Report
from mmeformer.checkpoints.safe_load import MapLocation
from mmeformer.checkpoints.translate import (
    Translation,
    VariantMatch,
    backbone_shapes,
    fits,
    identify_variant,
    to_native,
    variant_name,
)
from mmeformer.errors import CheckpointError
from mmeformer.layers.attention_bias import resize_offset_table
from mmeformer.registry import WEIGHT_INITIALIZERS

NOT_BUILT = "stages and pyramid levels that the model leaves out (out_indices)"
MISSING = "missing in the file"
UNEXPLAINED = "in the file, but no part of the model"
WRONG_SHAPE = "of another shape"
LISTED = 20
"""How many tensors of a kind an error lists."""


@WEIGHT_INITIALIZERS.register_module()
class Pretrained:
    """Initializer ``mmeformer.Pretrained``: loads a checkpoint of any published format.

    Our backbones and classifiers use it for every
    ``init_cfg=dict(type="Pretrained", checkpoint=...)``.

    Args:
        checkpoint: local path, URL, or ``timm://efficientformerv2_s0.snap_dist_in1k``.
        prefix: start of the backbone's names in the file; None finds it.
        map_location: device to read the file to, as in ``torch.load``.
        allow_partial: load what fits and report the rest instead of raising.
        key: entry of the file that holds the tensors, such as ``"model_state_dict"``; None finds
            it.
        ema: take the moving averages of the weights, where the file has both.
    """

    def __init__(
        self,
        checkpoint: str,
        prefix: str | None = None,
        map_location: MapLocation = "cpu",
        allow_partial: bool = False,
        key: str | None = None,
        ema: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix
        self.map_location = map_location
        self.allow_partial = allow_partial
        self.key = key
        self.ema = ema

    def __call__(self, module: nn.Module) -> None:
        """Load into ``module`` and log the report; see :func:`load_pretrained`."""
        load_pretrained(
            module,
            self.checkpoint,
            self.prefix,
            self.map_location,
            self.allow_partial,
            self.key,
            self.ema,
        )
        if hasattr(module, "_params_init_info"):
            update_init_info(module, init_info=f"{type(self).__name__}: {self.checkpoint}")


def load_pretrained(
    backbone: nn.Module,
    checkpoint: str,
    prefix: str | None = None,
    map_location: MapLocation = "cpu",
    allow_partial: bool = False,
    key: str | None = None,
    ema: bool = False,
) -> Report:
    """Load a checkpoint and log one block that accounts for every tensor.

    Args:
        backbone: an ``EfficientFormer`` or ``EfficientFormerV2``, or a whole classifier, which
            takes the final norm and the linear layers of its head too.
        checkpoint: local path (``.pth``, ``.bin``, ``.safetensors``), URL, or
            ``timm://<model>.<tag>``.
        prefix: start of the backbone's names in the file, such as ``"backbone."``; None finds it.
        map_location: device to read the file to, as in ``torch.load``.
        allow_partial: load what fits and report the rest as problems instead of raising.
        key: entry of the file that holds the tensors; None finds it.
        ema: take the moving averages of the weights, where the file has both.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: the file cannot be read, or a tensor is missing, has the wrong shape or is
            unknown; the backbone is then unchanged.
        TypeError: ``backbone`` is not one of ours.
    """
    if not (isinstance(backbone, PyramidBackbone) or is_classifier(backbone)):
        raise TypeError(
            f"{type(backbone).__name__} is neither an EfficientFormer nor an EfficientFormerV2: "
            "use mmengine's load_checkpoint"
        )
    content = safe_load.load(checkpoint, map_location)
    parsed = parse_checkpoint(content, str(checkpoint), prefix, key, ema)
    if isinstance(backbone, PyramidBackbone):
        report = load_backbone(backbone, parsed, allow_partial)
    else:
        report = load_classifier(backbone, parsed, allow_partial)
    _log(report)
    return report


def _log(report: Report) -> None:
    level = logging.WARNING if report.needs_attention else logging.INFO
    print_log(str(report), logger="current", level=level)


def is_classifier(model: nn.Module) -> bool:
    """Whether a model has one of our backbones and the head of the published classifiers."""
    parts = getattr(model, "backbone", None), getattr(model, "head", None)
    return isinstance(parts[0], PyramidBackbone) and all(
        isinstance(getattr(parts[1], name, None), nn.Module) for name in ("norm", "fc")
    )


def load_classifier(model: Any, parsed: ParsedCheckpoint, allow_partial: bool = False) -> Report:
    """Load a checkpoint of any format into a whole classifier; logs nothing.

    Args:
        model: with our backbone and head, see :func:`is_classifier`.
        parsed: the checkpoint.
        allow_partial: as in :func:`load_pretrained`, for the backbone; the head must fit.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape or is unknown; the model is then
            unchanged.
    """
    source = parsed.source
    names, tensors = head_names(parsed), head_tensors(parsed)
    if not tensors:
        raise CheckpointError(
            f"{source} is not a whole classifier: its backbone alone can be loaded by "
            "model.backbone.init_cfg"
        )
    ours = {name: tuple(tensor.shape) for name, tensor in model.head.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    optional = {"norm.num_batches_tracked"}
    if wrong := [
        f"{name} {theirs.get(name, 'missing')} where the model has {ours.get(name, 'nothing')}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name) and name not in optional
    ]:
        raise CheckpointError(
            f"{source} does not fit the head of the model: {'; '.join(wrong)}. Set "
            "model.head.num_classes and model.head.distillation (two linear layers) to those of "
            "the file, or load the backbone alone by model.backbone.init_cfg"
        )
    check_values({names[name]: tensor for name, tensor in tensors.items()}, source)
    report = load_backbone(model.backbone, parsed, allow_partial)
    model.head.load_state_dict({**model.head.state_dict(), **tensors}, strict=True)
    count_as_head(report, names)
    return report


def use_published(model: Any, content: MutableMapping[str, Any], source: str) -> None:
    """Make a checkpoint of a foreign format one of this model, in place, if both are classifiers.

    Whoever reads checkpoints of whole models calls this first, so that published classifiers can
    be evaluated and used as they are. Everything else stays as it is. The report is logged.

    Args:
        model: may be wrapped (DDP).
        content: the file's dict.
        source: the file, for messages.

    Raises:
        CheckpointError: it is a classifier, but not one that this model can load.
    """
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    if not is_classifier(model):
        return
    try:
        parsed = parse_checkpoint(content, source)
    except CheckpointError:
        return  # the comparison with the model that follows says what is wrong
    if parsed.format is NATIVE or not head_names(parsed):
        return
    _log(load_classifier(model, parsed))
    meta = content.get("meta")
    content.clear()
    content.update(state_dict=model.state_dict(), meta=meta if isinstance(meta, dict) else {})


def load_backbone(
    backbone: PyramidBackbone, parsed: ParsedCheckpoint, allow_partial: bool = False
) -> Report:
    """Load a checkpoint of any format; as :func:`load_pretrained`, but logs nothing."""
    source, model = parsed.source, variant_name(backbone)
    held = identify_variant(parsed.backbone, parsed.format)
    report = Report(
        title=f"loaded into {model}",
        source=source,
        format=parsed.format.title,
        variant=held.variant.name if held and held.complete else None,
    )
    wanted = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    found = _translate(backbone, parsed, wanted)
    check_values(
        {parsed.prefix + found.origin[name]: tensor for name, tensor in found.tensors.items()},
        source,
    )
    _record_dropped(report, parsed, found, wanted)
    tensors, problems = _match_tensors(report, parsed, found, wanted)
    if problems and not allow_partial:
        raise CheckpointError(_mismatch_message(source, model, held, problems))
    if not tensors:
        raise CheckpointError(f"{source}: not one tensor fits {model}; nothing to load")
    report.unused = problems
    _warn_of_lost_scores(report, parsed, backbone)
    backbone.load_state_dict({**backbone.state_dict(), **tensors}, strict=True)
    return report


def _translate(
    backbone: PyramidBackbone, parsed: ParsedCheckpoint, wanted: Mapping[str, tuple[int, ...]]
) -> Translation:
    if backbone.family not in parsed.format.families:
        return Translation(unexplained=list(parsed.backbone))
    all_stages = backbone_shapes(backbone.family, backbone.arch, backbone.bias_grid)
    return to_native(
        parsed.backbone,
        parsed.format,
        backbone.family,
        backbone.architecture,
        {**all_stages, **wanted},
    )


def _record_dropped(
    report: Report,
    parsed: ParsedCheckpoint,
    found: Translation,
    wanted: Mapping[str, tuple[int, ...]],
) -> None:
    """Report the tensors that are left out on purpose, and remove them from ``found``."""
    prefix = parsed.prefix
    for rule, names in found.dropped.items():
        report.drop(rule, [prefix + name for name in names])
    not_built = [name for name in found.tensors if name not in wanted]
    report.drop(NOT_BUILT, [prefix + found.origin[name] for name in not_built])
    for name in not_built:
        del found.tensors[name]
    if parsed.other_tensors:
        report.drop(parsed.other_parts(), parsed.other_tensors)
    report.notes += parsed.notes
    report.warnings += parsed.warnings
    if parsed.other_entries:
        report.notes.append(
            f"entries of the file that are not read: {', '.join(parsed.other_entries)}"
        )


def _match_tensors(
    report: Report,
    parsed: ParsedCheckpoint,
    found: Translation,
    wanted: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Select what to load and fill in the report.

    Returns:
        Our name -> tensor to load, and reason -> names of tensors that do not fit.
    """
    tensors: dict[str, Tensor] = {}
    problems: dict[str, list[str]] = {}
    for name, shape in wanted.items():
        if name not in found.tensors:
            if name.startswith("norms."):
                report.new.setdefault(NEW_NORMS, []).append(name)
            elif name.endswith(".num_batches_tracked"):
                report.new.setdefault(NEW_COUNTERS, []).append(name)
            else:
                problems.setdefault(MISSING, []).append(f"{name} {shape}")
            continue
        tensor = found.tensors[name]
        if not fits(name, tensor, shape):
            place = parsed.prefix + found.origin[name]
            problems.setdefault(WRONG_SHAPE, []).append(
                f"{place} {tuple(tensor.shape)} where {name} is {shape}"
            )
            continue
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            report.cast.add(str(tensor.dtype).removeprefix("torch."))
            tensor = tensor.float()
        if name.endswith(TABLE) and tuple(tensor.shape) != shape:
            _, rows, columns = tensor.shape
            _, new_rows, new_columns = shape
            report.resized.append((name, (rows, columns), (new_rows, new_columns)))
            tensor = resize_offset_table(tensor, (new_rows, new_columns))
        tensors[name] = tensor
    if found.unexplained:
        problems[UNEXPLAINED] = [
            f"{parsed.prefix}{name} {tuple(parsed.backbone[name].shape)}"
            for name in found.unexplained
        ]
    report.loaded = list(tensors)
    return tensors, problems


def _mismatch_message(
    source: str, model: str, held: VariantMatch | None, problems: Mapping[str, list[str]]
) -> str:
    if held is None:
        first = f"this file holds no published variant, the model is {model}."
    elif held.variant.name == model and not held.complete:
        first = f"this file holds only {held}: it is incomplete or from a modified model."
    else:
        first = f"this file holds {held}, the model is {model}."
    lines = [f"{source} was not loaded: {first}"]
    for reason, names in problems.items():
        lines.append(f"{len(names)} tensors {reason}:")
        lines += [f"  {name}" for name in names[:LISTED]]
        if len(names) > LISTED:
            lines.append(f"  and {len(names) - LISTED} more")
    lines.append(
        "Build the model that the file was made for, or use a file made for this model. To load "
        "only what fits, set allow_partial=True in init_cfg."
    )
    return "\n".join(lines)


def _warn_of_lost_scores(
    report: Report, parsed: ParsedCheckpoint, backbone: PyramidBackbone
) -> None:
    if parsed.format is not REFERENCE_DOWNSTREAM:
        return
    if report.resized:
        _, grid, _ = next(entry for entry in report.resized if ".blocks." in entry[0])
        report.warnings.append(
            f"published scores need the file's own grid of bias tables: bias_grid={grid}"
        )
    if backbone.bias_resize != "matrix":
        report.warnings.append(
            "published scores need bias_resize='matrix', with which the reference trained this file"
        )
