# SPDX-License-Identifier: Apache-2.0
"""Lists of images that tell the splits: VOC's ``ImageSets``, or ``train.txt`` and the like.

Format of VOC: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from mmeformer.checks.findings import shorten
from mmeformer.formats.tree import Tree, in_common, read_names, same_ending, split_named
from mmeformer.images import IMAGE_SUFFIXES
from mmeformer.labeled import SPLITS, LabeledImage

_IMAGE_SETS = "imagesets"
_SUFFIXES = (*IMAGE_SUFFIXES, ".xml", ".txt", ".json")
# VOC's lists of one class: 1 has it, -1 has it not, 0 is difficult.
_LABEL_COLUMN = re.compile(r"\s+(?:-1|0|\+?1)$")


@dataclass
class _List:
    """Names of the images of a split, from one file or from those of all classes.

    Args:
        files: which list them.
        split: of them.
        lines: of the files, each once.
    """

    files: list[Path]
    split: str
    lines: dict[str, None] = field(default_factory=dict)

    def title(self, tree: Tree) -> str:
        """Its name for people."""
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0].relative_to(tree.root)}{more}"


def split_by_lists(
    tree: Tree, images: Iterable[LabeledImage], notes: list[str], task: str = "Main"
) -> None:
    """Set the splits of images by the lists of a folder, in place, and note what does not fit.

    Lists in ``ImageSets`` count more than the names of folders. Others, such as ``train.txt``,
    count if no folder tells a split. Images that the lists leave out belong to no split.

    Args:
        tree: of the folder.
        images: that are labeled, with the splits that folders tell.
        notes: get the names that are listed but not labeled, and images of two lists.
        task: folder in ``ImageSets`` whose lists come first.
    """
    images = list(images)
    lists = _image_sets(tree, task)
    if not lists and not any(image.split for image in images):
        labels = {image.source for image in images}
        loose = [path for path in tree.with_suffix(".txt") if path not in labels]
        lists = _whole(path for path in loose if _IMAGE_SETS not in _folders(path, tree))
    if not lists:
        return
    names = _names(images)
    splits: dict[Path, _List] = {}
    for listed in sorted(lists, key=lambda listed: SPLITS.index(listed.split)):
        found, missing = _resolve(listed, images, names, tree)
        if missing:
            notes.append(
                f"{listed.title(tree)}: {len(missing)} of {len(listed.lines)} names have no "
                f"labeled image here, such as {shorten(missing[0])}"
            )
        both = [path for path in found if splits.setdefault(path, listed).split != listed.split]
        if both:
            first = splits[both[0]]
            notes.append(
                f"{listed.title(tree)}: {len(both)} of its images are for {first.split} by "
                f"{first.title(tree)}, and count there, such as {both[0].relative_to(tree.root)}"
            )
    if splits:
        for image in images:
            image.split = splits[image.path].split if image.path in splits else None


def _folders(path: Path, tree: Tree) -> list[str]:
    """Folders of a file below the root, in lower case."""
    return [name.lower() for name in path.relative_to(tree.root).parts[:-1]]


def _image_sets(tree: Tree, task: str) -> list[_List]:
    """Lists of a task in ``ImageSets``, else those directly in it, else those of another task."""
    texts: dict[str, list[Path]] = defaultdict(list)
    for path in tree.with_suffix(".txt"):
        folders = _folders(path, tree)
        if _IMAGE_SETS in folders:
            texts["".join(folders[folders.index(_IMAGE_SETS) + 1 :][:1])].append(path)
    for place in (task.lower(), "", *sorted(texts)):
        if lists := _lists(texts.get(place, [])):
            return lists
    return []


def _whole(paths: Iterable[Path]) -> list[_List]:
    """Lists that are named like a split."""
    return [
        _List([path], split, dict.fromkeys(read_names(path)))
        for path in paths
        if (split := split_named(path.stem))
    ]


def _lists(paths: Sequence[Path]) -> list[_List]:
    """Lists of splits; for splits without one, those of their classes (``cat_train.txt``).

    Without both, ``trainval.txt`` lists the images to train on.
    """
    lists = _whole(paths)
    known = {listed.split for listed in lists}
    of_classes: dict[tuple[Path, str], _List] = {}
    for path in paths:
        name, _, word = path.stem.rpartition("_")
        split = split_named(word)
        if not name or split is None or split in known:
            continue
        lines = read_names(path)
        if lines and all(map(_LABEL_COLUMN.search, lines)):
            listed = of_classes.setdefault((path.parent, split), _List([], split))
            listed.files.append(path)
            listed.lines.update(dict.fromkeys(_LABEL_COLUMN.sub("", line) for line in lines))
    lists += of_classes.values()
    if not {"train", "val"} & {listed.split for listed in lists}:
        lists += [
            _List([path], "train", dict.fromkeys(read_names(path)))
            for path in paths
            if path.stem.lower() == "trainval"
        ]
    return lists


def _names(images: Sequence[LabeledImage]) -> dict[str, list[LabeledImage]]:
    """Images by their file names, and by these and those of their label files without suffix."""
    names: dict[str, list[LabeledImage]] = defaultdict(list)
    for image in images:
        stems = {path.stem for path in _files(image)}
        for name in {image.path.name, *stems}:
            names[name].append(image)
    return names


def _files(image: LabeledImage) -> list[Path]:
    return [path for path in (image.path, image.source, image.mask) if path is not None]


def _resolve(
    listed: _List,
    images: Sequence[LabeledImage],
    names: Mapping[str, list[LabeledImage]],
    tree: Tree,
) -> tuple[list[Path], list[str]]:
    """The images that a list means, and its lines that mean none.

    Of images of one name, those count whose folders end like the listed path, then those with most
    folders of the list; a bare name that several images have alike means all of them.
    """
    place = listed.files[0].parent
    folders = _folders(place / "-", tree)
    if _IMAGE_SETS in folders:
        depth = folders.index(_IMAGE_SETS)
        place = tree.root.joinpath(*place.relative_to(tree.root).parts[:depth])

    def is_below(image: LabeledImage) -> bool:
        return any(path.is_relative_to(place) for path in _files(image))

    # Of several sets in one folder, such as VOC2007 and VOC2012, each has its own lists.
    bound = any(map(is_below, images))
    own = listed.files[0].relative_to(tree.root).parts[:-1]
    best: dict[str, tuple[int, list[Path]]] = {}
    bare = set()
    for line in listed.lines:
        name, found = _lookup(line, names)
        found = [image for image in found if not bound or is_below(image)]
        given = [part for part in name.parts[:-1] if part not in (".", "..", "/")]
        if not given:
            bare.add(line)
        ranks = [
            (
                max(same_ending(path.parts[:-1], given) for path in _files(image)),
                in_common(image.path.relative_to(tree.root).parts[:-1], own),
            )
            for image in found
        ]
        if ranks:
            top = max(ranks)
            kept = [image.path for image, rank in zip(found, ranks, strict=True) if rank == top]
            best[line] = top[0], kept
    # Paths of another machine may have no folder of this one. But where some have, the others are
    # of images that are not here.
    exact = any(same for same, _ in best.values())
    fits = {
        line: paths for line, (same, paths) in best.items() if same or line in bare or not exact
    }
    meant = dict.fromkeys(path for paths in fits.values() for path in paths)
    return list(meant), [line for line in listed.lines if line not in fits]


def _lookup(
    line: str, names: Mapping[str, list[LabeledImage]]
) -> tuple[PurePosixPath, list[LabeledImage]]:
    """The path in a line, which may have spaces and columns behind it, and images of its name."""
    first = line.split()[0]
    texts = [line, _LABEL_COLUMN.sub("", line), first]
    if PurePosixPath(first).suffix.lower() in IMAGE_SUFFIXES:
        texts = [first]
    for text in texts:
        path = PurePosixPath(text.replace("\\", "/"))
        found = names.get(path.name)
        if found is None and path.suffix.lower() in _SUFFIXES:
            found = names.get(path.stem)
        if found:
            return path, found
    return PurePosixPath(line), []
