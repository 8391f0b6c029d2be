# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint of any published format into a backbone: all of it, or an error."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from mmengine.logging import print_log
from mmengine.model import update_init_info
from torch import Tensor, nn

from mmeformer.checkpoints import safe_load
from mmeformer.checkpoints.contents import Contents, check_values, take_apart
from mmeformer.checkpoints.formats import REFERENCE_DOWNSTREAM
from mmeformer.checkpoints.report import NEW_COUNTERS, NEW_NORMS, Report
from mmeformer.checkpoints.translate import TABLE, Translation, fits, identify, skeleton, to_native
from mmeformer.errors import CheckpointError
from mmeformer.layers.attention_bias import resize_offset_table
from mmeformer.registry import WEIGHT_INITIALIZERS
from mmeformer.variants import VARIANTS

NOT_BUILT = "stages and pyramid levels that the model leaves out (out_indices)"
MISSING = "missing in the file"
UNEXPLAINED = "in the file, but no part of the model"
MISSHAPEN = "of another shape"
LISTED = 20
"""How many tensors of a kind an error lists."""


@WEIGHT_INITIALIZERS.register_module()
class Pretrained:
    """Initializer ``mmeformer.Pretrained``: loads a checkpoint of any published format.

    Our backbones use it for every ``init_cfg=dict(type="Pretrained", checkpoint=...)``.

    Args:
        checkpoint: local path, address, or ``timm://efficientformerv2_s0.snap_dist_in1k``.
        prefix: where the backbone is inside the file; None finds it.
        map_location: device to read the file to, as in ``torch.load``.
        allow_partial: load what fits and report the rest instead of raising.
    """

    def __init__(
        self,
        checkpoint: str,
        prefix: str | None = None,
        map_location="cpu",
        allow_partial: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix
        self.map_location = map_location
        self.allow_partial = allow_partial

    def __call__(self, module: nn.Module) -> None:
        """Load into ``module`` and log the report; see :func:`load_pretrained`."""
        load_pretrained(module, self.checkpoint, self.prefix, self.map_location, self.allow_partial)
        if hasattr(module, "_params_init_info"):
            update_init_info(module, init_info=f"{type(self).__name__}: {self.checkpoint}")


def load_pretrained(
    backbone: nn.Module,
    checkpoint: str,
    prefix: str | None = None,
    map_location="cpu",
    allow_partial: bool = False,
) -> Report:
    """Load a checkpoint into a backbone and log one block that accounts for every tensor.

    Args:
        backbone: an ``EfficientFormer`` or ``EfficientFormerV2``.
        checkpoint: local path (``.pth``, ``.bin``, ``.safetensors``), address, or
            ``timm://<model>.<tag>``.
        prefix: where the backbone is inside the file, such as ``"backbone."``; None finds it.
        map_location: device to read the file to, as in ``torch.load``.
        allow_partial: load what fits and report the rest as problems instead of raising.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file cannot be read, or anything in it is missing or unexplained; the
            backbone is then untouched.
    """
    content = safe_load.load(checkpoint, map_location)
    report = load_content(backbone, content, str(checkpoint), prefix, allow_partial)
    level = logging.WARNING if report.needs_attention else logging.INFO
    print_log(str(report), logger="current", level=level)
    return report


def load_content(
    backbone: nn.Module,
    content: Mapping,
    source: str,
    prefix: str | None = None,
    allow_partial: bool = False,
) -> Report:
    """As :func:`load_pretrained`, from a dict that was already read; logs nothing."""
    contents = take_apart(content, source, prefix)
    model = describe(backbone)
    likeness = identify(contents.backbone, contents.form)
    report = Report(
        title=f"loaded into {model}",
        source=source,
        format=contents.form.title,
        variant=likeness.variant.name if likeness and likeness.complete else None,
    )
    wanted = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    found = _translate(backbone, contents, wanted)
    check_values(
        {contents.prefix + found.origin[name]: tensor for name, tensor in found.tensors.items()},
        source,
    )
    _account_for_drops(report, contents, found, wanted)
    tensors, problems = _fit(report, contents, found, wanted)
    if problems and not allow_partial:
        raise CheckpointError(_explain(source, model, likeness, problems))
    if not tensors:
        raise CheckpointError(f"{source}: not one tensor fits {model}; nothing to load")
    report.unused = problems
    _advise(report, contents, backbone)
    backbone.load_state_dict({**backbone.state_dict(), **tensors}, strict=True)
    return report


def describe(backbone: nn.Module) -> str:
    """Name of the published variant that a backbone is, or its class."""
    for variant in VARIANTS.values():
        theirs, ours = variant.architecture, backbone.architecture
        if variant.family == backbone.family and all(
            getattr(theirs, part) == getattr(ours, part)
            for part in ("widths", "depths", "attention_blocks", "mlp_ratios")
        ):
            return variant.name
    return f"{type(backbone).__name__} of a size of its own"


def _translate(
    backbone: nn.Module, contents: Contents, wanted: Mapping[str, tuple[int, ...]]
) -> Translation:
    if backbone.family not in contents.form.families:
        return Translation(unexplained=list(contents.backbone))
    everything = {**skeleton(backbone.family, backbone.arch, backbone.bias_grid), **wanted}
    return to_native(
        contents.backbone, contents.form, backbone.family, backbone.architecture, everything
    )


def _account_for_drops(
    report: Report, contents: Contents, found: Translation, wanted: Mapping
) -> None:
    prefix = contents.prefix
    for rule, names in found.dropped.items():
        report.drop(rule, [prefix + name for name in names])
    not_built = [name for name in found.tensors if name not in wanted]
    report.drop(NOT_BUILT, [prefix + found.origin[name] for name in not_built])
    for name in not_built:
        del found.tensors[name]
    if contents.others:
        report.drop(contents.others_rule(), contents.others)
    if "ema_state_dict" in contents.entries:
        # mmengine's EMAHook saves the averages as the model's weights, the others beside them.
        report.notes.append("the weights are the moving averages (EMA) of the training")
    if contents.entries:
        report.notes.append(f"entries of the file that are not read: {', '.join(contents.entries)}")


def _fit(
    report: Report, contents: Contents, found: Translation, wanted: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """What to load, and reason -> names of what does not fit; fills in the report."""
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
            place = contents.prefix + found.origin[name]
            problems.setdefault(MISSHAPEN, []).append(
                f"{place} {tuple(tensor.shape)} where {name} is {shape}"
            )
            continue
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            report.cast.add(str(tensor.dtype).removeprefix("torch."))
            tensor = tensor.float()
        if name.endswith(TABLE) and tuple(tensor.shape) != shape:
            report.resized.append((name, tuple(tensor.shape[1:]), shape[1:]))
            tensor = resize_offset_table(tensor, shape[1:])
        tensors[name] = tensor
    if found.unexplained:
        problems[UNEXPLAINED] = [
            f"{contents.prefix}{name} {tuple(contents.backbone[name].shape)}"
            for name in found.unexplained
        ]
    report.loaded = list(tensors)
    return tensors, problems


def _explain(source: str, model: str, likeness, problems: Mapping[str, list[str]]) -> str:
    if likeness is None:
        first = f"this file holds no published variant, the model is {model}."
    elif likeness.variant.name == model and not likeness.complete:
        first = f"this file holds only {likeness}: it is incomplete or of a changed model."
    else:
        first = f"this file holds {likeness}, the model is {model}."
    lines = [f"{source} was not loaded: {first}"]
    for reason, names in problems.items():
        lines.append(f"{len(names)} tensors {reason}:")
        lines += [f"  {name}" for name in names[:LISTED]]
        if len(names) > LISTED:
            lines.append(f"  and {len(names) - LISTED} more")
    lines.append(
        "Build the model that the file was made for, or take the file made for this model. To load "
        "only what fits, say allow_partial=True in init_cfg."
    )
    return "\n".join(lines)


def _advise(report: Report, contents: Contents, backbone: nn.Module) -> None:
    if contents.form is not REFERENCE_DOWNSTREAM:
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
