# SPDX-License-Identifier: Apache-2.0
"""Cut a DOTA data set into patches; ``mmeformer split-dota`` is the command line.

Patches and their names, ``NAME__SIZE__X___Y``, are those of mmrotate's ``img_split.py``, so that
each can read the other's. That script cannot resume and silently skips invalid label lines.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import shapely

from mmeformer.files import is_draft, write_bytes, write_text
from mmeformer.images import Reading, read_image
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
# Flag of truncated objects in DOTA's development kit; DOTA's own files have 0 and 1.
TRUNCATED = 2
_PATCH_NAME = re.compile(r"(?P<image>.+)__(?P<size>\d+)__(?P<x>\d+)___(?P<y>\d+)")


class PatchName(NamedTuple):
    """Parsed name of a patch: image, side of the window and offset, in pixels of the image."""

    image: str
    size: int
    x: int
    y: int

    def __str__(self) -> str:
        return f"{self.image}__{self.size}__{self.x}___{self.y}"


def parse_patch_name(name: str) -> PatchName:
    """Parse ``NAME__SIZE__X___Y``; NAME itself may contain ``__``.

    Raises:
        ValueError: the name does not have this form.
    """
    match = _PATCH_NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} is not the name of a patch (NAME__SIZE__X___Y); cut the images with "
            "mmeformer split-dota, or turn merging off"
        )
    return PatchName(match["image"], *(int(match[key]) for key in ("size", "x", "y")))


def patch_size_of(name: str) -> int | None:
    """SIZE of a patch's name; None if it is no such name."""
    match = _PATCH_NAME.fullmatch(name)
    return None if match is None else int(match["size"])


@dataclass(frozen=True)
class CutSettings:
    """Settings for cutting images into patches.

    Args:
        size: side of a window at rate 1, in pixels.
        overlap: overlap of neighboring windows at rate 1, in pixels.
        rates: for each rate, windows of ``size / rate`` pixels with an overlap of
            ``overlap / rate`` are cut from the unscaled image; the training pipeline resizes them
            (mmrotate's convention: at rate 0.5, objects appear at half their size).
        iof: an object belongs to a patch if at least this share of its area lies inside. It keeps
            all its corners, also those outside, and its difficult flag.
        truncated: objects with a smaller share are dropped (``drop``, as in mmrotate's
            ``img_split.py``) or kept with the flag 2 (``difficult``, as in DOTA's development kit).
        keep_empty: write patches without objects too.
        pad: pad windows of images that are smaller.
        suffix: file format of patches.
        bands, stretch: how imagery becomes patches of three channels of 8 bits; see
            :class:`mmeformer.images.Reading`.

    Raises:
        ValueError: a value is out of range.
    """

    size: int = 1024
    overlap: int = 512
    rates: tuple[float, ...] = (1.0,)
    iof: float = 0.7
    truncated: str = "drop"
    keep_empty: bool = True
    pad: bool = True
    suffix: str = "png"
    bands: Sequence[int] | None = None
    stretch: Sequence[float] | str | None = None

    @property
    def reading(self) -> Reading:
        """How image files are read."""
        return Reading(self.bands, self.stretch)

    def __post_init__(self) -> None:
        self.reading  # noqa: B018  (raises for invalid settings)
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
        """Size and overlap of the windows for each rate, in pixels of the image."""
        return [(int(self.size / rate), int(self.overlap / rate)) for rate in self.rates]


def share_inside(polygons: np.ndarray, window: Window) -> np.ndarray:
    """Share of the area of quadrilaterals that lies inside a window (IoF).

    Takes the convex hull of the corners, in any order. A quadrilateral without area is inside if
    its center is.

    Args:
        polygons: (N, 4, 2) in pixels.
        window: see :mod:`mmeformer.windows`.

    Returns:
        (N,) float64 from 0 to 1.
    """
    start, end = np.array(window[:2]), np.array(window[2:])
    low, high = polygons.min(1), polygons.max(1)
    share = ((low >= start) & (high <= end)).all(1).astype(float)
    cut = np.flatnonzero(((low < end) & (high > start)).all(1) & (share == 0))
    if len(cut):
        outlines = shapely.convex_hull(shapely.multipoints(polygons[cut]))
        area = shapely.area(outlines)
        inside = shapely.area(shapely.intersection(outlines, shapely.box(*window)))
        center = polygons[cut].mean(1)
        by_center = ((center >= start) & (center <= end)).all(1)
        share[cut] = np.where(area > 0, inside / np.where(area > 0, area, 1), by_center)
    return share


def objects_inside(
    objects: Sequence[DotaObject], window: Window, settings: CutSettings
) -> list[DotaObject]:
    """Objects of one patch, with corners relative to the corner of the window."""
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
    """An image to cut: its name, its files, and their sizes and modification times."""

    name: str
    image: Path
    label: Path | None
    fingerprint: list


class Outcome(NamedTuple):
    """Result of a :class:`Job`.

    Args:
        job: the job.
        patches: names of the patches.
        error: why the image was not cut, or None.
        lost: number of objects that belong to no patch.
    """

    job: Job
    patches: list[str]
    error: str | None
    lost: int = 0


class _Record(NamedTuple):
    """Entry of the manifest: an image that was cut."""

    fingerprint: list
    patches: list[str]
    lost: int


def cut_image(job: Job, target: Path, settings: CutSettings) -> Outcome:
    """Cut one image and write its patches below ``target``; existing files are replaced.

    Label files are written only if ``target`` has the folder ``annfiles``.
    """
    try:
        objects = [] if job.label is None else read_labels(job.label)
        image = read_image(job.image, settings.reading, _refuse)
        height, width = image.shape[:2]
        names = []
        lost = {item.line for item in objects}
        for size, overlap in settings.scales():
            for window in windows(width, height, size, overlap):
                found = objects_inside(objects, window, settings)
                lost -= {item.line for item in found}
                if not found and not settings.keep_empty:
                    continue
                name = str(PatchName(job.name, size, *window[:2]))
                patch = crop(image, window, size if settings.pad else None)
                # Labels first: an image without a label file would count as without objects.
                if (target / "annfiles").is_dir():
                    lines = [format_label(o.polygon, o.name, o.difficult) + "\n" for o in found]
                    write_text(target / "annfiles" / f"{name}.txt", "".join(lines))
                encoded = cv2.imencode(f".{settings.suffix}", patch)[1]
                write_bytes(target / "images" / f"{name}.{settings.suffix}", encoded.tobytes())
                names.append(name)
    except (OSError, ValueError, cv2.error) as error:
        return Outcome(job, [], str(error))
    return Outcome(job, names, None, len(lost))


def _refuse(text: str) -> None:
    # Patches are written once and for all: a warning would be too late.
    raise ValueError(text)


def _start_worker() -> None:
    # The parent handles Ctrl-C and waits for the images in progress.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(1)


def _as_json(settings: CutSettings) -> dict:
    values = json.loads(json.dumps(asdict(settings)))
    # Manifests of earlier versions lack these.
    return {
        key: value
        for key, value in values.items()
        if key not in ("bands", "stretch") or value is not None
    }


class Split:
    """Cuts one data set into one folder and can resume after an interruption.

    Writes ``images/`` and, if the data set has labels, ``annfiles/``. The manifest has the settings
    and the patches of every finished image. A finished image is cut again only if it or its labels
    changed, or a patch is missing.

    Args:
        sources: pairs of image folder and label folder (None: no labels). Images without a label
            file count as without objects.
        target: a folder that is empty, does not exist, or is from a run with the same arguments.
        settings: how to cut.

    Attributes:
        pending: images to cut.
        finished: number of images that an earlier run cut.
        lost: number of their objects that belong to no patch.
        unused_labels: label files without an image.

    Raises:
        FileNotFoundError: a folder of ``sources`` is missing, or has no file of its kind.
        FileExistsError: ``target`` has other files, or patches made with other arguments.
        ValueError: two folders have an image of the same name; only some folders have labels; no
            label file fits an image; or the manifest is damaged.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Path, Path | None]],
        target: Path,
        settings: CutSettings,
    ) -> None:
        self.target, self.settings = Path(target), settings
        self._has_labels = sources[0][1] is not None
        self.unused_labels: list[Path] = []
        jobs = self._jobs(sources)
        self._header = {
            "settings": _as_json(settings),
            "sources": [[str(Path(p).resolve()) if p else None for p in pair] for pair in sources],
        }
        done = self._read_manifest()
        self._stale = [
            name
            for image, record in done.items()
            for name in record.patches
            if image not in jobs or record.fingerprint != jobs[image].fingerprint
        ]
        self.pending = [job for job in jobs.values() if not self._is_done(job, done)]
        self.finished = len(jobs) - len(self.pending)
        done_before = jobs.keys() - {job.name for job in self.pending}
        self.lost = sum(done[name].lost for name in done_before)

    def _jobs(self, sources) -> dict[str, Job]:
        jobs: dict[str, Job] = {}
        for image_folder, label_folder in sources:
            if (label_folder is not None) != self._has_labels:
                raise ValueError("some folders have labels and some have none; cut them separately")
            images = list_images(image_folder)
            labels = {} if label_folder is None else list_labels(label_folder)
            if labels and not labels.keys() & images.keys():
                raise ValueError(
                    f"no label file in {label_folder} belongs to an image in {image_folder}"
                )
            self.unused_labels += [labels[name] for name in labels if name not in images]
            for name, path in images.items():
                if name in jobs:
                    raise ValueError(
                        f"{jobs[name].image} and {path} have the same name; rename one, or cut "
                        "their folders separately"
                    )
                label = labels.get(name)
                stats = [os.stat(file) for file in (path, label) if file]
                jobs[name] = Job(name, path, label, [[s.st_size, s.st_mtime_ns] for s in stats])
        return jobs

    def _read_manifest(self) -> dict[str, _Record]:
        path = self.target / MANIFEST
        if not path.is_file():
            if self.target.exists() and not self._is_unused():
                raise FileExistsError(
                    f"{self.target} exists and was not made by this tool; choose another folder, "
                    "or empty it"
                )
            return {}
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        try:
            # An interrupted run may have left an unfinished line after the last line end.
            header, *records = [json.loads(line) for line in lines[:-1]]
            done = {
                # Earlier versions did not count lost objects.
                r["image"]: _Record(r["fingerprint"], r["patches"], r.get("lost", 0))
                for r in records
            }
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); delete {self.target}, or choose another folder"
            ) from error
        if header != self._header:
            raise FileExistsError(
                f"{self.target} has patches cut with other arguments; choose another folder, or "
                f"delete it. There: {json.dumps(header)}. Now: {json.dumps(self._header)}"
            )
        return done

    def _is_unused(self) -> bool:
        """Whether the target is an empty folder, or has only what is left of a run that was killed
        before it wrote the manifest: empty folders and a draft of the manifest."""
        return self.target.is_dir() and all(
            is_draft(path) or (path.name in _FOLDERS and path.is_dir() and not any(path.iterdir()))
            for path in self.target.iterdir()
        )

    def _is_done(self, job: Job, done: dict[str, _Record]) -> bool:
        record = done.get(job.name)
        return (
            record is not None
            and record.fingerprint == job.fingerprint
            and all(file.is_file() for name in record.patches for file in self._files(name))
        )

    def _files(self, name: str) -> list[Path]:
        files = [self.target / "images" / f"{name}.{self.settings.suffix}"]
        if self._has_labels:
            files.append(self.target / "annfiles" / f"{name}.txt")
        return files

    def run(self, workers: int = 1) -> Generator[Outcome, None, None]:
        """Cut the :attr:`pending` images; delete patches of images that changed or are gone.

        Args:
            workers: number of processes; 1 means this process. Each holds one image in memory.

        Yields:
            One outcome per image, in the order of completion. An error does not stop the others.

        Raises:
            concurrent.futures.process.BrokenProcessPool: a process was killed, for example because
                memory ran out. Finished images stay finished.
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
                        lost=outcome.lost,
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
        """Create the manifest, or remove its unfinished last line."""
        path = self.target / MANIFEST
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        write_text(path, text[: text.rfind("\n") + 1] or json.dumps(self._header) + "\n")

    def _outcomes(self, workers: int) -> Iterator[Outcome]:
        if workers == 1:
            for job in self.pending:
                yield cut_image(job, self.target, self.settings)
            return
        # A forked process does not have to import OpenMMLab again, which takes seconds.
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("fork" if "fork" in methods else None)
        with ProcessPoolExecutor(workers, context, _start_worker) as pool:
            # A forked process does not have OpenCV's threads, but would wait for them to end.
            threads = cv2.getNumThreads()
            cv2.setNumThreads(1)
            try:
                futures = [
                    pool.submit(cut_image, job, self.target, self.settings) for job in self.pending
                ]
            finally:
                cv2.setNumThreads(threads)
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                pool.shutdown(cancel_futures=True)
