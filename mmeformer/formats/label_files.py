# SPDX-License-Identifier: Apache-2.0
"""What the formats share that have one label file for each image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmeformer.checks.findings import ERROR, Finding
from mmeformer.formats.lists import split_by_lists
from mmeformer.formats.tree import Tree, is_drawn, read_sizes
from mmeformer.labeled import BOXES, LabeledData, LabeledImage


def joined(
    name: str,
    tree: Tree,
    found: Sequence[LabeledImage],
    labels: Mapping[str, int],
    findings: list[Finding],
    missing: str,
) -> LabeledData:
    """The data set of all label files, of boxes; its classes are in alphabetical order.

    Args:
        name: of the format.
        tree: of the folder.
        found: one for each label file; sizes of 0 are unknown.
        labels: label of each class in ``found``.
        findings: so far.
        missing: what images without labels have none of.
    """
    images = _with_one_label_file(found, findings)
    notes: list[str] = []
    split_by_lists(tree, images, notes)
    kept = _of_labeled_size(images, findings)
    classes = sorted(labels)
    place = {labels[title]: index for index, title in enumerate(classes)}
    for image in kept:
        for item in image.objects:
            item.label = place[item.label]
    known = {image.path for image in found}
    if bare := [path for path in tree.images if path not in known and not is_drawn(path)]:
        shown = bare[0].relative_to(tree.root)
        notes.append(f"{len(bare)} images have no {missing} and are left out, such as {shown}")
    return LabeledData(name, tree.root, BOXES, tuple(classes), kept, findings, notes)


def _with_one_label_file(
    images: Sequence[LabeledImage], findings: list[Finding]
) -> list[LabeledImage]:
    """Images that one label file is for; of several, nobody knows which one is right.

    Adds a finding for each label file that is not the first of its image.
    """
    by_path: dict[Path, list[LabeledImage]] = defaultdict(list)
    for image in images:
        by_path[image.path].append(image)
    for path, (first, *others) in by_path.items():
        for other in others:
            text = (
                f"is for {path}, as {first.source} is; remove one of them, or name the folders of "
                "label files like those of their images"
            )
            findings.append(Finding(ERROR, "two label files", str(other.source), text))
    return [found[0] for found in by_path.values() if len(found) == 1]


def _of_labeled_size(images: Sequence[LabeledImage], findings: list[Finding]) -> list[LabeledImage]:
    """Images that can be read and have the size that their labels are for; sets unknown sizes.

    Adds a finding for each of the others.
    """
    sizes = read_sizes([image.path for image in images], findings)
    kept = []
    for image in images:
        if (size := sizes.get(image.path)) is None:
            continue
        if (image.width, image.height) not in (size, (0, 0)):
            text = (
                f"is {size[0]} x {size[1]} px, but its labels are for {image.width} x "
                f"{image.height} px; use the image that was labeled"
            )
            findings.append(Finding(ERROR, "wrong size", str(image.path), text))
            continue
        image.width, image.height = size
        kept.append(image)
    return kept
