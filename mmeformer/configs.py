# SPDX-License-Identifier: Apache-2.0
"""Find, read and adjust config files."""

from __future__ import annotations

import ast
import inspect
import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from mmeformer.errors import UserError
from mmeformer.files import refuse_url
from mmeformer.paths import config_dir
from mmeformer.settings import (
    DATA_META,
    FREE,
    dicts,
    prepare_flips,
    require_class_names,
    type_name,
)
from mmeformer.tasks import TASKS, task_of_type
from mmeformer.without_onedl import drop_note

# Here, as whatever reads a config imports this first, and the libraries that print the note later.
drop_note()
# mmengine looks for "mmseg::" by the name of a distribution, and OneDL's mmseg has another one. By
# the name of the module it finds both.
MODULE2PACKAGE["mmseg"] = "mmseg"


SUFFIXES = (".py", ".json", ".yaml", ".yml")
"""Of the files that mmengine reads as configs."""
READ_LATER = (
    *("auto_scale_lr", "tta_model", "tta_pipeline", "custom_imports", "model_wrapper_cfg"),
    *("sync_bn", "find_unused_parameters", "activation_checkpointing", "compile", "report"),
)
"""Names of a config that are read, beside the arguments of mmengine's ``Runner``."""


PREPROCESSOR = "data_preprocessor"
"""Setting that counts beside the model only if the model has none."""


def load_config(path: str | Path, options: Mapping | None = None) -> Config:
    """Read a config file.

    Args:
        path: a file, or the path below ``configs/`` of a shipped config, such as
            ``detection/mask-rcnn_efficientformerv2-s0_fpn_1x_coco.py``.
        options: settings to override, by dotted key (``--cfg-options``).

    Raises:
        FileNotFoundError: neither exists; the message names similar shipped configs.
        UserError: it is a folder.
        ValueError: it cannot be read, or a name of it or an option would change nothing; the
            message says why.
    """
    refuse_url(path, "config")
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"{path} is a folder, not a config; mmeformer init makes a config from a folder of "
            "images, and a work directory has one (*.py)"
        )
    if not path.is_file():
        shipped = config_dir() / str(path).removeprefix("configs/")
        if not shipped.is_file():
            raise FileNotFoundError(_missing_config(path))
        path = shipped
    try:
        config = Config.fromfile(str(path))
    except Exception as error:  # a config is a program and may raise anything
        raise ValueError(f"config {path} cannot be read: {_reason(error)}") from error
    # Types of pure Python configs are classes; here they are texts in all configs.
    config = Config(config.to_dict(), filename=config.filename)
    if path.suffix == ".py":
        _require_used(path, config)
    if options:
        _refuse_ignored(options, config, path)
        config.merge_from_dict(dict(options))
    require_class_names(config)
    prepare_flips(config)
    _join_preprocessor(config)
    _find_scope(config)
    _import_task(config)
    return config


def _find_scope(config: Config) -> None:
    """Set ``default_scope`` of a config whose types have their modules, and so need none, in place.

    The task is that of the data, as a detector of mmdet may find rotated boxes too.
    """
    if config.get("default_scope") is not None:
        return
    loaders = [config.get(name) or {} for name in ("test_dataloader", "train_dataloader")]
    for part in (*(loader.get("dataset") for loader in loaders), config.get("model")):
        for _, holder in dicts(part):
            if task := task_of_type(str(holder.get("type"))):
                config.default_scope = task.scope
                return


def _import_task(config: Config) -> None:
    """Import what ``custom_imports`` of the base config did, which those of a config replace."""
    imports = (config.get("custom_imports") or {}).get("imports", ())
    scope = config.get("default_scope")
    for task in TASKS.values():
        room = f"{__package__}.{task.name}"
        if imports and task.scope == scope and room not in imports:
            if any(str(part.get("type")).startswith("mmeformer.") for _, part in dicts(config)):
                import_module(room)


def _join_preprocessor(config: Config) -> None:
    """Give the model the config's own ``data_preprocessor``, in place, as mmengine's Runner does.

    Configs of mmpretrain have it beside the model. Whatever builds the model without a Runner
    would leave it out, and with it the mean and the order of the colors.
    """
    given = config.get(PREPROCESSOR)
    if given and config.get("model"):
        config.model.setdefault(PREPROCESSOR, given)


def _refuse_ignored(options: Mapping, config: Config, path: Path) -> None:
    """Refuse options for names that nothing reads once the file has been read.

    Those are misspelled names, and variables of the file such as ``epochs``, whose value is in
    other settings by then.
    """
    known = known_settings()
    for key in options:
        name = key.split(".")[0]
        if name == PREPROCESSOR and (config.get("model") or {}).get(name):
            raise ValueError(
                f"{key} would change nothing, as the model has its own {name}; did you mean "
                f"model.{key}?"
            )
        if name in known:
            _refuse_misplaced(key, options[key], config)
            continue
        if name in config:
            raise ValueError(
                f"{key} would change nothing: {name} is a variable of {path}, used only while the "
                "file is read; change it there, or override all that it is used for, such as "
                "train_cfg.max_epochs and the end of param_scheduler"
            )
        near = _places(config, key) or [
            key.replace(name, other, 1) for other in get_close_matches(name, known, n=1)
        ]
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{key} would change nothing: configs have no setting {name}{hint}")


def _require_used(path: Path, config: Config) -> None:
    """Refuse a misspelled setting of a file; warn of other names that change nothing.

    Those are variables that the file does not use: what a base config has made of a variable of
    the same name stays as it is.
    """
    tree = ast.parse(path.read_text("utf-8"))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    used = {node.id for node in names if not isinstance(node.ctx, ast.Store)}
    known = known_settings()
    targets = [
        target
        for line in tree.body
        for target in getattr(line, "targets", [getattr(line, "target", None)])
    ]
    given = [target.id for target in targets if isinstance(target, ast.Name)]
    if PREPROCESSOR in given and PREPROCESSOR not in used and "_base_" in given:
        model = config.get("model") or {}
        if model.get(PREPROCESSOR, config[PREPROCESSOR]) != config[PREPROCESSOR]:
            print_log(
                f"{path}: {PREPROCESSOR} changes nothing, as the model has its own: set "
                f"model.{PREPROCESSOR}",
                "current",
                logging.WARNING,
            )
    for name in given:
        if name in known or name in used or name.startswith("_"):
            continue
        # Pipelines for training and testing are variables, which only resemble its name.
        near = get_close_matches(name, known - {"tta_pipeline"}, n=1, cutoff=0.85)
        if near:
            raise ValueError(f"{path}: {name} changes nothing; did you mean {near[0]}?")
        if "_base_" in given:
            print_log(
                f"{path}: {name} changes nothing: the file does not use it, and its base configs "
                "are read before; set what it is meant for, such as train_cfg",
                "current",
                logging.WARNING,
            )


def known_settings() -> set[str]:
    """Names of a config that are read."""
    from mmengine.runner import Runner

    return {*inspect.signature(Runner.__init__).parameters, *READ_LATER} - {"self"}


def _refuse_misplaced(key: str, value: Any, config: Config) -> None:
    """Refuse a new name in a dict that has no ``type``, so that no class would refuse it.

    Only if a name beside it is alike, or the same name lies deeper: else it may be a setting that
    the file leaves at its default.
    """
    first, *rest = key.split(".")
    holder: Any = config.get(first)
    path = [first]
    while rest and isinstance(holder, Mapping) and rest[0] in holder:
        holder = holder[rest[0]]
        path.append(rest.pop(0))
    if not rest or not isinstance(holder, Mapping):
        return
    name = rest[0]
    if path[-1] == "metainfo" and name not in DATA_META:
        # Users may add entries of their own, but class or CLASSES would stand for nothing.
        name, holder = name.lower(), dict.fromkeys(DATA_META)
    elif path[-1] in FREE:
        return
    inner = path[:2] in (["model", "test_cfg"], ["model", "train_cfg"])
    # Functions such as NMS have a type too, and complain at the first validation.
    if not inner and ("type" in holder or key.count(".") == 1 and first.endswith("_dataloader")):
        return
    near = get_close_matches(name, holder, n=1, cutoff=0.7 if inner else 0.8) or [
        known
        for known in holder
        if min(len(name), len(known)) > 2 and (known.startswith(name) or name.startswith(known))
    ]
    if near := near or _places(holder, name):
        meant = ".".join((*path, near[0], *rest[1:]))
        raise ValueError(f"{key}={value!r} would change nothing; did you mean {meant}?")


def _places(holder: Mapping, name: str) -> list[str]:
    """Paths below a dict, without those in lists, that end in a name."""
    found = [name] if name in holder else []
    for key, item in holder.items():
        if isinstance(item, Mapping):
            found += [f"{key}.{place}" for place in _places(item, name)]
    return found


def _reason(error: Exception) -> str:
    """Why a config cannot be read, for people."""
    if isinstance(error, SyntaxError):
        return error.msg
    if str(error).endswith("support to load mmeformer config."):
        return (
            "mmengine finds configs by mmeformer:: not at all; write "
            '_base_ = __import__("mmeformer").shipped_config("detection/...py")'
        )
    # mmengine tells sys.path in place of what is missing.
    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    missing = [str(cause) for cause in causes if isinstance(cause, ImportError)]
    for text in missing:
        if text.startswith(f"{__package__}."):
            return text
    if missing:
        hint = "a module of your own is found with PYTHONPATH=FOLDER before the command"
        return f"{missing[-1]}; {hint}"
    return str(error)


def _missing_config(path: Path) -> str:
    missing = f"config {path} does not exist"
    if path.suffix not in SUFFIXES:
        missing = f"there is neither a config nor a folder {path}"
    near: Sequence[str | Path]
    if path.with_suffix(".py").is_file():
        near = [path.with_suffix(".py")]
    elif found := _nearest(path):
        near = [found]
    else:
        names = {
            file.name: f"configs/{file.relative_to(config_dir())}"
            for file in config_dir().rglob("*.py")
            if "_base_" not in file.parts
        }
        near = [names[name] for name in get_close_matches(path.name, names, n=3, cutoff=0.4)]
    hint = f"; did you mean {' or '.join(map(str, near))}?" if near else ""
    return f"{missing}{hint}"


def _nearest(path: Path) -> Path | None:
    """The existing path whose parts resemble those of a path that does not exist, if any."""
    found = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        if not (found / part).exists():
            try:
                names = [
                    file.name
                    for file in found.iterdir()
                    if file.suffix in SUFFIXES or file.is_dir()
                ]
            except OSError:
                return None
            if not (near := get_close_matches(part, names, n=1, cutoff=0.75)):
                return None
            part = near[0]
        found /= part
    return found


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
        if type_name(step) == "Resize" and "scale" in step:
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
