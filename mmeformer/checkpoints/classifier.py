# SPDX-License-Identifier: Apache-2.0
"""Find the head of a published classifier: its final norm and its one or two linear layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mmeformer.checkpoints.formats import NATIVE, Format
from mmeformer.checkpoints.parse import BACKBONE, ParsedCheckpoint, check_values
from mmeformer.checkpoints.report import Report, shorten
from mmeformer.errors import CheckpointError
from mmeformer.variants import Variant

REQUIRED = ("norm.weight", "norm.bias", "fc.weight", "fc.bias")
"""Tensors that every head has; distilled ones have ``fc_dist`` too, and V2's norm statistics."""


def head_names(parsed: ParsedCheckpoint) -> dict[str, str]:
    """Names of the head's tensors in a whole classifier.

    Returns:
        Our name (such as ``fc.weight``) -> name in the file; empty if the file is not a classifier
        or has parts of other models.
    """
    modules = {theirs: ours for ours, theirs in parsed.format.classifier.items()}
    wrapper = parsed.prefix.partition(BACKBONE)[0]
    found = {}
    for name in (*(parsed.prefix + name for name in parsed.backbone), *parsed.other_tensors):
        module, _, leaf = name.removeprefix(wrapper).rpartition(".")
        if module in modules:
            found[f"{modules[module]}.{leaf}"] = name
    foreign = set(parsed.other_tensors) - set(found.values())
    return {} if foreign or not found.keys() >= set(REQUIRED) else found


def head_tensors(parsed: ParsedCheckpoint) -> dict[str, Tensor]:
    """The head of a whole classifier: our name -> tensor; empty as in :func:`head_names`."""
    everything = {parsed.prefix + name: tensor for name, tensor in parsed.backbone.items()}
    everything |= parsed.other_tensors
    return {ours: everything[theirs] for ours, theirs in head_names(parsed).items()}


def check_head(head: Mapping[str, Tensor], variant: Variant, source: str) -> None:
    """Check that the tensors of a head are complete and fit the backbone of a published variant.

    Args:
        head: see :func:`head_tensors`; empty if there is none.
        variant: of the backbone.
        source: the file, for messages.

    Raises:
        CheckpointError: they do not; the message names the tensors.
    """
    if not head:
        return
    width = variant.architecture.widths[-1]
    classes = len(head["fc.weight"])
    statistics = ("running_mean", "running_var") if variant.family == "v2" else ()
    wanted: dict[str, tuple[int, ...]] = {
        f"norm.{leaf}": (width,) for leaf in ("weight", "bias", *statistics)
    }
    for module in ("fc", "fc_dist"):
        if module == "fc" or any(name.startswith("fc_dist.") for name in head):
            wanted |= {f"{module}.weight": (classes, width), f"{module}.bias": (classes,)}
    found = {
        name: tuple(tensor.shape)
        for name, tensor in head.items()
        if not (statistics and name == "norm.num_batches_tracked")
    }
    wrong = [
        f"{name} {found.get(name, 'missing')} instead of {wanted.get(name, 'nothing')}"
        for name in sorted({*wanted, *found})
        if found.get(name) != wanted.get(name)
    ]
    if wrong:
        raise CheckpointError(
            f"{source} holds {variant.name} with a head that does not fit it: {shorten(wrong, 4)}. "
            "Use an intact file"
        )
    check_values(head, source)


def classifier_state(
    backbone: Mapping[str, Tensor], head: Mapping[str, Tensor], form: Format
) -> dict[str, Tensor]:
    """State dict of a whole classifier.

    Args:
        backbone: name in ``form`` (no prefix) -> tensor.
        head: our name -> tensor.
        form: the format.
    """
    state = {form.prefix + name: tensor for name, tensor in backbone.items()}
    for name, tensor in head.items():
        module, _, leaf = name.rpartition(".")
        state[f"{form.classifier[module]}.{leaf}"] = tensor
    return state


def count_as_head(report: Report, names: Mapping[str, str]) -> None:
    """Move the tensors of a head from those that a report lists as left out.

    Args:
        report: of the backbone.
        names: see :func:`head_names`.
    """
    ours = set(names.values())
    kept = {
        rule: [name for name in dropped if name not in ours]
        for rule, dropped in report.dropped.items()
    }
    report.dropped = {rule: dropped for rule, dropped in kept.items() if dropped}
    report.head = list(classifier_state({}, dict.fromkeys(names, Tensor()), NATIVE))
