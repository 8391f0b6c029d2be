# SPDX-License-Identifier: Apache-2.0
"""Export models to ONNX and other formats; a file is written if it passed its check."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
from mmengine.config import Config
from packaging.version import Version

from mmeformer.deploy import models
from mmeformer.deploy.graphs import TARGETS, graph_class
from mmeformer.deploy.inputs import compare_inputs
from mmeformer.deploy.metadata import export_metadata
from mmeformer.errors import UserError
from mmeformer.files import replacing, write_bytes, write_text
from mmeformer.runtime.metadata import Metadata
from mmeformer.tasks import BACKBONE, of_config

SUFFIXES = {
    "onnx": ".onnx",
    "coreml": ".mlpackage",
    "tflite": ".tflite",
    "executorch": ".pte",
}

_PACKAGES = {
    "onnx": ("onnxscript", "deploy"),
    # What writes weights; a coremltools without it is installed where there is no build.
    "coreml": ("coremltools.libmilstoragepython", "deploy"),
    "tflite": ("litert_torch", "litert"),
    "executorch": ("executorch", "executorch"),
}
"""Module that a target needs, and mmeformer's extra that installs it."""
QUANTIZER = "1.19"
"""Oldest onnxruntime that quantizes; older ones run the files."""
REAL_IMAGES = 4


@dataclass(frozen=True)
class Request:
    """Options of an export.

    Args:
        target: a key of :data:`SUFFIXES`.
        part: ``"model"``, or ``"backbone"`` for the bare backbone.
        size: (H, W) in pixels of all inputs; None for any size (ONNX only).
        batch: images per run. Without ``size``, any number.
        preprocessing: the graph takes images as they are read, and normalizes them.
        half: CoreML in float16, or TensorFlow Lite with weights in float16.
        int8: quantize to 8 bits, calibrated on these images (not CoreML).
        int8_dynamic: weights in 8 bits, and ranges of activations measured in every run (TensorFlow
            Lite only).
        max_drop: for both kinds of 8 bits: largest drop of the metric in points of a hundred.
        nms: of detectors: whether ONNX files do the NMS; else they give every box, and
            :mod:`mmeformer.runtime` does it.
        opset: ONNX only: version of its operators.

    Raises:
        ValueError: the options do not go together.
    """

    target: str
    part: str = "model"
    size: tuple[int, int] | None = None
    batch: int = 1
    preprocessing: bool = False
    half: bool = False
    int8: tuple[Path, ...] = ()
    int8_dynamic: bool = False
    max_drop: float = 1.0
    nms: bool = True
    opset: int = 17

    def __post_init__(self) -> None:
        if self.target not in SUFFIXES or self.part not in ("model", BACKBONE):
            raise ValueError(f"cannot export the {self.part} to {self.target}")
        if self.size is not None and min(self.size) < 32:
            raise ValueError(f"--size {self.size}: both sides must be at least 32 px")
        if self.batch < 1:
            raise ValueError(f"--batch must be at least 1, but is {self.batch}")
        if self.target != "onnx" and self.size is None:
            name = TARGETS[self.target]
            raise ValueError(f"{name} models have a fixed size: give --size instead of --dynamic")
        if self.target == "coreml" and self.preprocessing and self.batch > 1:
            raise ValueError("CoreML takes one image at a time: --batch is for arrays of numbers")
        if self.half and self.target not in ("coreml", "tflite"):
            name = TARGETS[self.target]
            raise ValueError(f"--fp16 is for CoreML and TensorFlow Lite; {name} files are float32")
        if self.int8 and (self.target not in ("onnx", "tflite") or self.half):
            raise ValueError("--int8 is for ONNX and TensorFlow Lite, without --fp16")
        if self.int8_dynamic and self.target != "tflite":
            raise ValueError(
                "--int8-dynamic is for TensorFlow Lite: onnxruntime's convolutions with dynamic "
                "ranges are slower than those in float32. --int8 IMAGES is for ONNX"
            )
        if self.int8_dynamic and (self.int8 or self.half):
            raise ValueError("--int8-dynamic stands alone: without --int8 and --fp16")
        if (self.int8 or self.int8_dynamic) and self.part == BACKBONE:
            raise ValueError("--int8 is for whole models: the backbone alone has no metric")
        if not self.nms and (self.target != "onnx" or self.part == BACKBONE):
            raise ValueError("--nms outside is for whole models in ONNX: other files have no NMS")
        if self.opset != 17 and self.target != "onnx":
            raise ValueError(f"--opset is for ONNX, not for {TARGETS[self.target]}")
        if self.max_drop < 0:
            raise ValueError(f"--max-drop must not be negative, but is {self.max_drop:g}")

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
        UserError: the target's package is not installed.
        FileNotFoundError: a file does not exist.
        FileExistsError: ``out`` or its JSON file exists.
        CheckFailed: the exported model gives other results; nothing is written.
        MetricDropped: 8 bits cost more than ``max_drop``; the file is beside ``out``, with
            ``refused`` in its name.
    """
    out = Path(out)
    if out.suffix != SUFFIXES[request.target]:
        raise ValueError(f"--out {out}: the name must end in {SUFFIXES[request.target]}")
    sidecar = out.with_suffix(".json")
    for path in (out, sidecar):
        if path.exists() and not force:
            raise FileExistsError(f"{path} exists; use another name, or --force to replace it")
    for image in (*images, *request.int8):
        if not Path(image).is_file():
            raise FileNotFoundError(f"image {image} does not exist")

    if request.int8 and request.target == "onnx":
        _require_quantizer()

    task = request.task(config)
    # First without the model, which takes time to build, for what the target cannot do at all.
    graph_class(task, request.target, nms=request.nms)
    _require_package(request.target)
    model = models.build_model(config, checkpoint)
    graph = graph_class(task, request.target, model, request.nms)
    metadata = export_metadata(
        config,
        model,
        task,
        size=request.size,
        batch=None if request.size is None else request.batch,
        preprocessing_in_graph=request.preprocessing,
    )
    real = [Path(image) for image in images] or models.sample_images(config, REAL_IMAGES)
    if request.int8_dynamic and not real:
        raise ValueError("--int8-dynamic is timed on a picture: give --images")
    if not real:
        report("no images of the test data here: checking on random ones alone")
    with replacing(out) as draft:
        if request.target == "onnx":
            from mmeformer.deploy import onnx

            comparison = onnx.write(model, graph, metadata, real, draft, request.opset)
        elif request.target == "tflite":
            from mmeformer.deploy import litert

            comparison = litert.write(model, graph, metadata, real, draft, request.half)
        elif request.target == "executorch":
            from mmeformer.deploy import executorch

            comparison = executorch.write(model, graph, metadata, real, draft)
        else:
            from mmeformer.deploy import coreml

            comparison = coreml.write(model, graph, metadata, real, draft, request.half)
        preprocess: Any = model.data_preprocessor
        compare_inputs(config, preprocess, metadata, real, comparison)
        comparison.report(report)
        comparison.raise_failures(out)
        if request.int8 or request.int8_dynamic:
            _quantize(draft, out, config, metadata, request.int8 or real, request, report)
    write_text(sidecar, metadata.to_json() + "\n")
    return out


def _require_package(target: str) -> None:
    module, extra = _PACKAGES[target]
    with suppress(ModuleNotFoundError):
        if find_spec(module) is not None:
            return
    fix = f"pip install 'mmeformer[{extra}]'"
    if target == "coreml" and sys.version_info >= (3, 14):
        fix = "use Python 3.13, the newest that coremltools is built for"
    raise UserError(f"--to {target} needs {module}, which is not installed: {fix}")


def _require_quantizer() -> None:
    if Version(onnxruntime.__version__) < Version(QUANTIZER):
        raise ValueError(
            f"--int8 needs onnxruntime {QUANTIZER} or newer, and {onnxruntime.__version__} is "
            "installed: pip install -U onnxruntime"
        )


def _quantize(
    draft: Path,
    out: Path,
    config: Config,
    metadata: Metadata,
    images: Sequence[Path],
    request: Request,
    report: Callable[[str], None],
) -> None:
    """Replace a checked float32 file by one in 8 bits, or keep that under another name."""
    from mmeformer.deploy.quantize import MetricDropped, quantize

    with TemporaryDirectory() as folder:
        quantized = Path(folder) / out.name
        try:
            quantize(
                draft,
                quantized,
                config,
                metadata,
                images,
                request.max_drop,
                report,
                request.int8_dynamic,
            )
        except MetricDropped as error:
            refused = out.with_name(f"{out.stem}.refused{out.suffix}")
            write_bytes(refused, quantized.read_bytes())
            raise MetricDropped(f"{out} was not written, the file is {refused}: {error}") from None
        shutil.copy(quantized, draft)
