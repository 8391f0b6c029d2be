# SPDX-License-Identifier: Apache-2.0
"""Make the report of a training from its work directory."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import shlex
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.runner import Runner

from mmeformer import configs, tasks
from mmeformer.checkpoints import safe_load
from mmeformer.checks.dataset import datasets_of
from mmeformer.checks.findings import first_of
from mmeformer.errors import UserError
from mmeformer.files import write_text
from mmeformer.images import read_image
from mmeformer.inference.pictures import at_picture_size
from mmeformer.inference.predictor import Predictor, load_predictor
from mmeformer.report import charts, history, page
from mmeformer.report.review import Review, Statistics, Summary, samples_of
from mmeformer.work_dirs import REPORT, best_checkpoint, find_config, last_checkpoint

IMAGES = 200
"""Validation images that are predicted, evenly spread over the data."""
SHOWN = 6
"""Worst and best images that are shown, of each."""
PICTURE = 480
"""Longer side of a picture in pixels."""
LOW_SCORE = 0.05
"""Score threshold of detectors whose config has none, as in mmdet."""
PACKAGES = (
    *("mmeformer", "torch", "torchvision", "timm", "mmengine", "mmcv", "mmdet", "mmsegmentation"),
    *("mmrotate", "mmpretrain", "numpy", "opencv-python-headless", "onnxruntime"),
)


def write(
    work_dir: str | Path,
    *,
    config: Config | None = None,
    checkpoint: str | Path | None = None,
    images: int = IMAGES,
    device: str | None = None,
) -> Path:
    """Write ``report.html`` into a work directory; returns its path.

    What cannot be made, such as predictions without a checkpoint, is a note in the report and a
    warning in the log.

    Args:
        work_dir: of a training, finished or not.
        config: of the training; None takes that of the work directory.
        checkpoint: None takes the best of the work directory, else the last.
        images: number of validation images to predict; 0 predicts none.
        device: such as ``cpu``; None takes the first GPU, if there is one.

    Raises:
        UserError: the folder is not a work directory.
        OSError: the file cannot be written.
    """
    work_dir = Path(work_dir)
    if config is None:
        config = configs.load_config(find_config(work_dir))
    report = _Report(work_dir, config, checkpoint, images, device)
    path = work_dir / REPORT
    write_text(path, report.html())
    return path


@contextmanager
def after_training(runner: Runner) -> Iterator[None]:
    """Context manager around ``runner.train()`` that writes the report at its end.

    Also after Ctrl-C, and after an error that stops the training. A report that fails is a warning.
    The config's ``report`` has arguments of :func:`write`; ``report=None`` writes none.
    """
    try:
        yield
    except (KeyboardInterrupt, UserError):
        _try_to_write(runner)
        raise
    _try_to_write(runner)


def _try_to_write(runner: Runner) -> None:
    settings = runner.cfg.get("report", {})
    if settings is None or not is_main_process() or not runner.iter:
        return
    print_log(f"writing {Path(runner.work_dir, REPORT)} (Ctrl-C skips it)", "current")
    try:
        write(runner.work_dir, **settings)
    except KeyboardInterrupt:
        print_log("no report: it was skipped", "current", logging.WARNING)
    except Exception as error:
        print_log(f"no report: {_reason(error)}", "current", logging.WARNING)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class _Image:
    """A validation image with its score.

    Args:
        score: see :meth:`Review.add`.
        path: of the file.
        result, truth: prediction and labels, as results of the task.
    """

    score: float
    path: str
    result: Any
    truth: Any


@dataclass(frozen=True)
class _Reviewed:
    """The comparison of predictions with labels."""

    summary: Summary
    images: list[_Image]
    """The worst and the best images, the worst first."""
    count: int
    """Number of images that were predicted."""
    total: int
    """Number of all validation images."""
    seconds: float
    """Of predicting one image."""
    predictor: Predictor
    review: Review


class _Report:
    """One report.

    Args:
        work_dir, config, checkpoint, images, device: see :func:`write`.
    """

    def __init__(
        self,
        work_dir: Path,
        config: Config,
        checkpoint: str | Path | None,
        images: int,
        device: str | None,
    ) -> None:
        self.work_dir = work_dir
        self.config = config
        self.history = history.read(work_dir)
        self.images = images
        self.device = device
        if checkpoint is None:
            # There may be none yet, which the report then says.
            self.checkpoint = best_checkpoint(work_dir) or last_checkpoint(work_dir)
        else:
            self.checkpoint = Path(checkpoint)
        self.reviewed: _Reviewed | None = None
        self.problem = ""

    def html(self) -> str:
        """The page."""
        try:
            self.reviewed = self._review()
        except Exception as error:
            self.problem = _reason(error)
            print_log(f"report without predictions: {self.problem}", "current", logging.WARNING)
        makers = {
            "Curves": self._curves,
            "Classes": self._classes,
            "Images": self._pictures,
            "Labels": self._labels,
            "Speed": self._speed,
            "Next steps": self._next_steps,
            "Config and versions": self._setup,
        }
        sections = [self._section(name, make) for name, make in makers.items()]
        subtitle = f"{Path(self.config.filename or '').name} in {self.work_dir}"
        return page.page(f"Training of {self.work_dir.name}", subtitle, self._tiles(), sections)

    @staticmethod
    def _section(name: str, make: Callable[[], str]) -> page.Section:
        try:
            body = make()
        except Exception as error:
            body = page.note(f"Not available: {_reason(error)}")
            text = f"report without the section {name}: {_reason(error)}"
            print_log(text, "current", logging.WARNING)
        return page.Section(name, body)

    # --- numbers ------------------------------------------------------------------------------

    def _hook(self, name: str) -> dict:
        """The settings of one of the config's ``default_hooks``."""
        return (self.config.get("default_hooks") or {}).get(name) or {}

    @property
    def _unit(self) -> str:
        """What the places of metrics count."""
        by_epoch = self._hook("logger").get("log_metric_by_epoch", True)
        return "epoch" if by_epoch and "max_epochs" in self.config.train_cfg else "iteration"

    def _metrics(self) -> list[history.Series]:
        # In a training by iterations, all that is logged by epoch has the step 0.
        return self.history.metrics("step" if self._unit == "epoch" else "after")

    def _best(self) -> tuple[str, float, float] | None:
        """The metric that chooses the best checkpoint, its best value, and where that was."""
        metrics = self._metrics()
        if not metrics:
            return None
        hook = self._hook("checkpoint")
        wanted = hook.get("save_best")
        wanted = wanted[0] if isinstance(wanted, (list, tuple)) and wanted else wanted
        series = next((item for item in metrics if item.name == wanted), metrics[0])
        best = min if hook.get("rule") == "less" else max
        value, step = best(zip(series.values, series.steps, strict=True))
        return series.name, value, step

    def _tiles(self) -> list[tuple[str, str]]:
        tiles = []
        if best := self._best():
            tiles.append((f"best {best[0]}, {self._unit} {best[2]:g}", f"{best[1]:.4g}"))
        losses = self.history.losses()
        if losses and losses[0].values:
            tiles.append((f"last {losses[0].name}", f"{losses[0].values[-1]:.4g}"))
        tiles.append(("iterations", f"{self.history.iterations:,}"))
        if seconds := self._training_seconds():
            tiles.append(("time of training", str(timedelta(seconds=round(seconds)))))
        if self.checkpoint is not None:
            tiles.append(("checkpoint of this report", self.checkpoint.name))
        return tiles

    def _training_seconds(self) -> float:
        """Seconds of all iterations in the log, without validation."""
        total, before = 0.0, 0
        for row in self.history.training:
            total += (row["iter"] - before) * row.get("time", 0.0)
            before = row["iter"]
        return total

    def _curves(self) -> str:
        if not self.history.training:
            return page.note(
                "No numbers were logged yet: the first come after default_hooks.logger.interval "
                "iterations."
            )
        items = []
        if losses := self.history.losses():
            svg = charts.lines(losses, "loss", "iteration", log=True, bold="loss")
            items.append(page.chart(svg, "loss and its terms over the iterations"))
        if metrics := self._metrics():
            best = self._best()
            svg = charts.lines(metrics, "metric", self._unit, bold=best and best[0], marks=True)
            items.append(page.chart(svg, "metrics of the validations"))
        if rates := self.history.learning_rates():
            svg = charts.lines(rates, "learning rate", "iteration")
            items.append(page.chart(svg, "learning rate over the iterations"))
        if times := self.history.times():
            svg = charts.lines(times, "seconds per iteration", "iteration")
            items.append(page.chart(svg, "seconds of an iteration, and of it to wait for data"))
        text = page.charts(items)
        if not metrics:
            text += page.note("There was no validation yet (train_cfg.val_interval).")
        return text

    # --- predictions --------------------------------------------------------------------------

    def _review(self) -> _Reviewed:
        """Predict validation images with the checkpoint and compare them with their labels."""
        if not self.images:
            raise UserError("no images were to be predicted")
        if self.checkpoint is None:
            raise UserError(f"there is no checkpoint in {self.work_dir} yet")
        task = tasks.of_config(self.config)
        if self.config.get("val_dataloader") is None:
            raise UserError("the config has no val_dataloader")
        datasets = datasets_of(self.config, "val")
        kind = tasks.load(task.predictor)
        predictor = load_predictor(
            self.config,
            str(self.checkpoint),
            device=self.device,
            score_thr=_score_thr(self.config.model) if kind.has_scores else None,
        )
        review = tasks.load(task.review)(predictor.classes)
        samples = samples_of(datasets)
        count = min(self.images, len(samples))
        places = np.linspace(0, len(samples) - 1, count).round().astype(int)
        images: list[_Image] = []
        seconds = 0.0
        for dataset, index in (samples[place] for place in places):
            info = dataset.get_data_info(index)
            sample = dataset.pipeline(info)["data_samples"]
            if (truth := review.truth(sample)) is None:
                raise UserError("the pipeline of val_dataloader loads no labels")
            image = read_image(info["img_path"], predictor.reading)
            begin = time.perf_counter()
            (result,) = predictor.predict_images([image])
            seconds += time.perf_counter() - begin
            score = review.add(result, sample)
            if score is not None:
                images.append(_Image(score, str(info["img_path"]), result, truth))
                images = _extremes(images)
        return _Reviewed(
            review.summary(),
            images,
            count,
            len(samples),
            seconds / max(count, 1),
            predictor,
            review,
        )

    def _classes(self) -> str:
        if self.reviewed is None:
            return page.note(f"No predictions: {self.problem}.")
        found = self.reviewed
        summary = found.summary
        part = "all" if found.count == found.total else f"{found.count} of {found.total}"
        text = page.paragraph(
            f"{Path(self.checkpoint or '').name} on {part} validation images"
            + ("." if found.count == found.total else ", evenly spread over the data.")
        )
        items = []
        if summary.curves:
            svg = charts.precision_recall(summary.curves)
            items.append(
                page.heading(f"Precision and recall of {summary.curves_title}")
                + page.chart(svg, "precision over recall of every class")
            )
        svg = charts.confusion(summary.confusion)
        items.append(
            page.heading(f"Confusion matrix ({summary.confusion.unit})")
            + page.chart(svg, "confusion matrix: rows are labels, columns predictions")
        )
        items.append(page.heading("Classes") + page.table(summary.table))
        text += page.charts([f"<div>{item}</div>" for item in items])
        return text + page.paragraph(summary.confusion.remark)

    def _pictures(self) -> str:
        if self.reviewed is None:
            return page.note(f"No predictions: {self.problem}.")
        found = self.reviewed
        if not found.images:
            return page.note("No image has an object or a detection.")
        text = page.paragraph(f"Labels left, prediction right. Number: {found.review.image_score}.")
        worst, best = found.images[:SHOWN], found.images[SHOWN:][::-1]
        for title, images in (("Worst", worst), ("Best", best)):
            if images:
                text += page.heading(title if best else "From worst to best")
                text += page.pictures([_pair(found, image) for image in images])
        return text

    # --- everything else ----------------------------------------------------------------------

    def _labels(self) -> str:
        task = tasks.of_config(self.config)
        found: Statistics = tasks.load(task.review).statistics(datasets_of(self.config, "train"))
        text = page.paragraph(
            f"{found.images:,} training images, {int(found.amounts.sum()):,} {found.unit}"
            + (f"; {found.remark}." if found.remark else ".")
        )
        items = [page.chart(charts.amounts(found), f"{found.unit} per class")]
        if found.sizes is not None and len(found.sizes):
            items.append(page.chart(charts.sizes(found.sizes), "sizes of the objects"))
        text += page.charts(items)
        rows = tuple(
            zip(found.names, found.amounts.tolist(), found.in_images.tolist(), strict=True)
        )
        body = page.table(page.Table(("class", found.unit, "images with it"), rows))
        if absent := [name for name, amount, _ in rows if not amount]:
            text += page.note(f"No training label: {first_of(absent, 20)}.")
        return text + page.folded("Numbers of every class", body)

    def _speed(self) -> str:
        rows: list[tuple[str, str]] = []
        if seconds := self.history.seconds():
            step, waiting = seconds
            batch, where = self._batch_size()
            rows += [
                ("training, images per second", f"{batch / max(step, 1e-9):.1f} ({where})"),
                ("training, time per iteration", f"{1000 * step:.0f} ms"),
                ("of it waiting for data", f"{1000 * waiting:.0f} ms"),
            ]
        if memory := self.history.memory():
            rows.append(("largest memory of the GPU", f"{memory / 1024:.1f} GiB"))
        if self.reviewed is not None:
            device = next(self.reviewed.predictor.model.parameters()).device
            rate = 1 / max(self.reviewed.seconds, 1e-9)
            rows.append(("prediction, images per second", f"{rate:.1f} (one by one on {device})"))
        if not rows:
            return page.note("No times were logged (default_hooks.timer).")
        return page.table(page.Table(("", "value"), tuple(rows)))

    def _batch_size(self) -> tuple[int, str]:
        """Images per iteration of all processes, and what they are."""
        if self.checkpoint is not None:
            place = (safe_load.load(self.checkpoint).get("meta") or {}).get("place") or {}
            if place.get("batch_size"):
                return place["batch_size"], f"batches of {place['batch_size']}"
        batch = self.config.train_dataloader.get("batch_size") or 1
        return batch, f"batches of {batch} per process"

    def _next_steps(self) -> str:
        config = shlex.quote(str(self._config_path()))
        best = "CHECKPOINT.pth" if self.checkpoint is None else str(self.checkpoint)
        checkpoint = shlex.quote(best)
        predict = f"mmeformer predict {config} {checkpoint} IMAGES --out predictions"
        test = f"mmeformer test {config} {checkpoint}"
        export = f"mmeformer export {config} {checkpoint} --to onnx --out model.onnx"
        resume = f"mmeformer train {config} --work-dir {shlex.quote(str(self.work_dir))} --resume"
        steps = [("Predict on your images", predict), ("Export to ONNX", export)]
        if self._is_unfinished():
            steps.insert(0, ("Continue the training", resume))
        else:
            steps.insert(1, ("Evaluate on the test data of the config", test))
        text = "".join(page.heading(title) + page.code(command) for title, command in steps)
        python = (
            "from mmeformer import load\n\n"
            f"model = load({str(self.work_dir)!r})\n"
            'model("image.jpg").save("out.png")'
        )
        return text + page.heading("The same in Python") + page.code(python)

    def _config_path(self) -> Path:
        try:
            return find_config(self.work_dir)
        except UserError:
            return Path(self.config.filename or "CONFIG.py")

    def _is_unfinished(self) -> bool:
        plan = self.config.get("train_cfg") or {}
        last = self.history.training[-1] if self.history.training else {}
        if "max_epochs" in plan:
            return last.get("epoch", 0) < plan["max_epochs"]
        interval = self._hook("logger").get("interval", 10)
        return self.history.iterations + interval <= plan.get("max_iters", 0)

    def _setup(self) -> str:
        device = "cpu"
        if torch.cuda.is_available():
            device = torch.cuda.get_device_name()
        rows = [("Python", platform.python_version()), ("system", platform.platform())]
        rows.append(("device of this report", device))
        rows += versions()
        text = page.table(page.Table(("", "version"), tuple(rows)))
        return text + page.folded("Config", page.code(self.config.pretty_text))


def versions() -> list[tuple[str, str]]:
    """Installed packages that decide a result, and their versions."""
    found = []
    for name in PACKAGES:
        # OpenMMLab's packages are maintained under other names.
        for distribution in (f"onedl-{name}", name):
            try:
                found.append((distribution, importlib.metadata.version(distribution)))
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def _score_thr(model: Any) -> float:
    """The score threshold of a detector's test settings, by which its metrics are computed."""
    settings = model.get("test_cfg") or {}
    threshold = (settings.get("rcnn") or settings).get("score_thr")
    return LOW_SCORE if threshold is None else float(threshold)


def _pair(found: _Reviewed, item: _Image) -> str:
    """Labels and prediction of an image side by side."""
    predictor = found.predictor
    image = read_image(item.path, predictor.reading)
    with warnings.catch_warnings():
        # Of boxes that end at the border.
        warnings.filterwarnings("ignore", module="mmengine.visualization")
        sides = [
            at_picture_size(np.ascontiguousarray(predictor.draw(image, result)), 0, PICTURE)[0]
            for result in (item.truth, found.review.shown(item.result))
        ]
    gap = np.full((sides[0].shape[0], 6, 3), 255, np.uint8)
    caption = f"{item.score:.2f}  {Path(item.path).name}"
    return page.picture(np.hstack([sides[0], gap, sides[1]]), caption)


def _extremes(images: list[_Image]) -> list[_Image]:
    """The worst and the best images so far, the worst first."""
    ordered = sorted(images, key=lambda item: item.score)
    return ordered if len(ordered) <= 2 * SHOWN else ordered[:SHOWN] + ordered[-SHOWN:]
