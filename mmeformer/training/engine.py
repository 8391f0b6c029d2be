# SPDX-License-Identifier: Apache-2.0
"""Build mmengine Runners for training and testing from a config and a few choices."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults
from mmengine.logging import print_log

from mmeformer.checkpoints import safe_load
from mmeformer.checks.classes import mirrored_by_flips, require_counts
from mmeformer.configs import drop_pretrained, existing_checkpoint
from mmeformer.settings import flip_directions, type_name
from mmeformer.training.device import prepare_device
from mmeformer.training.pictures import PicturesHook
from mmeformer.training.runner import Runner
from mmeformer.training.schedule import require_spans
from mmeformer.training.trackers import add_trackers

TRAINING_KEYS = ("model", "train_dataloader", "train_cfg", "optim_wrapper")
VISUALIZATION_HOOKS = ("DetVisualizationHook", "SegVisualizationHook", "VisualizationHook")


def build_train_runner(
    config: Config,
    *,
    amp: bool = False,
    auto_scale_lr: bool = False,
    resume: str | None = None,
    resume_else: str | None = None,
    launcher: str = "none",
    trackers: Sequence[str] | None = None,
    deterministic: bool = False,
) -> Runner:
    """Build a Runner that is ready for ``train()``.

    Args:
        config: with ``work_dir`` set.
        amp: mixed precision (on a GPU).
        auto_scale_lr: scale the learning rate to the actual batch size.
        resume: ``"auto"`` for the latest checkpoint of the work directory, or a file. If there is
            no checkpoint, the run starts from ``resume_else`` or the config's ``load_from``.
        resume_else: a file to resume from if ``"auto"`` finds no checkpoint.
        launcher: ``none``, ``pytorch``, ``slurm`` or ``mpi``.
        trackers: programs that record the training, see
            :func:`mmeformer.training.trackers.add_trackers`.
        deterministic: use only kernels that give the same result each time
            (``torch.use_deterministic_algorithms``); an operator without one raises an error.

    Raises:
        ValueError: the config is not a training config, its model has another number of classes
            than its data, or it does not have the base batch size for ``auto_scale_lr``.
        FileNotFoundError: the checkpoint to resume from does not exist.
    """
    if amp:
        config.optim_wrapper.type = "AmpOptimWrapper"
        config.optim_wrapper.setdefault("loss_scale", "dynamic")
    if auto_scale_lr:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise ValueError(
                "scaling the learning rate needs auto_scale_lr.base_batch_size in the config"
            )
        config.auto_scale_lr.enable = True
    load_else = None
    if resume is not None:
        if resume == "auto":
            load_else = config.get("load_from")
            resume_else = resume_else and existing_checkpoint(resume_else)
        config.resume = True
        config.load_from = None if resume == "auto" else existing_checkpoint(resume)
    if missing := [key for key in TRAINING_KEYS if not config.get(key)]:
        raise ValueError(
            f"{config.filename} is not a training config: missing {', '.join(missing)}"
        )
    require_spans(config)
    add_trackers(config, trackers)
    if deterministic:
        config.setdefault("randomness", ConfigDict()).deterministic = True
        # cuBLAS reads this at its start (CUDA's documentation, "Results reproducibility").
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    prepare_device(config, launcher)
    safe_load.install()
    runner = Runner.from_cfg(config)
    if message := require_counts(config, runner.model, ("train", "val")):
        runner.logger.warning(message)
    if message := mirrored_by_flips(config, "train"):
        runner.logger.warning(f"train_dataloader: {message}")
    runner.resume_else, runner.load_else = resume_else, load_else
    return runner


def build_test_runner(
    config: Config,
    checkpoint: str | None,
    *,
    out: str | None = None,
    show_dir: str | None = None,
    tta: bool = False,
    launcher: str = "none",
) -> Runner:
    """Build a Runner that is ready for ``test()``.

    Args:
        config: with ``work_dir`` set.
        checkpoint: of this config's model; None for a model that has its own weights, such as
            :class:`mmeformer.deploy.evaluate.ExportedModel`.
        out: ``.pkl`` file for all predictions.
        show_dir: folder for pictures of predictions.
        tta: test-time augmentation with the config's ``tta_model`` and ``tta_pipeline``, without
            flips in directions in which no training image is flipped.
        launcher: ``none``, ``pytorch``, ``slurm`` or ``mpi``.

    Raises:
        ValueError: ``out`` does not end in .pkl or .pickle, the model has another number of classes
            than the data, or the config does not have the entries for ``tta`` or ``show_dir``.
        FileNotFoundError: the checkpoint does not exist.
        OSError: ``show_dir`` or the folder of ``out`` cannot be written to.
    """
    if out is not None and not out.endswith((".pkl", ".pickle")):
        raise ValueError(f"file for predictions {out} must end in .pkl or .pickle")
    config.load_from = None if checkpoint is None else existing_checkpoint(checkpoint)
    config.resume = False
    options = {} if show_dir is None else _drawing_options(config)
    if tta:
        if "tta_model" not in config or "tta_pipeline" not in config:
            raise ValueError(
                "test-time augmentation needs tta_model and tta_pipeline in the config"
            )
        _warn_if_scales_differ(config)
        _leave_out_flips(config)
        config.test_dataloader.dataset.pipeline = config.tta_pipeline
        config.model = ConfigDict(**config.tta_model, module=config.model)
    # Fail now rather than after hours of testing.
    for folder in (show_dir, out and Path(out).parent):
        if folder is not None:
            _require_writable(Path(folder))
    # The weights come from the checkpoint, so download no pretrained ones.
    drop_pretrained(config.model)
    prepare_device(config, launcher)
    safe_load.install()
    runner = Runner.from_cfg(config)
    if message := require_counts(config, runner.model, ("test",)):
        runner.logger.warning(message)
    if show_dir is not None:
        runner.register_hook(PicturesHook(Path(show_dir).resolve(), **options))
    if out is not None:
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=out))
    return runner


def _warn_if_scales_differ(config: Config) -> None:
    """A config that changes the scale of testing easily forgets that of the augmentation."""
    tested = set(_scales(config.test_dataloader.dataset.get("pipeline", ())))
    augmented = set(_scales(config.tta_pipeline))
    if tested and augmented and not tested & augmented:
        print_log(
            f"tta_pipeline resizes to {sorted(augmented)}, but testing without augmentation to "
            f"{sorted(tested)}; set the scales of tta_pipeline to this and sizes near it",
            "current",
            logging.WARNING,
        )


def _leave_out_flips(config: Config) -> None:
    """Leave out views flipped as no training image is: a mirrored turn_left is a turn_right."""
    if "train_dataloader" not in config:
        return
    unknown = flip_directions(config.tta_pipeline) - flip_directions(config.train_dataloader)
    if not unknown:
        return
    for step in config.tta_pipeline:
        if "transforms" not in step:
            continue
        step.transforms = [
            kept
            for views in step.transforms
            if (kept := [view for view in views if not flip_directions([view]) & unknown])
        ]
    print_log(
        f"tta_pipeline flips images ({', '.join(sorted(unknown))}) as training never does: these "
        "views are left out",
        "current",
        logging.WARNING,
    )


def _scales(steps) -> Iterator[tuple[int, ...]]:
    """Scales of all ``Resize`` in a pipeline."""
    for step in steps:
        if isinstance(step, (list, tuple)):
            yield from _scales(step)
        elif type_name(step) == "TestTimeAug":
            yield from _scales(step["transforms"])
        elif type_name(step) == "Resize" and isinstance(step.get("scale"), (list, tuple)):
            yield tuple(step["scale"])


def _require_writable(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def _drawing_options(config: Config) -> dict[str, Any]:
    """Settings of the config's visualization hook, which itself is turned off."""
    hook = config.default_hooks.get("visualization")
    name = type_name(hook or {})
    if name not in VISUALIZATION_HOOKS:
        raise ValueError(
            "pictures of predictions need default_hooks.visualization in the config, one of "
            f"{' or '.join(VISUALIZATION_HOOKS)}"
        )
    hook["enable" if name == "VisualizationHook" else "draw"] = False
    if name == "DetVisualizationHook":
        return dict(pred_score_thr=hook.get("score_thr", 0.3))
    return {}
