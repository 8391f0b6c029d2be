# SPDX-License-Identifier: Apache-2.0
"""The published checkpoint formats, and how to recognize the format of a state dict.

A format is one function from our tensor names to its names, one from our shapes to its shapes, and
named rules that drop tensors which are not part of a backbone. Everything else in this package
works with any format: a new format is a new file and an entry here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from mmeformer.checkpoints.huggingface import huggingface_name
from mmeformer.checkpoints.mmpretrain import mmpretrain_name
from mmeformer.checkpoints.reference import reference_layout, reference_name
from mmeformer.checkpoints.timm import timm_name
from mmeformer.variants import Architecture

HEADS = "classifier heads"
FINAL_NORM = "final norm of the classifier"
INDICES = "computed indices, not weights"
UNREAD_TABLES = "ImageNet bias tables that the reference never reads downstream"
NO_PLACE = "pyramid norms, which this format has no place for"

TABLE = ".attention_bias.table"
"""End of our name of a bias table."""

_NORM_LEAVES = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


@dataclass(frozen=True)
class Format:
    """Names and shapes that a format gives to the tensors of a backbone.

    Args:
        title: name of the format in reports.
        name: (our name, family, architecture) -> its name; injective.
        layout: (our name, our tensor, family) -> its tensor, a reshape.
        families: the families that it exists for.
        pyramid_norms: whether it has V1's norms of the pyramid levels.
        drops: (pattern of its names, rule) of tensors that are not part of a backbone.
        classifier: module of our classifier's head (final norm ``norm``, linear layers ``fc`` and
            ``fc_dist``) -> its name in a whole classifier; empty if the format has none.
        prefix: start of the backbone's names in a whole classifier.
    """

    title: str
    name: Callable[[str, str, Architecture], str]
    layout: Callable[[str, Tensor, str], Tensor]
    families: tuple[str, ...] = ("v1", "v2")
    pyramid_norms: bool = False
    drops: tuple[tuple[str, str], ...] = ()
    classifier: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""

    def holds(self, name: str) -> bool:
        """Whether our tensor ``name`` has a place in this format."""
        return self.pyramid_norms or not name.startswith("norms.")

    def rule(self, foreign: str) -> str | None:
        """The rule that drops the tensor ``foreign``, or None."""
        for pattern, rule in self.drops:
            if re.fullmatch(pattern, foreign):
                return rule
        return None


def _same_name(name: str, family: str, architecture: Architecture) -> str:
    return name


def _same_layout(name: str, tensor: Tensor, family: str) -> Tensor:
    return tensor


def _flat_tables(name: str, tensor: Tensor, family: str) -> Tensor:
    """Reshape a bias table as everywhere but in our format: (heads, rows * columns)."""
    return tensor.flatten(1) if name.endswith(TABLE) else tensor


NATIVE = Format(
    "mmeformer",
    _same_name,
    _same_layout,
    pyramid_norms=True,
    classifier={"norm": "head.norm", "fc": "head.fc", "fc_dist": "head.fc_dist"},
    prefix="backbone.",
)
REFERENCE = Format(
    "reference implementation, classification",
    partial(reference_name, downstream=False),
    reference_layout,
    drops=(
        (r"(dist_)?head\.(weight|bias)", HEADS),
        (rf"norm\.{_NORM_LEAVES}", FINAL_NORM),
        (r".+\.attention_bias_idxs", INDICES),
    ),
    classifier={"norm": "norm", "fc": "head", "fc_dist": "dist_head"},
)
REFERENCE_DOWNSTREAM = Format(
    "reference implementation, detection or segmentation",
    partial(reference_name, downstream=True),
    reference_layout,
    pyramid_norms=True,
    drops=(
        (r".+\.attention_bias_idxs(_seg)?", INDICES),
        (r".+\.attention_biases", UNREAD_TABLES),
    ),
)
TIMM = Format(
    "timm",
    timm_name,
    _flat_tables,
    drops=(
        (r"head(_dist)?\.(weight|bias)", HEADS),
        (rf"norm\.{_NORM_LEAVES}", FINAL_NORM),
        (r".+\.attention_bias_idxs", INDICES),
    ),
    classifier={"norm": "norm", "fc": "head", "fc_dist": "head_dist"},
)
HUGGINGFACE = Format(
    "Hugging Face transformers",
    huggingface_name,
    _flat_tables,
    families=("v1",),
    drops=(
        (r"(distillation_)?classifier\.(weight|bias)", HEADS),
        (rf"efficientformer\.layernorm\.{_NORM_LEAVES}", FINAL_NORM),
        (r".+\.attention_bias_idxs", INDICES),
    ),
    classifier={
        "norm": "efficientformer.layernorm",
        "fc": "classifier",
        "fc_dist": "distillation_classifier",
    },
)
MMPRETRAIN = Format(
    "mmpretrain, classification",
    mmpretrain_name,
    _flat_tables,
    families=("v1",),
    drops=((rf"norm3\.{_NORM_LEAVES}", FINAL_NORM), (r".+\.attention_bias_idxs", INDICES)),
    classifier={"norm": "backbone.norm3", "fc": "head.head", "fc_dist": "head.dist_head"},
    prefix="backbone.",
)
MMPRETRAIN_DOWNSTREAM = Format(
    "mmpretrain, backbone of a detector or segmentor",
    mmpretrain_name,
    _flat_tables,
    families=("v1",),
    pyramid_norms=True,
    drops=((r".+\.attention_bias_idxs", INDICES),),
)

# Patterns of names that occur in one format only, most specific first. The last one also matches
# those parts of timm's V2 files that have no attention, where timm's names and ours are the same.
_MARKS = (
    (r"efficientformer\.(patch_embed|encoder)\..+", HUGGINGFACE),
    (r"network\.\d+\..+\.attention_biases_seg", REFERENCE_DOWNSTREAM),
    (r"patch_embed\.\d\.(conv|bn)\..+|network\.\d\.\d+\.(ls[12]|conv|bn)\..+", MMPRETRAIN),
    (r"(network|patch_embed)\.\d+\..+", REFERENCE),
    (r"stages\.\d\..+\.attention_bias\.table|norms\.\d\..+", NATIVE),
    (r"stages\.\d\..+\.attention_biases|stem\.norm\d\..+|head(_dist)?\.weight", TIMM),
    (r"(stem|stages)\..+", NATIVE),
)


def detect(names: Iterable[str]) -> Format | None:
    """Recognize the format of a backbone by its tensor names (no prefix); None if it is unknown."""
    names = list(names)
    for pattern, form in _MARKS:
        if not any(re.fullmatch(pattern, name) for name in names):
            continue
        # A classifier of mmpretrain has a norm after the last stage only.
        if form is MMPRETRAIN and any(re.match(r"norm[012]\.", name) for name in names):
            return MMPRETRAIN_DOWNSTREAM
        return form
    return None
