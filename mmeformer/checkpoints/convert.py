# SPDX-License-Identifier: Apache-2.0
"""Convert checkpoint files between the published formats and ours."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mmeformer.checkpoints import safe_load
from mmeformer.checkpoints.classifier import (
    check_head,
    classifier_state,
    count_as_head,
    head_names,
    head_tensors,
)
from mmeformer.checkpoints.formats import (
    HUGGINGFACE,
    MMPRETRAIN,
    MMPRETRAIN_DOWNSTREAM,
    NATIVE,
    REFERENCE,
    REFERENCE_DOWNSTREAM,
    TABLE,
    TIMM,
    Format,
)
from mmeformer.checkpoints.parse import (
    BACKBONE,
    ParsedCheckpoint,
    check_values,
    parse_checkpoint,
)
from mmeformer.checkpoints.report import Report, shorten
from mmeformer.checkpoints.translate import (
    Translation,
    backbone_shapes,
    from_native,
    identify_variant,
    to_native,
)
from mmeformer.errors import CheckpointError
from mmeformer.files import replacing
from mmeformer.variants import Variant
from mmeformer.version import __version__

TARGETS = ("native", "reference", "timm", "huggingface", "mmpretrain")
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
NO_HEADS = "the file holds no classifier: the model to load into keeps its final norm and heads"
NO_NORMS = (
    "an ImageNet checkpoint has no pyramid norms: they keep their initial values in every model "
    "that loads it"
)
CLASSIFIERS_ONLY = (TIMM, HUGGINGFACE)
"""Formats without detectors and segmentors."""
REFERENCE_RESIZES = (
    "the reference resizes the bias matrix at run time: scores carry over only from models with "
    "bias_resize='matrix'"
)


def convert(
    source: str,
    target: str | Path,
    to: str = "native",
    force: bool = False,
    prefix: str | None = None,
    key: str | None = None,
    ema: bool = False,
) -> Report:
    """Convert a checkpoint file.

    A whole classifier becomes a whole classifier of the other format. Whole models of the reference
    (mmdet 2.x, mmseg 0.x) are converted to whole models of ours and back; the names of necks and
    heads are the same in mmdet 3.x and mmseg 1.x. For formats without such models, only their
    backbone is written.

    Args:
        source: as in :func:`mmeformer.checkpoints.load.load_pretrained`.
        target: file to write: ``.pth``, ``.pt`` or ``.bin`` (tensors and metadata), or
            ``.safetensors`` (tensors, metadata as text).
        to: one of :data:`TARGETS`; ``"huggingface"`` and ``"mmpretrain"`` have V1 only.
        force: overwrite ``target`` if it exists.
        prefix: start of the backbone's names in the source; None finds it.
        key: entry of the source that holds the tensors; None finds it.
        ema: take the moving averages of the weights, where the source has both.

    Raises:
        FileExistsError: ``target`` exists and ``force`` is not given.
        FileNotFoundError: the source does not exist.
        ValueError: ``to`` or the suffix of ``target`` is unknown.
        CheckpointError: the source cannot be read or is incomplete, or the target cannot be
            written; an existing target stays as it was.
    """
    target = Path(target).expanduser()
    if to not in TARGETS:
        raise ValueError(f"to must be one of {TARGETS}, but is {to!r}")
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{target} must end in one of {', '.join(SUFFIXES)}")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists: choose another name, or force overwriting it")
    content, report = convert_content(safe_load.load(source), str(source), to, prefix, key, ema)
    write(content, target)
    report.notes.append(f"written to {target}")
    return report


def convert_content(
    content: Mapping[str, object],
    source: str,
    to: str,
    prefix: str | None = None,
    key: str | None = None,
    ema: bool = False,
) -> tuple[dict[str, dict[str, object]], Report]:
    """Convert a checkpoint that was already read; see :func:`convert`.

    Returns:
        ``{"state_dict" or "model": tensors, "meta": dict}``, and the report.
    """
    parsed = parse_checkpoint(content, source, prefix, key, ema)
    form = _target_format(to, parsed)
    variant = _require_variant(parsed, form)
    found = _to_native(parsed, variant)
    check_head(head_tensors(parsed), variant, source)
    check_values(
        {parsed.prefix + found.origin[name]: tensor for name, tensor in found.tensors.items()},
        source,
    )
    # Other parts of a detector may count or index with integers.
    check_values(
        {name: value for name, value in parsed.other_tensors.items() if value.is_floating_point()},
        source,
    )
    report = Report(
        title=f"converted to {to}",
        source=source,
        format=parsed.format.title,
        variant=variant.name,
        loaded=[name for name in found.tensors if form.holds(name)],
    )
    for rule, names in found.dropped.items():
        report.drop(rule, [parsed.prefix + name for name in names])
    state, no_place = from_native(found.tensors, form, variant.family, variant.architecture)
    for rule, names in no_place.items():
        report.drop(rule, names)
    state = _add_other_parts(state, parsed, form, report)
    report.notes += parsed.notes
    report.warnings += parsed.warnings
    if parsed.other_entries:
        report.notes.append(f"entries of the file left out: {', '.join(parsed.other_entries)}")
    meta = _convert_meta(parsed, to)
    grid = find_bias_grid(found.tensors)
    meta["mmeformer"] = {
        "variant": variant.name,
        "source": source.rsplit("/", 1)[-1],
        "source_format": parsed.format.title,
        "converted_to": to,
        "bias_grid": list(grid),
        "version": __version__,
    }
    _add_advice(report, parsed.format, form, variant, grid, found.tensors)
    key = "model" if form is REFERENCE else "state_dict"
    return {key: {**state}, "meta": meta}, report


def _require_variant(parsed: ParsedCheckpoint, form: Format) -> Variant:
    """The published variant that a checkpoint holds completely and that a format has."""
    held = identify_variant(parsed.backbone, parsed.format)
    if held is None or not held.complete:
        raise CheckpointError(
            f"{parsed.source} holds {held or 'no published variant'}: only complete backbones of "
            "the published variants can be converted"
        )
    if held.variant.family not in form.families:
        raise CheckpointError(
            f"{parsed.source} holds {held.variant.name}, which {form.title} does not have"
        )
    return held.variant


def _add_other_parts(
    state: dict[str, Tensor], parsed: ParsedCheckpoint, form: Format, report: Report
) -> dict[str, Tensor]:
    """State dict of the whole model if the format has such models, else of the backbone.

    Args:
        state: of the backbone, in the names of ``form``.
        parsed: the checkpoint with the other parts.
        form: to convert to.
        report: of the conversion.
    """
    if head := head_tensors(parsed):
        count_as_head(report, head_names(parsed))
        return classifier_state(state, head, form)
    if not parsed.other_tensors:
        return state
    if form in CLASSIFIERS_ONLY:
        report.drop(parsed.other_parts(), parsed.other_tensors)
        return state
    report.notes.append(f"kept as they are: {len(parsed.other_tensors)} {parsed.other_parts()}")
    whole = {f"{BACKBONE}{name}": tensor for name, tensor in state.items()}
    return whole | parsed.other_tensors


def _to_native(parsed: ParsedCheckpoint, variant: Variant) -> Translation:
    shapes = backbone_shapes(variant.family, variant.arch)
    found = to_native(parsed.backbone, parsed.format, variant.family, variant.architecture, shapes)
    if found.unexplained:
        unknown = [
            f"{parsed.prefix}{name} {tuple(parsed.backbone[name].shape)}"
            for name in found.unexplained
        ]
        raise CheckpointError(
            f"{parsed.source} holds {variant.name} and tensors that are no part of it: "
            f"{shorten(unknown)}"
        )
    return found


def _target_format(to: str, parsed: ParsedCheckpoint) -> Format:
    downstream = bool(parsed.other_tensors) and not head_names(parsed)
    if to == "mmpretrain":
        downstream |= parsed.format is MMPRETRAIN_DOWNSTREAM
        return MMPRETRAIN_DOWNSTREAM if downstream else MMPRETRAIN
    if to == "reference":
        # The reference's detectors and segmentors store their trained tables under another name.
        downstream |= parsed.format is REFERENCE_DOWNSTREAM
        return REFERENCE_DOWNSTREAM if downstream else REFERENCE
    return {"native": NATIVE, "timm": TIMM, "huggingface": HUGGINGFACE}[to]


def find_bias_grid(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the ``bias_grid`` of a backbone, from its tensors in our names and shapes."""
    table = next(
        tensor
        for name, tensor in tensors.items()
        if name.startswith("stages.3.blocks.") and name.endswith(TABLE)
    )
    _, rows, columns = table.shape
    return rows, columns


def _add_advice(
    report: Report,
    source_format: Format,
    target_format: Format,
    variant: Variant,
    grid: tuple[int, int],
    tensors: Mapping[str, Tensor],
) -> None:
    if source_format is REFERENCE_DOWNSTREAM and target_format is NATIVE:
        report.notes.append(
            f"load it into {variant.name} with bias_grid={grid} and bias_resize='matrix'"
        )
    if target_format is REFERENCE_DOWNSTREAM and source_format is NATIVE:
        report.warnings.append(REFERENCE_RESIZES)
    if target_format in (REFERENCE, TIMM, HUGGINGFACE, MMPRETRAIN):
        if not report.head:
            report.notes.append(NO_HEADS)
        if grid != (7, 7):
            report.warnings.append(
                f"the bias tables have the grid {grid}, but those of a model at 224 px are 7 x 7: "
                f"the model to load into must be made for {32 * grid[0]} x {32 * grid[1]} px"
            )
    has_norms = any(name.startswith("norms.") for name in tensors)
    if target_format is NATIVE and variant.family == "v1" and not (has_norms or report.head):
        report.notes.append(NO_NORMS)


def _convert_meta(parsed: ParsedCheckpoint, to: str) -> dict[str, object]:
    meta = {str(key): _to_plain(value) for key, value in parsed.meta.items()}
    # The reference stores its arguments and epoch beside the weights instead of under "meta".
    for key, value in parsed.other_entries.items():
        if isinstance(value, (int, float, str, argparse.Namespace)):
            meta[key] = _to_plain(value)
    # mmdet 2.x and mmseg 0.x name the classes one way, their successors another.
    dataset_meta = meta.get("dataset_meta")
    dataset_meta = dataset_meta if isinstance(dataset_meta, dict) else {}
    known = {str(key).lower(): value for key, value in dataset_meta.items()}
    for name in ("classes", "palette"):
        if to == "native" and name.upper() in meta:
            dataset_meta = {name: meta[name.upper()], **dataset_meta}
            meta["dataset_meta"] = dataset_meta
        elif to == "reference" and name in known:
            meta.setdefault(name.upper(), known[name])
    return meta


def _to_plain(value: object) -> object:
    """Convert a value to Python's built-in types, which every reader accepts."""
    if isinstance(value, argparse.Namespace):
        return _to_plain(vars(value))
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def write(content: Mapping[str, Mapping[str, object]], target: Path) -> None:
    """Write a checkpoint in the container that the target's suffix names, completely or not at all.

    Args:
        content: as :func:`convert_content` returns it.
        target: file to write.

    Raises:
        CheckpointError: it cannot be written; the message names the file.
    """
    try:
        with replacing(target, sync=True) as draft:
            if target.suffix == ".safetensors":
                state = content["state_dict"] if "state_dict" in content else content["model"]
                tensors = {
                    name: tensor.contiguous()
                    for name, tensor in state.items()
                    if isinstance(tensor, Tensor)
                }
                metadata = {"format": "pt", "meta": json.dumps(content["meta"])}
                safetensors.torch.save_file(tensors, draft, metadata)
            else:
                torch.save(dict(content), draft)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = str(error)
        if isinstance(error, OSError) and error.filename:
            reason = f"{error.filename}: {error.strerror}"
        raise CheckpointError(f"{target} could not be written: {reason}") from error
