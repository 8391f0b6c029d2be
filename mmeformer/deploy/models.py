# SPDX-License-Identifier: Apache-2.0
"""Build the model of a config with its trained weights, and describe it for the runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from mmengine.utils import import_modules_from_strings
from torch import nn

from mmeformer import configs
from mmeformer.backbones.base import PyramidBackbone
from mmeformer.checkpoints import safe_load
from mmeformer.checkpoints.matching import require_match
from mmeformer.runtime.metadata import Metadata
from mmeformer.variants import STRIDES
from mmeformer.version import __version__

TASK_OF_SCOPE = {"mmseg": "segmentation", "mmdet": "detection", "mmrotate": "rotated"}

# Steps of a test pipeline that leave the pixels of an image as they are.
_NEUTRAL = ("Load", "Pack", "ConvertBoxType")


def build_model(config: Config, checkpoint: str | None = None) -> nn.Module:
    """The model of a config in eval mode on the CPU.

    Args:
        config: of any of the three tasks.
        checkpoint: a trained model of this config; None leaves random weights.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: it does not hold exactly this model's tensors.
        CheckpointError: it holds NaN, or numbers of another kind.
    """
    init_default_scope(config.get("default_scope", "mmengine"))
    if "custom_imports" in config:
        import_modules_from_strings(**config.custom_imports)
    configs.drop_pretrained(config.model)
    model = revert_sync_batchnorm(MODELS.build(config.model)).eval()
    if checkpoint is None:
        return model
    safe_load.install()
    try:
        loaded = load_checkpoint(
            model, configs.existing_checkpoint(checkpoint), map_location="cpu", strict=True
        )
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} is not of this config: {error}") from error
    require_match(model, loaded, checkpoint)
    model.dataset_meta = (loaded.get("meta") or {}).get("dataset_meta") or {}
    return model


def find_backbone(model: nn.Module) -> PyramidBackbone:
    """The EfficientFormer in a model.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, PyramidBackbone):
            return module
    raise ValueError(f"{type(model).__name__} has no EfficientFormer backbone")


def describe(
    config: Config,
    model: nn.Module,
    *,
    part: str = "model",
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    preprocessing_in_graph: bool = False,
) -> Metadata:
    """What a program must know to run the exported model.

    Args:
        config: of the model.
        model: as :func:`build_model` returns it.
        part: ``"model"`` or ``"backbone"``.
        size, batch, preprocessing_in_graph: see :class:`Metadata`.

    Raises:
        ValueError: the test pipeline or the data preprocessor does what the runtime cannot.
    """
    preprocessor = config.model.data_preprocessor
    common = dict(
        version=__version__,
        config=Path(config.filename or "config").stem,
        mean=tuple(preprocessor.mean),
        std=tuple(preprocessor.std),
        bgr_to_rgb=preprocessor.get("bgr_to_rgb", False),
        preprocessing_in_graph=preprocessing_in_graph,
        batch=batch,
        size=size,
    )
    backbone = find_backbone(model)
    if part == "backbone":
        strides = tuple(STRIDES[index] for index in backbone.out_indices)
        return Metadata(task="backbone", strides=strides, **common)
    scope = config.get("default_scope")
    if scope not in TASK_OF_SCOPE:
        raise ValueError(
            f"default_scope {scope!r} in the config is none of {sorted(TASK_OF_SCOPE)}: which task?"
        )
    task = TASK_OF_SCOPE[scope]
    common.update(_pipeline_settings(config))
    dataset_meta = getattr(model, "dataset_meta", {}) or _config_metainfo(config)
    common.update(
        classes=tuple(dataset_meta.get("classes", ())),
        palette=tuple(tuple(colour) for colour in dataset_meta.get("palette") or ()),
    )
    if task == "segmentation":
        return Metadata(task=task, **common)
    common["pad_divisor"] = preprocessor.get("pad_size_divisor", 1)
    settings = config.model.test_cfg
    if task == "detection":
        settings = settings.rcnn
        if model.roi_head.with_mask:
            common["mask_threshold"] = settings.mask_thr_binary
    return Metadata(
        task=task,
        score_threshold=settings.score_thr,
        iou_threshold=settings.nms.iou_threshold,
        max_per_image=settings.max_per_img,
        **common,
    )


def _pipeline_settings(config: Config) -> dict:
    """The part of the metadata that the test pipeline decides."""
    settings: dict = {}
    for step in config.test_dataloader.dataset.pipeline:
        name = step["type"].rpartition(".")[2]
        if name.startswith(_NEUTRAL):
            continue
        if name == "Resize" and not settings and "scale" in step:
            scale = step["scale"]
            settings["scale"] = (scale, scale) if isinstance(scale, int) else tuple(scale)
            settings["keep_ratio"] = step.get("keep_ratio", False)
        elif name == "ResizeToMultiple" and "multiple" not in settings:
            settings["multiple"] = step.get("size_divisor", 32)
        else:
            raise ValueError(
                f"the runtime cannot repeat the step {step['type']} of the test pipeline: it knows "
                "one Resize with a scale, then one ResizeToMultiple"
            )
    return settings


def _config_metainfo(config: Config) -> dict:
    dataset = config.test_dataloader.dataset
    if "metainfo" in dataset:
        return dict(dataset.metainfo)
    return getattr(DATASETS.get(dataset.type), "METAINFO", {})


def sample_images(config: Config, limit: int) -> Iterator[Path]:
    """Up to ``limit`` images of the config's test data, as far as they are on this machine."""
    dataset = config.test_dataloader.dataset
    prefix = dataset.get("data_prefix") or {}
    folder = Path(dataset.get("data_root") or ".", prefix.get("img_path") or prefix.get("img", ""))
    found = 0
    if not prefix or not folder.is_dir():
        return
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"):
            yield path
            found += 1
        if found == limit:
            return
