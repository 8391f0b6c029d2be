# SPDX-License-Identifier: Apache-2.0
"""Export models to ONNX and CoreML; only files that passed the check are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmeformer.deploy import models
from mmeformer.deploy.graphs import graph_class
from mmeformer.deploy.inputs import compare_inputs
from mmeformer.deploy.metadata import export_metadata
from mmeformer.files import replacing, write_text
from mmeformer.tasks import BACKBONE, of_config

SUFFIXES = {"onnx": ".onnx", "coreml": ".mlpackage"}

REAL_IMAGES = 4


@dataclass(frozen=True)
class Request:
    """Options of an export.

    Args:
        target: ``"onnx"`` or ``"coreml"``.
        part: ``"model"``, or ``"backbone"`` for the bare backbone.
        size: (H, W) in pixels of all inputs; None for any size (ONNX only).
        batch: images per run. Without ``size``, any number.
        preprocessing: the graph takes images as they are read, and normalizes them.
        half: CoreML in float16.

    Raises:
        ValueError: the options do not go together.
    """

    target: str
    part: str = "model"
    size: tuple[int, int] | None = None
    batch: int = 1
    preprocessing: bool = False
    half: bool = False

    def __post_init__(self) -> None:
        if self.target not in SUFFIXES or self.part not in ("model", BACKBONE):
            raise ValueError(f"cannot export the {self.part} to {self.target}")
        if self.size is not None and min(self.size) < 32:
            raise ValueError(f"--size {self.size}: both sides must be at least 32 px")
        if self.batch < 1:
            raise ValueError(f"--batch must be at least 1, but is {self.batch}")
        if self.target == "coreml" and self.size is None:
            raise ValueError("CoreML models have a fixed size: give --size instead of --dynamic")
        if self.target == "coreml" and self.preprocessing and self.batch > 1:
            raise ValueError("CoreML takes one image at a time: --batch is for arrays of numbers")
        if self.target == "onnx" and self.half:
            raise ValueError("--fp16 is for CoreML; ONNX files are float32")

    def task(self, config: Config) -> str:
        """The key of :func:`mmeformer.tasks.exports` for this part of a config's model.

        Raises:
            ValueError: the config is of no known task.
        """
        return BACKBONE if self.part == BACKBONE else of_config(config).name


def export(
    config: Config,
    checkpoint: str,
    out: str | Path,
    request: Request,
    *,
    images: Sequence[str | Path] = (),
    force: bool = False,
    report: Callable[[str], None] = print,
) -> Path:
    """Export a trained model, check it, and write it with its metadata.

    The metadata is inside the file; ``model.json`` beside ``model.onnx`` is a copy for people.

    Args:
        config: of the model.
        checkpoint: of the model.
        out: file to write (a folder, for CoreML).
        request: see :class:`Request`.
        images: real images for the check, beside random ones; if empty, the first images of the
            config's test data, if they exist.
        force: replace existing files.
        report: called with each line of the check.

    Returns:
        ``out``.

    Raises:
        ValueError: this model, or this request, cannot be exported.
        FileNotFoundError: a file does not exist.
        FileExistsError: ``out`` or its JSON file exists.
        CheckFailed: the exported model gives other results; nothing is written.
    """
    out = Path(out)
    if out.suffix != SUFFIXES[request.target]:
        raise ValueError(f"--out {out}: the name must end in {SUFFIXES[request.target]}")
    sidecar = out.with_suffix(".json")
    for path in (out, sidecar):
        if path.exists() and not force:
            raise FileExistsError(f"{path} exists; use another name, or --force to replace it")
    for image in images:
        if not Path(image).is_file():
            raise FileNotFoundError(f"image {image} does not exist")

    task = request.task(config)
    graph = graph_class(task, request.target)
    model = models.build_model(config, checkpoint)
    metadata = export_metadata(
        config,
        model,
        task,
        size=request.size,
        batch=None if request.size is None else request.batch,
        preprocessing_in_graph=request.preprocessing,
    )
    real = [Path(image) for image in images] or models.sample_images(config, REAL_IMAGES)
    if not real:
        report("no images of the test data here: checking on random ones alone")
    with replacing(out) as draft:
        if request.target == "onnx":
            from mmeformer.deploy import onnx

            comparison = onnx.write(model, graph, metadata, real, draft)
        else:
            from mmeformer.deploy import coreml

            comparison = coreml.write(model, graph, metadata, real, draft, request.half)
        preprocess: Any = model.data_preprocessor
        compare_inputs(config, preprocess, metadata, real, comparison)
        comparison.report(report)
        comparison.raise_failures(out)
    write_text(sidecar, metadata.to_json() + "\n")
    return out
