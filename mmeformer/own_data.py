# SPDX-License-Identifier: Apache-2.0
"""From a folder of labeled images to a config that trains on them.

The folder is only read. The config and a folder of labels beside it are written, neither over
anything that exists.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import MMLogger

from mmeformer import configs, tasks
from mmeformer.checks.dataset import check_evaluator, checked_datasets_of
from mmeformer.checks.findings import ERROR, Finding, format_findings
from mmeformer.errors import UserError
from mmeformer.files import refuse_url, write_text
from mmeformer.formats import masks
from mmeformer.formats.find import read_folder
from mmeformer.formats.tree import Options, Tree
from mmeformer.labeled import BOXES, CORNERS, FOLDERS, MASKS, POLYGONS, SPLITS, LabeledData
from mmeformer.starter import (
    Plan,
    Setting,
    Starter,
    default_checkpoint,
    repr_names,
    repr_text,
    sides_of,
)
from mmeformer.tasks import TASKS, Task
from mmeformer.variants import VARIANTS, Variant

SCRATCH = "none"
"""Value of ``weights`` that means to train from scratch."""
_KINDS = {
    BOXES: "boxes",
    POLYGONS: "objects with outlines",
    CORNERS: "rotated boxes",
    MASKS: "a class for each pixel",
    FOLDERS: "a class for each image",
}
LONG = 3 * 3600
"""Seconds from which a training is long."""
_SHOWN = 20
"""Classes that the report lists."""


@dataclass(frozen=True)
class Request:
    """What to make, and what the user says about the data.

    Args:
        folder: of images and labels.
        out: the config to write; None means the folder's name in the current folder.
        task: name of a task; None takes the one that the labels are for.
        arch: short name of a variant, such as ``s0`` or ``l1``.
        weights: file, URL or ``timm://`` name of backbone weights, :data:`SCRATCH`, or None for
            ImageNet's.
        options: see :class:`mmeformer.formats.tree.Options`.
        skip_bad: leave out files and objects with errors.
        seed: of the split, if the data set has none.
    """

    folder: Path
    out: Path | None = None
    task: str | None = None
    arch: str = "s0"
    weights: str | None = None
    options: Options = Options()
    skip_bad: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Made:
    """What was made.

    Args:
        config: the file.
        errors: number of errors that the check of the task found.
    """

    config: Path
    errors: int


def make(request: Request, report: Callable[[str], object]) -> Made:
    """Read a data set, write its labels and a config, and check both.

    Args:
        request: what to make.
        report: gets lines for people.

    Raises:
        UserError: the folder or a choice is unclear or wrong, or a file exists already.
    """
    refuse_url(request.folder, "data")
    folder = Path(os.path.abspath(request.folder.expanduser()))
    variant = find_arch(request.arch)
    config = _target(request.out, folder)
    labels = config.with_name(f"{config.stem}_data")
    unfinished = _unfinished(config)
    if unfinished.exists():
        # Of a process that was killed below.
        _remove(labels, config, unfinished)
    if config.exists():
        raise UserError(
            f"{config} exists; train it (mmeformer train {config.name}), or choose another name "
            "with --out"
        )
    if labels.exists():
        raise UserError(f"{labels} exists; remove it, or choose another name with --out")
    data = read_folder(
        folder, _options(request, folder), skip_bad=request.skip_bad, seed=request.seed
    )
    task, starter = choose_task(data, request.task)
    _report_data(data, task, report)
    write_text(unfinished, f"{config.name} is being made\n")
    try:
        data = starter.prepare(data, labels)
        plan = Plan(variant, _checkpoint(request.weights, variant), labels, *_machine())
        write_text(config, text := config_text(data, starter, plan, config))
        if plan.gpu is not None:
            report(f"trying how many images fit into the memory of {plan.gpu}")
            plan = replace(plan, batch_size=_trial(config))
            write_text(config, text := config_text(data, starter, plan, config))
    except BaseException:
        # All were made here; a half-written set would stop the next try.
        _remove(labels, config, unfinished)
        raise
    unfinished.unlink()
    for note in data.notes:
        report(f"note: {note}")
    if plan.checkpoint is not None and "://" in plan.checkpoint:
        report(f"note: training downloads the weights {plan.checkpoint}, once")
    report(f"wrote {config} ({len(text.splitlines())} lines) and {labels}")
    known, steps = data.findings, starter.steps(data, plan)
    # What follows reads the labels that were written, and both may be gigabytes.
    del data
    report("checking what was written")
    findings = check(configs.load_config(config))
    if shown := format_findings([*known, *findings], per_kind=3):
        report(shown)
    errors = sum(finding.severity == ERROR for finding in findings)
    if not errors:
        report("timing a training step here")
        report(training_time(steps, _seconds(config), config))
    return Made(config, errors)


def made_before(request: Request) -> Path | None:
    """The config that :func:`make` has made for this request, if it has."""
    config = _target(request.out, Path(os.path.abspath(request.folder.expanduser())))
    return config if config.exists() and not _unfinished(config).exists() else None


def find_arch(arch: str) -> Variant:
    """The variant of a short or full name.

    Raises:
        UserError: there is none; the message names all.
    """
    for variant in VARIANTS.values():
        if arch.lower() in (variant.arch, variant.name):
            return variant
    known = ", ".join(variant.arch for variant in VARIANTS.values())
    raise UserError(f"--arch {arch} is unknown; choose one of {known}")


def choose_task(data: LabeledData, name: str | None) -> tuple[Task, Starter]:
    """The task for the labels of a data set, and its starter.

    Raises:
        UserError: the task that the user wants takes no such labels, or lacks a library.
    """
    if name is None:
        task = next(task for task in TASKS.values() if data.kind in task.labels)
    else:
        task = TASKS[name]
    if missing := [lib for lib in task.libraries if importlib.util.find_spec(lib) is None]:
        raise UserError(
            f"{data.root} is for {task.name}, which needs {', '.join(missing)}: pip install "
            f"'mmeformer[{task.name}]'"
        )
    starter = tasks.load(task.starter)
    if data.kind not in (*task.labels, *starter.kinds):
        raise UserError(
            f"{name} cannot be trained on {data.root} ({data.format}: {_KINDS[data.kind]}); leave "
            "out --task, or give other labels"
        )
    return task, starter


def config_text(data: LabeledData, starter: Starter, plan: Plan, config: Path) -> str:
    """The config: where it comes from, one line for each setting, and what follows from them."""
    counts = data.counts("train")
    listed = ", ".join(
        f"{data.classes[label]} {counts[label]:,}" for label, _ in counts.most_common(4)
    )
    more = ", ..." if len(data.classes) > 4 else ""
    splits = [split for split in SPLITS if data.of_split(split)]
    sizes = ", ".join(f"{len(data.of_split(split))} {split}" for split in splits)
    weights = "None" if plan.checkpoint is None else repr_text(plan.checkpoint)
    base = repr_text(starter.template(data))
    # Beside the config, so both may be moved together.
    labels = f"{{{{ fileDirname }}}}/{plan.labels.name}/"
    root = Setting(
        "data_root",
        repr_text(f"{(data.tiles or data.root).as_posix()}/"),
        "your images, only read" if data.tiles is None else "tiles of your images",
    )
    body = starter.body(data, plan)
    lines = [
        f"# Made by `mmeformer init` from {data.root} ({data.format}): {sizes} images.",
        f"# Check it: mmeformer check {config.name}    Train it: mmeformer train {config.name}",
        f'_base_ = __import__("mmeformer").shipped_config({base})',
        # Lists of images with whole paths need no root.
        *([root] if f"={root.name}" in body else []),
        Setting("labels", repr_text(labels), "made from your labels; beside this file"),
        Setting("classes", repr_names(data.classes), f"in training: {listed}{more}"),
        Setting("checkpoint", weights, "backbone weights; from scratch: init --weights none"),
        *starter.settings(data, plan),
        *starter.common(data, plan),
    ]
    return "\n".join(map(str, lines)) + "\n\n" + body


def check(config: Config) -> list[Finding]:
    """Problems that the task's own checks find in training and validation data."""
    found = []
    with _quiet():
        for split in ("train", "val"):
            for dataset in checked_datasets_of(config, split):
                found += [*dataset.findings(limit=500), *check_evaluator(config, split, dataset)]
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep messages and warnings of the libraries about building out of the output."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _unfinished(config: Path) -> Path:
    """A file that exists while a config and its labels are made."""
    return config.with_name(f".{config.stem}.unfinished")


def _remove(labels: Path, config: Path, unfinished: Path) -> None:
    shutil.rmtree(labels, ignore_errors=True)
    config.unlink(missing_ok=True)
    unfinished.unlink(missing_ok=True)


def _target(out: Path | None, folder: Path) -> Path:
    """Path of the config, which is not in the data."""
    name = re.sub(r"\W+", "_", folder.name).strip("_") or "my_config"
    target = Path(os.path.abspath((out or Path(f"{name}.py")).expanduser()))
    if target.suffix != ".py":
        raise UserError(f"--out {out} must end in .py")
    if target.is_relative_to(folder):
        raise UserError(
            f"{target} would be written into your data; choose another place with --out"
        )
    return target


def _options(request: Request, folder: Path) -> Options:
    """The user's options, and what the task tells about four points and masks."""
    if request.task is None:
        choices = [
            f"--task {task.name} ({meaning})"
            for kind, meaning in ((CORNERS, "corners"), (POLYGONS, "outlines"))
            for task in TASKS.values()
            if kind in task.labels
        ]
        return replace(request.options, answer=" or ".join(choices))
    labels = TASKS[request.task].labels
    options = replace(request.options, corners=CORNERS in labels)
    if options.format is None and MASKS in labels and masks.find(Tree.of(folder)):
        # They may lie beside other labels.
        options = replace(options, format=MASKS)
    return options


def _checkpoint(weights: str | None, variant: Variant) -> str | None:
    if weights == SCRATCH:
        return None
    if weights is None or "://" in weights:
        return weights or default_checkpoint(variant)
    if not Path(weights).is_file():
        raise UserError(f"--weights {weights} does not exist; give a file, a URL or {SCRATCH!r}")
    return Path(weights).absolute().as_posix()


def _machine() -> tuple[str | None, int]:
    """Name of the GPU, if there is one, and the number of cores that this process may use."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    allowed = getattr(os, "sched_getaffinity", None)
    return gpu, len(allowed(0)) if allowed else os.cpu_count() or 1


def _trial(config: Path) -> int:
    """The largest batch that trains on this GPU."""
    from mmeformer.training.trial import measure_batch

    with _quiet():
        return measure_batch(configs.load_config(config))


def _seconds(config: Path) -> float:
    """Seconds of a training step here."""
    from mmeformer.training.trial import measure_seconds

    with _quiet():
        return measure_seconds(configs.load_config(config))


def training_time(steps: int, seconds: float, config: Path) -> str:
    """How long a training takes, and how to make a long one shorter."""
    text = f"{steps} training steps of {seconds:.2g} s: {duration(steps * seconds)} here"
    if steps * seconds > LONG:
        text += f" (shorter: fewer epochs or smaller images in {config.name})"
    return text


def duration(seconds: float) -> str:
    """A time for people: ``about 20 minutes``, ``about 3 hours``, ``about 2 days``."""
    if seconds < 90 * 60:
        count, unit = seconds / 60, "minute"
    elif seconds < 36 * 3600:
        count, unit = seconds / 3600, "hour"
    else:
        count, unit = seconds / 86400, "day"
    whole = max(1, round(count))
    return f"about {whole} {unit}{'s' if whole > 1 else ''}"


def _report_data(data: LabeledData, task: Task, report: Callable[[str], object]) -> None:
    images = {split: data.of_split(split) for split in SPLITS}
    long, short = sides_of(images["train"])
    shown = ", ".join(f"{len(found)} {split}" for split, found in images.items() if found)
    report(f"{data.root}: {data.format}, {_KINDS[data.kind]}, for {task.name}")
    report(f"images: {shown}; mostly {long} x {short} px")
    unit = {MASKS: "pixels", FOLDERS: "images"}.get(data.kind, "objects")
    counts = {split: data.counts(split) for split in SPLITS if images[split]}
    for label, name in enumerate(data.classes[:_SHOWN]):
        numbers = ", ".join(f"{count[label]:,} {split}" for split, count in counts.items())
        report(f"  {name}: {numbers} {unit}")
    if len(data.classes) > _SHOWN:
        report(f"  and {len(data.classes) - _SHOWN} more classes")
