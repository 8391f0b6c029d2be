# SPDX-License-Identifier: Apache-2.0
"""Input of a config's own test pipeline: which settings the runtime has, and a comparison of both.

The runtime prepares images itself, without OpenMMLab. So every step of the test pipeline, every
argument of a step and every argument of the data preprocessor is either one that the runtime
follows, or one that leaves the input of the network as it is. Anything else is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate

from mmeformer.deploy import check
from mmeformer.images import read_image, write_image
from mmeformer.runtime.images import prepare
from mmeformer.runtime.metadata import Metadata
from mmeformer.settings import type_name, without_annotations
from mmeformer.tasks import BACKBONE

_ANY = None
"""In place of the accepted values: the runtime follows the setting, or it changes no input."""

_Accepted = Mapping[str, Sequence[Any] | None]


def _any(names: str) -> _Accepted:
    """Settings that may have any value."""
    return dict.fromkeys(names.split(), _ANY)


_STEPS: dict[str, _Accepted] = {
    "LoadImageFromFile": {
        "to_float32": (False,),
        "color_type": ("color",),
        "imdecode_backend": ("cv2", None),
        **_any("file_client_args ignore_empty bands stretch backend_args"),
    },
    "Resize": {
        "scale_factor": (None,),
        "backend": ("cv2",),
        "interpolation": ("bilinear",),
        **_any("scale keep_ratio clip_object_border"),
    },
    "ResizeToMultiple": {"interpolation": ("bilinear", None), **_any("size_divisor")},
    "ResizeEdge": {
        "edge": ("short",),
        "backend": ("pillow",),
        "interpolation": ("bicubic",),
        **_any("scale"),
    },
    "CenterCrop": {"auto_pad": (False,), **_any("crop_size pad_cfg clip_object_border")},
}
_DEFAULTS: dict[str, Mapping[str, Any]] = {
    "ResizeEdge": dict(edge="short", backend="cv2", interpolation="bilinear"),
}
"""Arguments that a step takes if the config does not give them, and that are not accepted so."""

_PREPROCESSORS: dict[str, _Accepted] = {
    "DetDataPreprocessor": {
        "pad_value": (0,),
        **_any("mean std bgr_to_rgb rgb_to_bgr pad_size_divisor"),
        # Of training, of the ground truth, or of the device.
        **_any("pad_mask mask_pad_value pad_seg seg_pad_value boxtype2tensor non_blocking"),
        **_any("batch_augments"),
    },
    "SegDataPreProcessor": {
        "test_cfg": (None, {}),
        **_any("mean std bgr_to_rgb rgb_to_bgr"),
        # Of training; without test_cfg no image is padded in a test.
        **_any("size size_divisor pad_val seg_pad_val batch_augments"),
    },
    "ClsDataPreprocessor": {
        "pad_size_divisor": (1,),
        **_any("mean std to_rgb pad_value"),
        # Of the labels, or of training.
        **_any("to_onehot num_classes batch_augments"),
    },
}


def input_steps(config: Config) -> list[Any]:
    """Steps of the config's test pipeline that make the input: all but those about annotations.

    Raises:
        ValueError: the test data has no pipeline of its own.
    """
    dataset = config.test_dataloader.dataset
    if "pipeline" not in dataset:
        raise ValueError(
            f"test_dataloader.dataset is a {dataset.type} without a pipeline: set it to the data "
            "set inside, whose pipeline the export follows"
        )
    return without_annotations(dataset.pipeline)


def pipeline_settings(config: Config) -> dict[str, Any]:
    """Fields of :class:`Metadata` from the test pipeline: ``scale``, ``keep_ratio``, ``multiple``.

    Raises:
        ValueError: a step, or one of its arguments, is none that the runtime follows.
    """
    settings: dict[str, Any] = {}
    for name, step in _pixel_steps(config):
        if name == "Resize" and not settings and "scale" in step:
            scale = step["scale"]
            settings["scale"] = (scale, scale) if isinstance(scale, int) else tuple(scale)
            settings["keep_ratio"] = step.get("keep_ratio", False)
        elif name == "ResizeToMultiple" and "multiple" not in settings:
            settings["multiple"] = step.get("size_divisor", 32)
        else:
            raise ValueError(
                f"the runtime does not have the step {name} of the test pipeline, only "
                "LoadImageFromFile, one Resize with a scale, then one ResizeToMultiple"
            )
    return settings


def crop_settings(config: Config) -> dict[str, Any]:
    """Fields of :class:`Metadata` from a classifier's test pipeline: ``shorter_side``, ``crop``.

    Raises:
        ValueError: a step, or one of its arguments, is none that the runtime follows; or the crop
            is larger than the image.
    """
    steps = list(_pixel_steps(config))
    names = [name for name, _ in steps]
    if names != ["ResizeEdge", "CenterCrop"]:
        raise ValueError(
            f"the test pipeline has the steps {', '.join(names) or 'of no crop'}, but the runtime "
            "only LoadImageFromFile, ResizeEdge, CenterCrop: change the pipeline"
        )
    side, crop = steps[0][1]["scale"], steps[1][1]["crop_size"]
    crop = (crop, crop) if isinstance(crop, int) else tuple(crop)
    if max(crop) > side:
        raise ValueError(
            f"the test pipeline cuts {crop} from images of which the shorter side is {side}: make "
            "the crop no larger than ResizeEdge.scale"
        )
    return dict(shorter_side=side, crop=crop)


def _pixel_steps(config: Config) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Names and settings of the steps that change pixels."""
    for step in input_steps(config):
        name = type_name(step)
        if name in _STEPS:
            given = {**_DEFAULTS.get(name, {}), **step}
            _require_accepted(given, _STEPS[name], f"step {name} of the test pipeline")
        if name != "LoadImageFromFile" and not name.startswith("Pack"):
            yield name, step


def preprocessor_settings(config: Config, task: str) -> dict[str, Any]:
    """Fields of :class:`Metadata` from the data preprocessor: ``mean``, ``std``, ``bgr_to_rgb``.

    Without ``mean`` and ``std`` the network sees values from 0 to 255; one number stands for all
    three channels. Of a backbone, which pads no image, other arguments do not count.

    Raises:
        ValueError: it is of another type, or has an argument that the runtime does not follow.
    """
    preprocessor = config.model.get("data_preprocessor") or dict(type="none")
    name = type_name(preprocessor)
    if task != BACKBONE and name not in _PREPROCESSORS:
        raise ValueError(
            f"model.data_preprocessor is {name}, but the runtime follows only "
            f"{', '.join(_PREPROCESSORS)}"
        )
    if task != BACKBONE:
        _require_accepted(preprocessor, _PREPROCESSORS[name], "model.data_preprocessor")
    mean, std = (
        tuple(map(float, preprocessor.get(key) or (neutral,)))
        for key, neutral in (("mean", 0), ("std", 1))
    )
    # The network sees the channels in the order of the file or reversed, whatever that is called.
    reverse = any(preprocessor.get(key) for key in ("bgr_to_rgb", "rgb_to_bgr", "to_rgb"))
    return dict(mean=mean * (3 // len(mean)), std=std * (3 // len(std)), bgr_to_rgb=reverse)


def compare_inputs(
    config: Config,
    preprocess: Callable[..., Any],
    metadata: Metadata,
    images: Sequence[Path],
    comparison: check.Comparison,
) -> None:
    """Compare the runtime's input for an image file with that of the config's own test pipeline.

    The image is at the size of the pipeline, also for a file of a fixed size. Of a backbone, which
    the runtime gives images of any size, only reading and normalizing are compared.

    Args:
        config: of the model.
        preprocess: the model's ``data_preprocessor``.
        metadata: of the exported file.
        images: the first one is used; if there is none, a random one.
        comparison: gets the result.
    """
    with TemporaryDirectory() as folder:
        if images:
            path = images[0]
        else:
            path = Path(folder) / "random.jpg"
            write_image(path, check.random_image(150, 210, 2))
        image = read_image(path, metadata.reading)
        if metadata.task == BACKBONE:
            planes = torch.from_numpy(image.transpose(2, 0, 1).copy())
            batch: Any = dict(inputs=[planes], data_samples=None)
            shape = image.shape[:2]
        else:
            sample = Compose(input_steps(config))(dict(img_path=str(path), img_id=0))
            batch = pseudo_collate([sample])
            shape = tuple(sample["data_samples"].img_shape[:2])
    expected = preprocess(batch, False)["inputs"][0].numpy()
    ours = prepare(image, replace(metadata, size=None, preprocessing_in_graph=False))
    if metadata.task == BACKBONE:
        expected = expected[:, : shape[0], : shape[1]]
    difference = check.relative_difference(ours.data, expected)
    comparison.add(
        f"{path.name}: the prepared image differs by {difference:.1e} of its largest value from "
        "that of the config's own test pipeline",
        difference <= check.RAW_TOLERANCE and ours.size == shape,
    )


def _require_accepted(settings: Mapping[str, Any], accepted: _Accepted, where: str) -> None:
    for name, value in settings.items():
        if name in ("type", "_scope_"):
            continue
        values = accepted.get(name, ())
        if values is _ANY or value in values:
            continue
        fix = f"set it to {values[0]!r} and test the checkpoint so" if values else "remove it"
        raise ValueError(
            f"{where} has {name}={value!r}, which the runtime does not follow: {fix}, or export "
            "the bare backbone with --part backbone and prepare images yourself"
        )
