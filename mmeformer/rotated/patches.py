# SPDX-License-Identifier: Apache-2.0
"""Cut a DOTA data set into patches; what ``tools/split_dota.py`` runs.

Patches and their names, ``NAME__SIZE__X___Y``, are those of mmrotate's ``img_split.py``, so that
its tools can read them and the other way round. That one cannot go on after an interruption, and
passes over label lines that it does not understand.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import shapely

from mmeformer.files import is_draft, write_bytes, write_text
from mmeformer.images import read_image
from mmeformer.rotated.dota import (
    IMAGE_SUFFIXES,
    DotaObject,
    format_label,
    list_images,
    list_labels,
    read_labels,
)
from mmeformer.windows import Window, crop, windows

MANIFEST = "split.jsonl"
_FOLDERS = ("images", "annfiles")
# Beyond the values of DOTA's own files, as DOTA's development kit marks what it cut.
TRUNCATED = 2
_PATCH_NAME = re.compile(r"(?P<image>.+)__(?P<size>\d+)__(?P<x>\d+)___(?P<y>\d+)")


class PatchName(NamedTuple):
    """What the name of a patch says: its image, the side of its window and the offset, in pixels of
    the image."""

    image: str
    size: int
    x: int
    y: int

    def __str__(self) -> str:
        return f"{self.image}__{self.size}__{self.x}___{self.y}"


def parse_patch_name(name: str) -> PatchName:
    """The parts of ``NAME__SIZE__X___Y``; NAME itself may contain ``__``.

    Raises:
        ValueError: the name is not of this form.
    """
    match = _PATCH_NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} is not the name of a patch (NAME__SIZE__X___Y); cut the images with "
            "tools/split_dota.py, or do not merge"
        )
    return PatchName(match["image"], *(int(match[key]) for key in ("size", "x", "y")))


@dataclass(frozen=True)
class CutSettings:
    """How images are cut.

    Args:
        size: side of a window at rate 1, pixels.
        overlap: of neighbouring windows at rate 1, pixels.
        rates: for each one, windows of ``size / rate`` and ``overlap / rate`` pixels are cut from
            the image as it is; the pipeline then resizes them (mmrotate's convention: a rate of 0.5
            shows objects at half their size).
        iof: an object belongs to a patch if at least this share of its area lies inside. It keeps
            all its corners, also those outside, and its difficult flag.
        truncated: what happens to objects of which less lies inside: ``drop`` (mmrotate's
            ``img_split.py``) or ``difficult``: kept with the flag 2 (DOTA's development kit).
        keep_empty: whether patches without objects are written.
        pad: fill up windows of images that are smaller.
        suffix: file format of patches.

    Raises:
        ValueError: a value out of its range.
    """

    size: int = 1024
    overlap: int = 512
    rates: tuple[float, ...] = (1.0,)
    iof: float = 0.7
    truncated: str = "drop"
    keep_empty: bool = True
    pad: bool = True
    suffix: str = "png"

    def __post_init__(self) -> None:
        if not self.rates or any(not 0 < rate <= 16 for rate in self.rates):
            raise ValueError(f"rates {self.rates} must be above 0 and at most 16")
        if not 0 < self.iof <= 1:
            raise ValueError(f"iof {self.iof} must be above 0 and at most 1")
        if self.truncated not in ("drop", "difficult"):
            raise ValueError(f"truncated is {self.truncated!r}; choose 'drop' or 'difficult'")
        if f".{self.suffix}" not in IMAGE_SUFFIXES:
            raise ValueError(f"suffix {self.suffix!r} must be one of {IMAGE_SUFFIXES}")
        sizes = [size for size, _ in self.scales()]
        if len(set(sizes)) != len(sizes):
            raise ValueError(f"rates {self.rates} give windows of the same size {sizes}")
        for size, overlap in self.scales():
            windows(1, 1, size, overlap)

    def scales(self) -> list[tuple[int, int]]:
        """Size and overlap of the windows of every rate, in pixels of the image."""
        return [(int(self.size / rate), int(self.overlap / rate)) for rate in self.rates]


def share_inside(polygons: np.ndarray, window: Window) -> np.ndarray:
    """Share of the area of quadrilaterals that lies inside a window (IoF).

    Corners are taken as a convex outline, in whatever order they are given. What has no area counts
    by its centre.

    Args:
        polygons: ``(N, 4, 2)`` in pixels.
        window: see :mod:`mmeformer.windows`.

    Returns:
        ``(N,)`` float64 from 0 to 1.
    """
    start, end = np.array(window[:2]), np.array(window[2:])
    low, high = polygons.min(1), polygons.max(1)
    share = ((low >= start) & (high <= end)).all(1).astype(float)
    cut = np.flatnonzero(((low < end) & (high > start)).all(1) & (share == 0))
    if len(cut):
        outlines = shapely.convex_hull(shapely.multipoints(polygons[cut]))
        area = shapely.area(outlines)
        inside = shapely.area(shapely.intersection(outlines, shapely.box(*window)))
        centre = polygons[cut].mean(1)
        by_centre = ((centre >= start) & (centre <= end)).all(1)
        share[cut] = np.where(area > 0, inside / np.where(area > 0, area, 1), by_centre)
    return share


def objects_inside(
    objects: Sequence[DotaObject], window: Window, settings: CutSettings
) -> list[DotaObject]:
    """Objects of one patch, their corners counted from the corner of the window."""
    if not objects:
        return []
    polygons = np.stack([item.polygon for item in objects])
    found = []
    for item, share in zip(objects, share_inside(polygons, window), strict=True):
        if share >= settings.iof:
            difficult = item.difficult
        elif share > 0 and settings.truncated == "difficult":
            difficult = TRUNCATED
        else:
            continue
        found.append(item._replace(polygon=item.polygon - window[:2], difficult=difficult))
    return found


class Job(NamedTuple):
    """One image to be cut: its name, its files and their sizes and times of change."""

    name: str
    image: Path
    label: Path | None
    fingerprint: list


class Outcome(NamedTuple):
    """What came of a :class:`Job`: the names of its patches, or an error."""

    job: Job
    patches: list[str]
    error: str | None


def cut_image(job: Job, target: Path, settings: CutSettings) -> Outcome:
    """Cut one image and write its patches below ``target``, each file whole or not at all.

    A data set without labels gets no label files. Files that are there are replaced.
    """
    try:
        objects = [] if job.label is None else read_labels(job.label)
        image = read_image(job.image)
        height, width = image.shape[:2]
        names = []
        for size, overlap in settings.scales():
            for window in windows(width, height, size, overlap):
                found = objects_inside(objects, window, settings)
                if not found and not settings.keep_empty:
                    continue
                name = str(PatchName(job.name, size, *window[:2]))
                patch = crop(image, window, size if settings.pad else None)
                # Labels first: an image without labels would count as one without objects.
                if (target / "annfiles").is_dir():
                    lines = [format_label(o.polygon, o.name, o.difficult) + "\n" for o in found]
                    write_text(target / "annfiles" / f"{name}.txt", "".join(lines))
                encoded = cv2.imencode(f".{settings.suffix}", patch)[1]
                write_bytes(target / "images" / f"{name}.{settings.suffix}", encoded.tobytes())
                names.append(name)
    except (OSError, ValueError, cv2.error) as error:
        return Outcome(job, [], str(error))
    return Outcome(job, names, None)


def _start_worker() -> None:
    # Ctrl-C is for the parent, which lets images that were begun be finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(1)


class Split:
    """One data set being cut into one folder, over as many runs as it takes.

    The folder gets ``images/`` and, unless the data set has no labels, ``annfiles/``. Its manifest
    has the settings and, for every finished image, the patches; what it lists is not cut again
    unless the image or its labels changed or a patch is missing.

    Args:
        sources: pairs of image folder and label folder (None: no labels), in which images without
            a label file count as without objects.
        target: a folder that is empty, does not exist, or was begun with the same arguments.
        settings: how to cut.

    Attributes:
        pending (list[Job]): images left to be cut.
        finished (int): images that an earlier run cut.

    Raises:
        FileNotFoundError: a folder of ``sources`` is missing or has no file of its kind.
        FileExistsError: ``target`` holds something else, or patches made with other arguments.
        ValueError: an image name occurs in two folders, or some folders have labels only, or no
            label file fits an image, or the manifest is damaged.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Path, Path | None]],
        target: Path,
        settings: CutSettings,
    ) -> None:
        self.target, self.settings = Path(target), settings
        self._has_labels = sources[0][1] is not None
        jobs = self._jobs(sources)
        self._header = {
            "settings": json.loads(json.dumps(asdict(settings))),
            "sources": [[str(Path(p).resolve()) if p else None for p in pair] for pair in sources],
        }
        done = self._read_manifest()
        self._stale = [
            name
            for image, (fingerprint, names) in done.items()
            for name in names
            if image not in jobs or fingerprint != jobs[image].fingerprint
        ]
        self.pending = [job for job in jobs.values() if not self._is_done(job, done)]
        self.finished = len(jobs) - len(self.pending)

    def _jobs(self, sources) -> dict[str, Job]:
        jobs = {}
        for image_folder, label_folder in sources:
            if (label_folder is not None) != self._has_labels:
                raise ValueError("some folders have labels and some have none; cut them separately")
            images = list_images(image_folder)
            labels = {} if label_folder is None else list_labels(label_folder)
            if labels and not labels.keys() & images.keys():
                raise ValueError(
                    f"no label file in {label_folder} has the name of an image in {image_folder}"
                )
            for name, path in images.items():
                if name in jobs:
                    raise ValueError(f"{jobs[name].image} and {path} have the same name")
                label = labels.get(name)
                stats = [os.stat(file) for file in (path, label) if file]
                jobs[name] = Job(name, path, label, [[s.st_size, s.st_mtime_ns] for s in stats])
        return jobs

    def _read_manifest(self) -> dict[str, tuple[list, list[str]]]:
        path = self.target / MANIFEST
        if not path.is_file():
            if self.target.exists() and not self._is_unused():
                raise FileExistsError(
                    f"{self.target} is there already and was not made by this tool; choose another "
                    "folder, or empty it"
                )
            return {}
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        try:
            # What follows the last line end was being written when a run was interrupted.
            header, *records = [json.loads(line) for line in lines[:-1]]
            done = {r["image"]: (r["fingerprint"], r["patches"]) for r in records}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); delete {self.target}, or choose another folder"
            ) from error
        if header != self._header:
            raise FileExistsError(
                f"{self.target} holds patches cut otherwise; choose another folder, or delete it. "
                f"There: {json.dumps(header)}. Now: {json.dumps(self._header)}"
            )
        return done

    def _is_unused(self) -> bool:
        """Whether the target is an empty folder, or holds only what a run leaves that was killed
        before its manifest was written: empty folders and a draft of the manifest."""
        return self.target.is_dir() and all(
            is_draft(path) or (path.name in _FOLDERS and path.is_dir() and not any(path.iterdir()))
            for path in self.target.iterdir()
        )

    def _is_done(self, job: Job, done: dict) -> bool:
        fingerprint, names = done.get(job.name, (None, []))
        return fingerprint == job.fingerprint and all(
            file.is_file() for name in names for file in self._files(name)
        )

    def _files(self, name: str) -> list[Path]:
        files = [self.target / "images" / f"{name}.{self.settings.suffix}"]
        if self._has_labels:
            files.append(self.target / "annfiles" / f"{name}.txt")
        return files

    def run(self, workers: int = 1) -> Iterator[Outcome]:
        """Cut what is :attr:`pending`; patches of images that changed or are gone are deleted.

        Args:
            workers: processes; 1 works in this one. Each holds one image.

        Yields:
            An outcome per image, as they come. An error of one image does not stop the others.

        Raises:
            concurrent.futures.process.BrokenProcessPool: a process was killed, as happens when
                memory runs out. What was finished stays finished.
        """
        for folder in _FOLDERS if self._has_labels else _FOLDERS[:1]:
            (self.target / folder).mkdir(parents=True, exist_ok=True)
        self._remove_drafts()
        for name in self._stale:
            for file in self._files(name):
                file.unlink(missing_ok=True)
        self._fix_manifest()
        with open(self.target / MANIFEST, "a", encoding="utf-8") as manifest:
            for outcome in self._outcomes(workers):
                if outcome.error is None:
                    record = dict(
                        image=outcome.job.name,
                        fingerprint=outcome.job.fingerprint,
                        patches=outcome.patches,
                    )
                    manifest.write(json.dumps(record) + "\n")
                    manifest.flush()
                yield outcome

    def _remove_drafts(self) -> None:
        """Remove the files that a killed run left unfinished."""
        for folder in (self.target, *(self.target / name for name in _FOLDERS)):
            for path in folder.glob(".*"):
                if is_draft(path):
                    path.unlink()

    def _fix_manifest(self) -> None:
        """Begin the manifest, or remove a last line that was not finished."""
        path = self.target / MANIFEST
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        write_text(path, text[: text.rfind("\n") + 1] or json.dumps(self._header) + "\n")

    def _outcomes(self, workers: int) -> Iterator[Outcome]:
        if workers == 1:
            for job in self.pending:
                yield cut_image(job, self.target, self.settings)
            return
        # A forked process need not import OpenMMLab again, which takes seconds.
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("fork" if "fork" in methods else None)
        with ProcessPoolExecutor(workers, context, _start_worker) as pool:
            futures = [pool.submit(cut_image, j, self.target, self.settings) for j in self.pending]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                pool.shutdown(cancel_futures=True)
