# SPDX-License-Identifier: Apache-2.0
"""Find, read and adjust config files."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS

from mmeformer.files import refuse_url
from mmeformer.paths import config_dir
from mmeformer.without_onedl import drop_note

# Here, as whatever reads a config imports this first, and the libraries that print the note later.
drop_note()


READ_LATER = (
    *("auto_scale_lr", "tta_model", "tta_pipeline", "custom_imports", "model_wrapper_cfg"),
    *("sync_bn", "find_unused_parameters", "activation_checkpointing", "compile", "report"),
)
"""Names of a config that are read, beside the arguments of mmengine's ``Runner``."""


def load_config(path: str | Path, options: Mapping | None = None) -> Config:
    """Read a config file.

    Args:
        path: a file, or the path below ``configs/`` of a shipped config, such as
            ``detection/mask-rcnn_efficientformerv2-s0_fpn_1x_coco.py``.
        options: settings to override, by dotted key (``--cfg-options``).

    Raises:
        FileNotFoundError: neither exists; the message names similar shipped configs.
        ValueError: it cannot be read, or an option would change nothing; the message says why.
    """
    refuse_url(path, "config")
    path = Path(path)
    if not path.is_file():
        shipped = config_dir() / str(path).removeprefix("configs/")
        if not shipped.is_file():
            raise FileNotFoundError(_missing_config(path))
        path = shipped
    try:
        config = Config.fromfile(str(path))
    except Exception as error:  # a config is a program and may raise anything
        raise ValueError(f"config {path} cannot be read: {_reason(error)}") from error
    if options:
        _refuse_ignored(options, config, path)
        config.merge_from_dict(dict(options))
    return config


def _refuse_ignored(options: Mapping, config: Config, path: Path) -> None:
    """Refuse options for names that nothing reads once the file has been read.

    Those are misspelled names, and variables of the file such as ``epochs``, whose value is in
    other settings by then.
    """
    from mmengine.runner import Runner

    known = {*inspect.signature(Runner.__init__).parameters, *READ_LATER}
    for key in options:
        name = key.split(".")[0]
        if name in known:
            continue
        if name in config:
            raise ValueError(
                f"{key} would change nothing: {name} is a variable of {path}, used only while the "
                "file is read; change it there, or override all that it is used for, such as "
                "train_cfg.max_epochs and the end of param_scheduler"
            )
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {key.replace(name, near[0], 1)}?" if near else ""
        raise ValueError(f"{key} would change nothing: configs have no setting {name}{hint}")


def _reason(error: Exception) -> str:
    """Why a config cannot be read, for people."""
    if isinstance(error, SyntaxError):
        return error.msg
    cause: BaseException | None = error
    while cause is not None:
        # mmengine tells sys.path in place of what our packages say is missing.
        if isinstance(cause, ImportError) and str(cause).startswith(f"{__package__}."):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return str(error)


def _missing_config(path: Path) -> str:
    if path.with_suffix(".py").is_file():
        return f"config {path} does not exist; did you mean {path.with_suffix('.py')}?"
    names = {
        file.name: file.relative_to(config_dir())
        for file in config_dir().rglob("*.py")
        if "_base_" not in file.parts
    }
    near = get_close_matches(path.name, names, n=3, cutoff=0.4)
    hint = "; did you mean " + " or ".join(f"configs/{names[n]}" for n in near) if near else ""
    return f"config {path} does not exist{hint}"


def choose_work_dir(config: Config, path: str | Path, work_dir: str | None) -> None:
    """Set ``config.work_dir``: ``work_dir``, else the config's own, else ``work_dirs/<name>``."""
    if work_dir is not None:
        config.work_dir = work_dir
    elif config.get("work_dir") is None:
        config.work_dir = str(Path("work_dirs") / Path(path).stem)


def drop_pretrained(model: dict) -> None:
    """Remove every ``init_cfg`` of a model config, in place."""
    for value in list(model.values()):
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, dict):
                drop_pretrained(item)
    model.pop("init_cfg", None)


def existing_checkpoint(path: str) -> str:
    """Return ``path`` if it is an existing file or a URL (``https://...``).

    Raises:
        FileNotFoundError: the file does not exist.
    """
    if "://" not in path and not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    return path


def read_test_metainfo(config: Config) -> dict[str, Any]:
    """Classes, and palette if there is one, of the config's test data; empty if unknown.

    The config's own ``metainfo`` counts, else that of the data set's class.
    """
    dataset = config.test_dataloader.dataset
    metainfo = dataset.get("metainfo") or getattr(DATASETS.get(dataset.type), "METAINFO", {})
    return dict(metainfo)


def native_size(config: Config) -> int | None:
    """Side in pixels of the largest square that a model of this config sees without resizing.

    This is the shorter side that the test pipeline resizes to, else the crop size of the
    segmentor's test settings or of its data preprocessor, else None.
    """
    for step in config.test_dataloader.dataset.pipeline:
        if step["type"].rpartition(".")[2] == "Resize" and "scale" in step:
            return _shorter_side(step["scale"])
    for settings, key in (
        (config.model.get("test_cfg"), "crop_size"),
        (config.model.get("data_preprocessor"), "size"),
    ):
        if settings and settings.get(key):
            return _shorter_side(settings[key])
    return None


def _shorter_side(size: int | Sequence[int]) -> int:
    return size if isinstance(size, int) else min(size)
