# SPDX-License-Identifier: Apache-2.0
"""Convert checkpoint files between the published formats and ours."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from mmeformer.checkpoints import safe_load
from mmeformer.checkpoints.contents import BACKBONE, Contents, check_values, take_apart
from mmeformer.checkpoints.formats import (
    NATIVE,
    REFERENCE,
    REFERENCE_DOWNSTREAM,
    TIMM,
    Format,
)
from mmeformer.checkpoints.report import Report, shorten
from mmeformer.checkpoints.translate import (
    TABLE,
    Translation,
    from_native,
    identify,
    skeleton,
    to_native,
)
from mmeformer.errors import CheckpointError
from mmeformer.variants import Variant
from mmeformer.version import __version__

TARGETS = ("native", "reference", "timm")
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
ABSENT_HEADS = "the classifier's heads and final norm are not part of a backbone and are left out"
NO_NORMS = (
    "an ImageNet checkpoint has no pyramid norms: they start anew in every model that loads it"
)
REFERENCE_RESIZES = (
    "the reference resizes the bias matrix at run time: scores carry over only from models with "
    "bias_resize='matrix'"
)


def convert(source: str, target: str | Path, to: str = "native", force: bool = False) -> Report:
    """Convert a checkpoint file.

    Whole models of the reference (mmdet 2.x, mmseg 0.x) become whole models of ours and back; the
    names of necks and heads are the same in mmdet 3.x and mmseg 1.x. timm's format takes the
    backbone alone out of a whole model.

    Args:
        source: as in :func:`mmeformer.checkpoints.load.load_pretrained`.
        target: file to write: ``.pth``, ``.pt`` or ``.bin`` (tensors and metadata), or
            ``.safetensors`` (tensors, metadata as text). Written under a temporary name first.
        to: ``"native"``, ``"reference"`` or ``"timm"``.
        force: overwrite ``target`` if it exists.

    Raises:
        FileExistsError: ``target`` exists and ``force`` is not given.
        FileNotFoundError: no such source.
        ValueError: unknown ``to`` or suffix of ``target``.
        CheckpointError: the source cannot be read or is not whole; nothing is written.
    """
    target = Path(target).expanduser()
    if to not in TARGETS:
        raise ValueError(f"to must be one of {TARGETS}, but is {to!r}")
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{target} must end in one of {', '.join(SUFFIXES)}")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists: choose another name, or force overwriting it")
    content, report = converted(safe_load.load(source), str(source), to)
    write(content, target)
    report.notes.append(f"written to {target}")
    return report


def converted(content: Mapping, source: str, to: str) -> tuple[dict, Report]:
    """What :func:`convert` writes, from a dict that was already read, and its report.

    Returns:
        ``{"state_dict" or "model": tensors, "meta": dict}``.
    """
    contents = take_apart(content, source)
    likeness = identify(contents.backbone, contents.form)
    if likeness is None or not likeness.complete:
        raise CheckpointError(
            f"{source} holds {likeness or 'no published variant'}: only whole backbones of the "
            "published variants can be converted"
        )
    variant = likeness.variant
    found = _to_native(contents, variant, source)
    check_values(
        {contents.prefix + found.origin[name]: tensor for name, tensor in found.tensors.items()},
        source,
    )
    check_values(_weights(contents.others), source)
    form = _target_form(to, contents)
    report = Report(
        title=f"converted to {to}",
        source=source,
        format=contents.form.title,
        variant=variant.name,
        loaded=[name for name in found.tensors if form.holds(name)],
    )
    for rule, names in found.dropped.items():
        report.drop(rule, [contents.prefix + name for name in names])
    state, homeless = from_native(found.tensors, form, variant.family, variant.architecture)
    for rule, names in homeless.items():
        report.drop(rule, names)
    whole = bool(contents.others)
    if whole and form is not TIMM:
        state = {f"{BACKBONE}{name}": tensor for name, tensor in state.items()}
        state |= contents.others
        report.notes.append(f"kept as they are: {len(contents.others)} {contents.others_rule()}")
    elif whole:
        report.drop(contents.others_rule(), contents.others)
    if contents.entries:
        report.notes.append(f"entries of the file left out: {', '.join(contents.entries)}")
    meta = _meta(content, contents, variant, found.tensors, source, to)
    _advise(report, contents, form, found.tensors, variant)
    key = "model" if form is REFERENCE else "state_dict"
    return {key: state, "meta": meta}, report


def _to_native(contents: Contents, variant: Variant, source: str) -> Translation:
    shapes = skeleton(variant.family, variant.arch)
    found = to_native(
        contents.backbone, contents.form, variant.family, variant.architecture, shapes
    )
    if found.unexplained:
        strangers = [
            f"{contents.prefix}{name} {tuple(contents.backbone[name].shape)}"
            for name in found.unexplained
        ]
        raise CheckpointError(
            f"{source} holds {variant.name} and tensors that are no part of it: "
            f"{shorten(strangers)}"
        )
    return found


def _target_form(to: str, contents: Contents) -> Format:
    if to == "reference":
        # The reference's detectors and segmentors keep their trained tables by another name.
        downstream = bool(contents.others) or contents.form is REFERENCE_DOWNSTREAM
        return REFERENCE_DOWNSTREAM if downstream else REFERENCE
    return {"native": NATIVE, "timm": TIMM}[to]


def _weights(others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The floating point tensors; other parts of a detector may well count or index."""
    return {name: tensor for name, tensor in others.items() if tensor.is_floating_point()}


def bias_grid(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """The ``bias_grid`` of a backbone, from its tensors in our names and shapes."""
    table = next(
        tensor
        for name, tensor in tensors.items()
        if name.startswith("stages.3.blocks.") and name.endswith(TABLE)
    )
    return tuple(table.shape[1:])


def _advise(report: Report, contents: Contents, form: Format, tensors: Mapping, variant) -> None:
    grid = bias_grid(tensors)
    if contents.form is REFERENCE_DOWNSTREAM and form is NATIVE:
        report.notes.append(
            f"load it into {variant.name} with bias_grid={grid} and bias_resize='matrix'"
        )
    if form is REFERENCE_DOWNSTREAM and contents.form is NATIVE:
        report.warnings.append(REFERENCE_RESIZES)
    if form in (REFERENCE, TIMM):
        report.notes.append(ABSENT_HEADS)
        if grid != (7, 7):
            report.warnings.append(
                f"the bias tables have the grid {grid}, but those of a model at 224 px are 7 x 7: "
                f"the model to load into must be made for {32 * grid[0]} x {32 * grid[1]} px"
            )
    bare = not any(name.startswith("norms.") for name in tensors)
    if form is NATIVE and variant.family == "v1" and bare:
        report.notes.append(NO_NORMS)


def _meta(content, contents: Contents, variant: Variant, tensors, source: str, to: str) -> dict:
    meta = {str(key): _plain(value) for key, value in contents.meta.items()}
    # The reference keeps its arguments and epoch beside the weights instead of under "meta".
    for key in contents.entries:
        if isinstance(content[key], (int, float, str, argparse.Namespace)):
            meta[key] = _plain(content[key])
    # mmdet 2.x and mmseg 0.x name the classes one way, their successors another.
    known = {str(key).lower(): value for key, value in meta.get("dataset_meta", {}).items()}
    for name in ("classes", "palette"):
        if to == "native" and name.upper() in meta:
            meta["dataset_meta"] = {name: meta[name.upper()], **meta.get("dataset_meta", {})}
        elif to == "reference" and name in known:
            meta.setdefault(name.upper(), known[name])
    meta["mmeformer"] = {
        "variant": variant.name,
        "source": source.rsplit("/", 1)[-1],
        "source_format": contents.form.title,
        "converted_to": to,
        "bias_grid": list(bias_grid(tensors)),
        "version": __version__,
    }
    return meta


def _plain(value):
    """A value that any reader can read: no types beyond Python's own."""
    if isinstance(value, argparse.Namespace):
        return _plain(vars(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def write(content: Mapping, target: Path) -> None:
    """Write a checkpoint under a temporary name beside ``target``, then rename it.

    Raises:
        CheckpointError: it cannot be written; names the file.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
    except OSError as error:
        raise CheckpointError(
            f"{target} could not be written: {error.filename}: {error.strerror}"
        ) from error
    try:
        if target.suffix == ".safetensors":
            state = content.get("state_dict", content.get("model"))
            state = {name: tensor.contiguous() for name, tensor in state.items()}
            metadata = {"format": "pt", "meta": json.dumps(content["meta"])}
            safetensors.torch.save_file(state, temporary, metadata)
        else:
            torch.save(dict(content), temporary)
        # A temporary file is private; the checkpoint gets the usual rights of a new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except OSError as error:
        raise CheckpointError(f"{target} could not be written: {error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
