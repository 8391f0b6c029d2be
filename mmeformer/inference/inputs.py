# SPDX-License-Identifier: Apache-2.0
"""Find the inputs of a prediction (files, folders, globs and videos), and read images."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmeformer.checks.images import quick_fault
from mmeformer.files import refuse_url, relative_names
from mmeformer.images import IMAGE_SUFFIXES, PLAIN, VIDEO_SUFFIXES, Reading, read_image


@dataclass(frozen=True)
class Source:
    """One file to predict on.

    Args:
        path: of the image or video.
        file_name: path below the folder that was given, with ``/``; below the folder above all
            inputs if two files would then have the same.
        name: the same without suffix, unless two files would then have the same name. Outputs are
            named after it.
    """

    path: Path
    file_name: str
    name: str

    @property
    def is_video(self) -> bool:
        """Whether the suffix is that of a video."""
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_sources(inputs: Sequence[str | Path], exclude: Iterable[Path] = ()) -> list[Source]:
    """List the files of all inputs in their order, each file once.

    Args:
        inputs: files (of any suffix), folders (searched recursively for known suffixes, without
            hidden files) and globs (known suffixes; ``**`` for any folders).
        exclude: folders that are not searched, such as those of an earlier run's outputs.

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: an input is a URL, a folder or a glob has no such file, or the outputs of two
            files would have the same name.
    """
    exclude = [Path(folder).resolve() for folder in exclude]
    found: dict[Path, Source] = {}
    for text in map(str, inputs):
        refuse_url(text, "input")
        path = Path(text)
        if path.is_file():
            pairs = [(path, path.name)]
        elif path.is_dir():
            pairs = list(_walk(path, path, exclude))
            if not pairs:
                raise ValueError(
                    f"folder {path} has no image or video "
                    f"({', '.join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)})"
                )
        elif glob.has_magic(text):
            pairs = list(_expand(text, exclude))
            if not pairs:
                raise ValueError(f"no image or video matches {text}")
        else:
            hint = "; for a camera: mmeformer export, then mmeformer web" if text.isdigit() else ""
            raise FileNotFoundError(f"input {path} does not exist{hint}")
        for file, name in pairs:
            name = _below(name)
            source = Source(file, name, Path(name).with_suffix("").as_posix())
            found.setdefault(file.resolve(), source)
    return _with_unique_names(list(found.values()))


def _below(name: str) -> str:
    """A name that stays below the output folder: ``*/../../x/*.png`` leads out of it."""
    parts = Path(os.path.normpath(name)).parts
    return Path(*(part for part in parts if part not in ("..", os.sep))).as_posix()


def _is_wanted(path: Path, exclude: list[Path]) -> bool:
    return (
        path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES
        and path.is_file()
        and not any(path.resolve().is_relative_to(folder) for folder in exclude)
    )


def _walk(folder: Path, root: Path, exclude: list[Path]) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not is_hidden and _is_wanted(path, exclude):
            yield path, path.relative_to(root).as_posix()


def _expand(pattern: str, exclude: list[Path]) -> Iterator[tuple[Path, str]]:
    parts = Path(pattern).parts
    root = Path(*parts[: next(index for index, part in enumerate(parts) if glob.has_magic(part))])
    for path in map(Path, sorted(glob.glob(pattern, recursive=True))):
        if path.is_dir():
            yield from _walk(path, root, exclude)
        elif _is_wanted(path, exclude):
            yield path, path.relative_to(root).as_posix()


def _with_unique_names(sources: list[Source]) -> list[Source]:
    if len({source.file_name for source in sources}) < len(sources):
        # Of several inputs: the folder above all of them tells the files apart.
        names = relative_names([source.path for source in sources])
        sources = [
            Source(source.path, name, Path(name).with_suffix("").as_posix())
            for source, name in zip(sources, names, strict=True)
        ]
    counts = Counter(source.name for source in sources)
    sources = [
        replace(source, name=source.file_name) if counts[source.name] > 1 else source
        for source in sources
    ]
    videos = {f"{source.name}/": source for source in sources if source.is_video}
    first: dict[str, Source] = {}
    for source in sources:
        # Frames of a video are named as images in a folder are.
        other = first.setdefault(
            source.name, videos.get(os.path.dirname(source.name) + "/", source)
        )
        if other is not source:
            raise ValueError(
                f"the outputs of {other.path} and {source.path} would have the same name; use one "
                "run and --out for each"
            )
    return sources


def read(source: Source, reading: Reading = PLAIN) -> np.ndarray:
    """Read the image of a source, ``(H, W, 3)`` uint8, blue, green, red.

    Args:
        source: an image.
        reading: of imagery.

    Raises:
        ValueError: it is missing, damaged, incomplete or not an image.
    """
    if fault := quick_fault(str(source.path)):
        raise ValueError(f"{source.path} {fault}")
    return read_image(source.path, reading)
