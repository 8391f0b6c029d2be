# SPDX-License-Identifier: Apache-2.0
"""Build the model of a config with its trained weights, and find images to check it on."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import load_state_dict
from mmengine.utils import import_modules_from_strings
from torch import nn

from mmeformer import configs, settings
from mmeformer.checkpoints import safe_load
from mmeformer.checkpoints.load import use_published
from mmeformer.checkpoints.matching import require_match
from mmeformer.images import IMAGE_SUFFIXES


def build_model(config: Config, checkpoint: str | None = None) -> nn.Module:
    """Build the model of a config in eval mode on the CPU.

    Args:
        config: of any task.
        checkpoint: a trained model of this config; None leaves random weights.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: its tensors are not exactly those of this model.
        CheckpointError: its weights are NaN or not floating point.
    """
    init_default_scope(config.get("default_scope", "mmengine"))
    if "custom_imports" in config:
        import_modules_from_strings(**config.custom_imports)
    configs.drop_pretrained(config.model)
    model = revert_sync_batchnorm(MODELS.build(config.model)).eval()
    settings.check(config, ["model"])
    if checkpoint is None:
        return model
    safe_load.install()
    loaded = safe_load.load(configs.existing_checkpoint(checkpoint))
    use_published(model, loaded, checkpoint)
    require_match(model, loaded, checkpoint)
    state = loaded.get("state_dict", loaded)
    try:
        load_state_dict(
            model, {str(name).removeprefix("module."): value for name, value in state.items()}, True
        )
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{checkpoint} is not of this config: {text[:300]}") from error
    model.dataset_meta = (loaded.get("meta") or {}).get("dataset_meta") or {}
    return model


def sample_images(config: Config, limit: int) -> list[Path]:
    """Up to ``limit`` images of the config's test data; empty if it is not on this machine."""
    dataset = config.test_dataloader.dataset
    prefix = dataset.get("data_prefix") or {}
    # mmpretrain's may be the folder itself.
    parts = dict(img_path=prefix) if isinstance(prefix, str) else prefix
    folder = Path(dataset.get("data_root") or ".", parts.get("img_path") or parts.get("img", ""))
    if not prefix or not folder.is_dir():
        return []
    images = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES)
    return list(islice(images, limit))
