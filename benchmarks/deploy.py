# SPDX-License-Identifier: Apache-2.0
"""One table of all targets: works or not, difference, metric, size and time against onnxruntime.

    python benchmarks/deploy.py      # all models, with the quickstarts' checkpoints
    python benchmarks/deploy.py --models segmentation --targets onnxruntime openvino --rounds 5

Models are those of the quickstarts (weights of work_dirs/quickstart-TASK, or random ones, which
have no metric) and backbones at 224 px. All files of a model take turns in one process. A target
whose library is not installed is a row that says so.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config

from mmeformer import configs, runtime, tasks
from mmeformer.deploy import models
from mmeformer.deploy.check import Comparison, random_image
from mmeformer.deploy.export import SUFFIXES, Request, export
from mmeformer.deploy.graphs import graph_class
from mmeformer.errors import UserError
from mmeformer.files import write_text

TEST_IMAGES, CALIBRATION_IMAGES = 4, 64

BACKBONES = {
    "V2-S0": "segmentation/semantic-fpn_efficientformerv2-s0_40k_ade20k-512x512.py",
    "V2-L": "segmentation/semantic-fpn_efficientformerv2-l_40k_ade20k-512x512.py",
    "L1": "segmentation/semantic-fpn_efficientformer-l1_40k_ade20k-512x512.py",
}


@dataclass
class Case:
    """A model that is exported to every target."""

    name: str
    config: Config
    checkpoint: str
    request: dict[str, Any]
    images: list[Path]
    calibration: list[Path]
    has_metric: bool

    @property
    def task(self) -> str:
        return Request("onnx", **self.request).task(self.config)


@dataclass(frozen=True)
class Target:
    """How a file is written, and run.

    Args:
        name: in the table.
        options: fields of :class:`Request`.
        load: from the file and a number of threads to a predictor; None: it runs elsewhere.
    """

    name: str
    options: dict[str, Any]
    load: Callable[[Path, int], runtime.Predictor] | None


def _openvino(path: Path, threads: int) -> runtime.Predictor:
    from mmeformer.runtime import openvino

    return openvino.load(path, threads=threads)


def _tensorrt(path: Path, threads: int) -> runtime.Predictor:
    # In float32: layer norms and talking heads do not survive float16 everywhere.
    return runtime.load(path, providers=["TensorrtExecutionProvider", "CUDAExecutionProvider"])


TARGETS = (
    Target("onnxruntime", dict(target="onnx"), runtime.load),
    Target("onnxruntime int8", dict(target="onnx", int8=True), runtime.load),
    Target("openvino", dict(target="onnx"), _openvino),
    Target("tensorrt", dict(target="onnx"), _tensorrt),
    Target("litert", dict(target="tflite"), runtime.load),
    Target("litert float16", dict(target="tflite", half=True), runtime.load),
    Target("litert int8", dict(target="tflite", int8=True), runtime.load),
    Target("executorch", dict(target="executorch"), runtime.load),
    Target("coreml float16", dict(target="coreml", half=True), None),
)


def backbone_case(name: str, side: int, folder: Path) -> Case:
    """A backbone alone, with random weights."""
    config = configs.load_config(BACKBONES[name])
    image = folder / "image.png"
    cv2.imwrite(str(image), random_image(side, side, 0))
    request = dict(part=tasks.BACKBONE, size=(side, side))
    return Case(f"{name}, {side} px", config, _random(config, folder), request, [image], [], False)


def quickstart_case(task: str, side: int, folder: Path) -> Case:
    """The model of a quickstart, with its weights and test data if they are there.

    A classifier's side is that of its crops.
    """
    config = configs.load_config(tasks.load(tasks.TASKS[task].quickstart).config)
    steps = config.test_dataloader.dataset.pipeline
    crops = [step.crop_size for step in steps if "crop_size" in step]
    side = crops[0] if crops else side
    record = Path(f"work_dirs/quickstart-{task}/last_checkpoint")
    images = models.sample_images(config, TEST_IMAGES)
    training = Config(dict(test_dataloader=config.train_dataloader))
    calibration = models.sample_images(training, 10_000)
    has_metric = record.is_file() and bool(images)
    if not images:
        images = [folder / "image.png"]
        cv2.imwrite(str(images[0]), random_image(side, side, 0))
    checkpoint = record.read_text().strip() if record.is_file() else _random(config, folder)
    return Case(
        f"{task}, {side} px",
        config,
        checkpoint,
        dict(size=(side, side)),
        images,
        calibration[:: -(-len(calibration) // CALIBRATION_IMAGES) or 1],
        has_metric,
    )


def _random(config: Config, folder: Path) -> str:
    torch.manual_seed(0)
    model = models.build_model(config.copy())
    path = folder / "random.pth"
    torch.save(dict(state_dict=model.state_dict(), meta={}), path)
    return str(path)


def write_file(case: Case, target: Target, folder: Path) -> Path:
    """Export a model, checked."""
    options = dict(target.options)
    if options.pop("int8", False):
        if not case.has_metric:
            raise ValueError("no trained weights or test data: 8 bits cannot be measured")
        options.update(int8=tuple(case.calibration))
    request = Request(**options, **case.request)
    suffix = SUFFIXES[request.target]
    return export(
        Config(case.config.copy().to_dict(), filename=case.config.filename),
        case.checkpoint,
        folder / f"{target.name.replace(' ', '-')}{suffix}",
        request,
        images=case.images[:1],
        report=lambda line: None,
    )


def difference(case: Case, ours: runtime.Predictor, theirs: runtime.Predictor) -> str:
    """Difference of results from those of the ONNX file in onnxruntime."""
    comparison = Comparison()
    pairs = [(theirs.predict(image), ours.predict(image)) for image in case.images]
    graph_class(case.task, "onnx").compare(pairs, comparison)
    return "; ".join(comparison.lines).replace("  <- beyond tolerance", "")


def metric(case: Case, path: Path) -> str:
    """The metrics that the quickstart has a goal for, on its test data."""
    if not case.has_metric:
        return ""
    from mmeformer.deploy.quantize import Measure

    with tempfile.TemporaryDirectory() as folder:
        found = Measure(case.config, case.images[0], Path(folder)).metrics(path)
    return " / ".join(f"{value:.1f}" for value in found.values())


def take_turns(
    predictors: Sequence[runtime.Predictor], image: Path, rounds: int, threads: int
) -> list[float]:
    """Least milliseconds of a run of each, turn by turn.

    On one thread they are the processor's, so that other programs count little.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    inputs = [next(iter(predictor.inputs(image))) for predictor in predictors]
    times: list[list[float]] = [[] for _ in predictors]
    for turn in range(rounds + 2):
        for place, predictor in enumerate(predictors):
            start = clock()
            predictor.session.run(None, inputs[place])
            if turn >= 2:
                times[place].append(clock() - start)
    return [min(values) * 1000 for values in times]


def measure(
    case: Case, targets: Sequence[Target], threads: Sequence[int], rounds: int, folder: Path
) -> list[list[str]]:
    """Rows of the table for one model; the first target is the baseline."""
    rows: list[list[str]] = []
    files: dict[str, Path] = {}
    for target in targets:
        row = [case.name, target.name, "yes", "", "", "", *("" for _ in threads)]
        rows.append(row)
        try:
            files[target.name] = path = write_file(case, target, folder)
            size = sum(f.stat().st_size for f in [path, *path.rglob("*")] if f.is_file())
            row[5] = f"{size / 1e6:.1f}"
            if target.load is None:
                row[2] = "written"
                continue
            predictor = target.load(path, 1)
            # Of files in 8 bits the metric tells, not single numbers.
            if target is not targets[0] and not target.options.get("int8"):
                baseline = runtime.load(files[targets[0].name], 1)
                row[3] = difference(case, predictor, baseline)
            if target.options["target"] != "onnx" or target.load is runtime.load:
                row[4] = metric(case, path)
        except Exception as error:  # a target that does not work is a row, not the end
            row[2] = f"no: {str(error).splitlines()[0][:90] if str(error) else type(error)}"
            files.pop(target.name, None)
            if not isinstance(error, (ImportError, ValueError, UserError)):
                traceback.print_exc()
    runs = [(row, t) for row, t in zip(rows, targets, strict=True) if row[2] == "yes"]
    for place, count in enumerate(threads):
        predictors = [target.load(files[target.name], count) for _, target in runs if target.load]
        times = take_turns(predictors, case.images[0], rounds, count)
        for (row, _), milliseconds in zip(runs, times, strict=True):
            row[6 + place] = f"{milliseconds / times[0]:.2f} ({milliseconds:.1f} ms)"
    return rows


def table(rows: Sequence[Sequence[str]], threads: Sequence[int]) -> str:
    """Markdown."""
    head = ["model", "target", "works", "difference from onnxruntime", "metric", "MB"]
    head += [f"time, {count} thread{'s' * (count > 1)}" for count in threads]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*BACKBONES, *tasks.TASKS]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    every = [target.name for target in TARGETS]
    parser.add_argument("--targets", nargs="+", choices=every, default=every)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--side", type=int, help="side in px of the inputs (default: 224, 128)")
    parser.add_argument("--out", help="Markdown file to write")
    args = parser.parse_args()
    targets = [TARGETS[0], *(t for t in TARGETS[1:] if t.name in args.targets)]
    rows: list[list[str]] = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            make = backbone_case if name in BACKBONES else quickstart_case
            case = make(name, args.side or (224 if name in BACKBONES else 128), folder)
            rows += measure(case, targets, args.threads, args.rounds, folder)
        print(table(rows, args.threads), flush=True)
    print(f"torch {torch.__version__}, numpy {np.__version__}, OpenCV {cv2.__version__}")
    if args.out:
        write_text(args.out, table(rows, args.threads))


if __name__ == "__main__":
    main()
