# SPDX-License-Identifier: Apache-2.0
"""The files of a data set's folder, and what their names say: splits and labels of images."""

from __future__ import annotations

import functools
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path, PurePosixPath
from typing import Any

from mmeformer.checks.findings import ERROR, Finding
from mmeformer.checks.images import UNREADABLE, in_threads, read_header
from mmeformer.errors import UserError
from mmeformer.images import IMAGE_SUFFIXES

_SPLIT_NAMES = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {name: split for split, names in _SPLIT_NAMES.items() for name in names}
SPLIT_KEYS = {name: _SPLIT_OF[name] for name in ("train", "val", "valid", "validation", "test")}
"""Split by the keys and file names by which formats list its images."""
# As a word of its own: train2017, instances_val, but not "strain" or "value".
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(_SPLIT_OF)})(?:\d{{4}})?(?![a-z])")
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages", "data")
"""Folders of all images, in lower case; they tell no class."""
_DRAWN_FOLDER = re.compile(r"segmentation(class|object).*|masks?", re.IGNORECASE)
_OTHER_IMAGES = (
    ".avif", ".cr2", ".dng", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".nef", ".pgm",
    ".ppm",
)  # fmt: skip
"""Suffixes of images that are not read."""
_TRIED = 20
"""Label files that are opened to recognize a format, or up to twice as many."""


@dataclass(frozen=True)
class Options:
    """What the user says about the data.

    Args:
        format: name of the format, if the folder has several.
        classes: names of classes, where the data have only numbers.
        legend: file of class names and colors.
        settings: YOLO's ``data.yaml``; None takes the one in the folder.
        corners: whether four points are the corners of a rotated box; None if the user does not
            say.
        answer: the options that say so.
    """

    format: str | None = None
    classes: tuple[str, ...] | None = None
    legend: Path | None = None
    settings: Path | None = None
    corners: bool | None = None
    answer: str = "--task"


@dataclass
class Tree:
    """Files of a folder and the folders below it.

    Args:
        root: the folder.
        files: all files, sorted; hidden ones and those of macOS archives are left out.
        found: what takes long to find, such as the files by which a format was recognized.
        contents: of files that take long to read; who reads them takes them out.
    """

    root: Path
    files: list[Path]
    found: dict[str, list[Path]] = field(default_factory=dict)
    contents: dict[Path, Any] = field(default_factory=dict)
    _names: dict[str, list[Path]] = field(default_factory=dict)
    _texts: dict[Path, Path] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path) -> Tree:
        """List a folder.

        Raises:
            UserError: it is no folder, or has no image.
        """
        root = Path(os.path.abspath(root.expanduser()))
        if not root.is_dir():
            raise UserError(f"{root} is not a folder; give the folder of images and labels")
        files: list[Path] = []
        seen: set[str] = set()
        for folder, folders, names in os.walk(root, followlinks=True):
            # Links can lead in a circle.
            if (real := os.path.realpath(folder)) in seen:
                folders[:] = []
                continue
            seen.add(real)
            folders[:] = sorted(n for n in folders if not n.startswith((".", "__MACOSX")))
            files += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        tree = cls(root, files)
        if not tree.images:
            hint = f"; {others}" if (others := tree.other_images()) else ""
            raise UserError(f"{root} has no image ({', '.join(IMAGE_SUFFIXES)}){hint}")
        return tree

    def with_suffix(self, *suffixes: str) -> list[Path]:
        """Files with one of these suffixes, in any case."""
        return [path for path in self.files if path.suffix.lower() in suffixes]

    @property
    def images(self) -> list[Path]:
        """Image files, masks included."""
        return self.with_suffix(*IMAGE_SUFFIXES)

    def named_like_images(self, suffix: str) -> list[Path]:
        """Files with this suffix that have the name of an image."""
        stems = {path.stem for path in self.images}
        return [path for path in self.with_suffix(suffix) if path.stem in stems]

    def other_images(self) -> str:
        """In words: images of kinds that are not read, with the fix; empty if there are none."""
        others = self.with_suffix(*_OTHER_IMAGES)
        if not others:
            return ""
        kinds = ", ".join(sorted({path.suffix.lower() for path in others}))
        return (
            f"{len(others)} images are of kinds that are not read ({kinds}), such as "
            f"{others[0].relative_to(self.root)}; convert them to PNG or JPEG"
        )

    def find_image(
        self, name: str, near: Path, split: str | None = None, hint: str = ""
    ) -> Path | None:
        """The image that a label file means by a name.

        Exports have paths of other machines. So this takes the path relative to the label file or
        the root, else the image whose path ends like the name; of several, the one whose suffix is
        written alike, then the one of the split, then one that is no mask, then the one with most
        folders of the label file, then with most folders of the hint, then with the fewest others.

        Args:
            name: path or file name, with or without suffix.
            near: the label file.
            split: of the label file.
            hint: path that the image had when it was labeled. It may have been moved since then.
        """
        plain = name.replace("\\", "/")
        for base in (near.parent, near.parent.parent, self.root):
            # A file from elsewhere names what it likes: only images of this folder count.
            path = Path(os.path.normpath(base / plain))
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_relative_to(self.root):
                if path.is_file():
                    return path
        if not self._names:
            names = defaultdict(list)
            for path in self.images:
                names[path.stem + path.suffix.lower()].append(path)
                names[path.stem].append(path)
            self._names.update(names)
        wanted = PurePosixPath(plain)
        found = self._names.get(wanted.name)
        if found is None and wanted.suffix.lower() in IMAGE_SUFFIXES:
            found = self._names.get(wanted.stem + wanted.suffix.lower())
        labels = near.relative_to(self.root).parts[:-1]
        hints = PurePosixPath(hint.replace("\\", "/")).parts[:-1]

        def likeness(path: Path) -> tuple[int, bool, bool, bool, int, int, int]:
            same = same_ending(path.parts[:-1], wanted.parts[:-1])
            of_split = split is not None and self.split_of(path) == split
            folders = path.relative_to(self.root).parts[:-1]
            shared = in_common(folders, labels)
            alike = path.name == wanted.name
            drawn = is_drawn(path)
            hinted = in_common(folders, hints)
            return same, alike, of_split, not drawn, shared, hinted, -len(folders)

        return max(found or (), key=likeness, default=None)

    def find_label(self, path: Path) -> Path | None:
        """The file of a path, whatever the case of its suffix and of folders called ``labels``."""
        if path.is_file():
            return path
        if not self._texts:
            for file in self.files:
                self._texts.setdefault(_plain(file), file)
        return self._texts.get(_plain(path))

    def split_of(self, path: Path) -> str | None:
        """Split that the folders or the name of a file tell; the innermost folder counts."""
        relative = path.relative_to(self.root) if path.is_relative_to(self.root) else path
        for part in relative.parts[-2::-1]:
            if found := split_word(part):
                return found
        return None

    def split_of_labels(self, path: Path) -> str | None:
        """Split that the name of a label file, else its folders tell."""
        return split_word(path.stem) or self.split_of(path)


def _plain(path: Path) -> Path:
    """A path with its suffix, and folders called ``labels``, in lower case."""
    folders = (name.lower() if name.lower() == "labels" else name for name in path.parts[:-1])
    return Path(*folders, path.stem + path.suffix.lower())


def is_drawn(path: Path) -> bool:
    """Whether an image lies in a folder of masks that has no other name: no photo is there."""
    return _DRAWN_FOLDER.fullmatch(path.parent.name) is not None


def same_ending(folders: Sequence[str], others: Sequence[str]) -> int:
    """Number of the last folders that two paths have alike."""
    same = 0
    for own, other in zip(reversed(folders), reversed(others), strict=False):
        if own != other:
            break
        same += 1
    return same


@functools.lru_cache(maxsize=2**16)
def in_common(folders: tuple[str, ...], others: tuple[str, ...]) -> int:
    """Number of folders that two paths have in the same order, in any case.

    ``xml/camA`` and ``images/camA`` have one in common, as ``camA/xml`` and ``camA/images`` have.
    Few folders hold many files, so answers are kept.
    """
    own, other = ([name.lower() for name in names] for names in (folders, others))
    blocks = SequenceMatcher(None, own, other, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks)


def split_word(name: str) -> str | None:
    """The split that a name like ``instances_val2017`` tells; None if it tells none or several."""
    found = {_SPLIT_OF[word] for word in _SPLIT_WORD.findall(name.lower())}
    return found.pop() if len(found) == 1 else None


def split_named(name: str) -> str | None:
    """The split whose word, such as ``val`` or ``val2017``, is all of a name; None if it is not."""
    return split_word(name) if _SPLIT_WORD.fullmatch(name.lower()) else None


def sample(paths: Sequence[Path]) -> Sequence[Path]:
    """Some of the paths, spread evenly: as many as it takes to recognize a format."""
    return paths[:: max(1, len(paths) // _TRIED)]


def read_sizes(paths: Iterable[Path], findings: list[Finding]) -> dict[Path, tuple[int, int]]:
    """Width and height of images, from their headers; adds a finding for each unreadable one."""
    paths = list(dict.fromkeys(paths))

    def size(path: Path):
        try:
            header = read_header(str(path))
        except UNREADABLE as error:
            return Finding(ERROR, "unreadable image", str(path), f"cannot be read ({error})")
        return header.width, header.height

    sizes = {}
    for path, found in zip(paths, in_threads(size, paths, "images read"), strict=True):
        if isinstance(found, Finding):
            findings.append(found)
        else:
            sizes[path] = found
    return sizes


def read_names(path: Path) -> list[str]:
    """Non-empty lines of a text file."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_text(path: Path) -> str:
    """Text of a file in UTF-8, with or without byte order mark.

    Raises:
        ValueError: it is no such text; the message names the file.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error})") from error


def class_names(count: int, options: Options, names: Sequence[str] | None = None) -> list[str]:
    """Names of ``count`` classes: those of the user, of the data, else ``class_0``, ``class_1``...

    Raises:
        UserError: the user's names are fewer.
    """
    if options.classes is None:
        names = list(names or ())
        return names + [f"class_{index}" for index in range(len(names), count)]
    if len(options.classes) < count:
        raise UserError(
            f"--classes has {len(options.classes)} names, but the labels have {count} classes"
        )
    return list(options.classes)
