# SPDX-License-Identifier: Apache-2.0
"""From a config file and a few choices to a ready mmengine Runner, on CPU, GPU and clusters.

The command lines in ``tools/`` only parse arguments and call this module.
"""

from __future__ import annotations

import argparse
import atexit
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.evaluator import DumpResults
from mmengine.logging import print_log

from mmeformer.checkpoints import safe_load
from mmeformer.memory import keep_freed_memory, return_freed_memory
from mmeformer.paths import config_dir
from mmeformer.training.runner import Runner

TRAINING_KEYS = ("model", "train_dataloader", "train_cfg", "optim_wrapper")
VISUALIZATION_HOOKS = ("DetVisualizationHook", "SegVisualizationHook")


def load_config(path: str | Path, options: Mapping | None = None) -> Config:
    """Read a config file, with ``options`` (dotted keys) laid over it.

    Args:
        path: a file, or the path below ``configs/`` of a config that mmeformer ships, such as
            ``detection/mask-rcnn_efficientformerv2-s0_fpn_1x_coco.py``.
        options: what ``--cfg-options`` gives.

    Raises:
        FileNotFoundError: neither exists; names the shipped configs that come nearest.
        ValueError: it cannot be read; says why.
    """
    path = Path(path)
    if not path.is_file():
        shipped = config_dir() / str(path).removeprefix("configs/")
        if not shipped.is_file():
            raise FileNotFoundError(_missing_config(path))
        path = shipped
    try:
        config = Config.fromfile(str(path))
    except Exception as error:  # a config is a program, which may raise anything
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"config {path} cannot be read: {reason}") from error
    if options:
        config.merge_from_dict(dict(options))
    return config


def _missing_config(path: Path) -> str:
    from difflib import get_close_matches

    names = {
        file.name: file.relative_to(config_dir())
        for file in config_dir().rglob("*.py")
        if "_base_" not in file.parts
    }
    near = get_close_matches(path.name, names, n=3, cutoff=0.4)
    hint = "; did you mean " + " or ".join(f"configs/{names[n]}" for n in near) if near else ""
    return f"config {path} does not exist{hint}"


def choose_work_dir(config: Config, path: str | Path, work_dir: str | None) -> None:
    """Set ``config.work_dir``: the given one, else the config's, else ``work_dirs/<file name>``."""
    if work_dir is not None:
        config.work_dir = work_dir
    elif config.get("work_dir") is None:
        config.work_dir = str(Path("work_dirs") / Path(path).stem)


def prepare_device(config: Config, launcher: str) -> None:
    """Fit a config to the machine, so that one config serves GPUs, clusters and a plain CPU.

    Without a GPU: processes talk over gloo (the group is made here, as mmengine's own start-up
    asks for a CUDA device), batch norms are not synchronised (PyTorch has no such kernel for the
    CPU), and mixed precision falls back to full precision with a warning.
    """
    config.launcher = launcher
    if torch.cuda.is_available():
        return
    if config.model.get("backbone", {}).get("with_cp"):
        # Whoever asks for that has time to spare, but no memory.
        return_freed_memory()
    else:
        keep_freed_memory()
    if config.get("optim_wrapper", {}).get("type") == "AmpOptimWrapper":
        print_log("no GPU: training in full precision instead of AMP", "current")
        config.optim_wrapper.type = "OptimWrapper"
        for key in ("loss_scale", "dtype"):
            config.optim_wrapper.pop(key, None)
    if launcher == "none":
        return
    config.env_cfg.dist_cfg.backend = "gloo"
    config.model_wrapper_cfg = ConfigDict(
        type="MMDistributedDataParallel",
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=config.get("find_unused_parameters", False),
    )
    config.sync_bn = None
    if config.get("model") is not None:
        _unsynchronise_norms(config.model)
    if launcher == "slurm":
        _export_slurm_ranks()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
        # A thread of gloo that outlives the interpreter aborts the process after its work is done.
        atexit.register(_leave_process_group)


def _leave_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _unsynchronise_norms(node) -> None:
    """Turn every ``SyncBN`` of a model config into ``BN``, in place."""
    if isinstance(node, dict):
        if node.get("type") == "SyncBN":
            node["type"] = "BN"
        for value in node.values():
            _unsynchronise_norms(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _unsynchronise_norms(value)


def _export_slurm_ranks() -> None:
    """Tell torch.distributed what Slurm knows, as torchrun would."""
    environment = os.environ
    if "SLURM_PROCID" not in environment:
        raise ValueError(
            "--launcher slurm works within a job of Slurm only (SLURM_PROCID is not set): use "
            "tools/slurm_train.sh or tools/slurm_test.sh"
        )
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment.setdefault("MASTER_PORT", "29500")
    if "MASTER_ADDR" not in environment:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", environment["SLURM_NODELIST"]],
            capture_output=True,
            text=True,
            check=True,
        )
        environment["MASTER_ADDR"] = hosts.stdout.split()[0]


def build_train_runner(
    config: Config,
    *,
    amp: bool = False,
    auto_scale_lr: bool = False,
    resume: str | None = None,
    launcher: str = "none",
) -> Runner:
    """A Runner ready for ``train()``.

    Args:
        config: with ``work_dir`` set.
        amp: mixed precision (on a GPU).
        auto_scale_lr: scale the learning rate to the real batch size.
        resume: ``"auto"`` for the latest checkpoint of the work directory, or a file.
        launcher: ``none``, ``pytorch``, ``slurm`` or ``mpi``.

    Raises:
        ValueError: ``auto_scale_lr`` without a base batch size in the config, or no config of a
            training.
        FileNotFoundError: the checkpoint to resume from does not exist.
    """
    if amp:
        config.optim_wrapper.type = "AmpOptimWrapper"
        config.optim_wrapper.setdefault("loss_scale", "dynamic")
    if auto_scale_lr:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise ValueError("--auto-scale-lr needs auto_scale_lr.base_batch_size in the config")
        config.auto_scale_lr.enable = True
    if resume is not None:
        config.resume = True
        config.load_from = None if resume == "auto" else existing_checkpoint(resume)
    if missing := [key for key in TRAINING_KEYS if not config.get(key)]:
        raise ValueError(
            f"{config.filename} is no config of a training: it lacks {', '.join(missing)}"
        )
    prepare_device(config, launcher)
    safe_load.install()
    return Runner.from_cfg(config)


def build_test_runner(
    config: Config,
    checkpoint: str,
    *,
    out: str | None = None,
    show_dir: str | None = None,
    tta: bool = False,
    launcher: str = "none",
) -> Runner:
    """A Runner ready for ``test()``.

    Args:
        config: with ``work_dir`` set.
        checkpoint: file of a trained model of this config, or an ``.onnx`` file exported from one.
        out: ``.pkl`` file for all predictions.
        show_dir: folder for pictures of predictions.
        tta: test-time augmentation as the config's ``tta_model`` and ``tta_pipeline`` say.
        launcher: ``none``, ``pytorch``, ``slurm`` or ``mpi``.

    Raises:
        ValueError: ``out`` is not a pickle file name, the config has nothing for ``tta``, or the
            exported file does not fit the config.
        FileNotFoundError: the checkpoint does not exist.
        OSError: ``show_dir`` or the folder of ``out`` cannot be written to.
    """
    if out is not None and not out.endswith((".pkl", ".pickle")):
        raise ValueError(f"--out {out}: the file must end in .pkl or .pickle")
    config.load_from = existing_checkpoint(checkpoint)
    config.resume = False
    if show_dir is not None:
        _draw_predictions(config, show_dir)
    if tta:
        if "tta_model" not in config or "tta_pipeline" not in config:
            raise ValueError("--tta needs tta_model and tta_pipeline in the config")
        config.test_dataloader.dataset.pipeline = config.tta_pipeline
        config.model = ConfigDict(**config.tta_model, module=config.model)
    if checkpoint.endswith(".onnx"):
        from mmeformer.deploy.evaluate import use_onnx

        if tta:
            raise ValueError("--tta needs a checkpoint: an exported file has no such mode")
        use_onnx(config, checkpoint)
    # Found out now rather than after hours of testing.
    for folder in (show_dir, out and Path(out).parent):
        if folder is not None:
            _require_writable(Path(folder))
    # The weights come from the checkpoint: no download of pretrained ones first.
    drop_pretrained(config.model)
    prepare_device(config, launcher)
    safe_load.install()
    runner = Runner.from_cfg(config)
    if out is not None:
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=out))
    return runner


def drop_pretrained(model: dict) -> None:
    """Remove every ``init_cfg`` of a model config, in place."""
    for value in list(model.values()):
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, dict):
                drop_pretrained(item)
    model.pop("init_cfg", None)


def existing_checkpoint(path: str) -> str:
    """``path`` if it is a file or an address with a scheme (``https://...``).

    Raises:
        FileNotFoundError: no such file.
    """
    if "://" not in path and not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    return path


def _require_writable(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def _draw_predictions(config: Config, show_dir: str) -> None:
    hook = config.default_hooks.get("visualization")
    if hook is None or hook.get("type", "").split(".")[-1] not in VISUALIZATION_HOOKS:
        raise ValueError(
            f"--show-dir needs default_hooks.visualization, one of {VISUALIZATION_HOOKS}, "
            "in the config"
        )
    hook.draw = True
    hook.interval = 1
    if hook.type.split(".")[-1] == "DetVisualizationHook":
        # mmdet joins this to the run's folder again at every batch; an absolute path stays itself.
        hook.test_out_dir = str(Path(show_dir).resolve())
    else:
        # An absolute folder of pictures stays itself; everything else goes to the run's folder.
        pictures = str(Path(show_dir).resolve())
        config.visualizer.vis_backends = [dict(type="LocalVisBackend", img_save_dir=pictures)]
        # mmengine would hand out the visualizer that training left behind under its name.
        config.visualizer.name = f"visualizer of {pictures}"


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``tools/train.py`` and ``tools/test.py`` share."""
    parser.add_argument("--work-dir", help="folder for logs and checkpoints")
    add_config_options(parser)
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="how the processes were started (see tools/dist_train.sh, tools/slurm_train.sh)",
    )
    # torch.distributed.launch of PyTorch 2 gives --local-rank; torchrun sets the variable itself.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


class _Settings(DictAction):
    """mmengine's ``KEY=VALUE``, with its exceptions made errors of the command line."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if wrong := [value for value in values if "=" not in value]:
            parser.error(f"argument {option_string}: {wrong[0]!r} is not KEY=VALUE")
        try:
            super().__call__(parser, namespace, values, option_string)
        except (AssertionError, ValueError) as error:
            parser.error(f"argument {option_string}: {error}")


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """The argument that changes settings of a config."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=_Settings,
        metavar="KEY=VALUE",
        help="settings laid over the config, such as train_dataloader.batch_size=4",
    )


def set_local_rank(local_rank: int) -> None:
    """Keep the rank that a launcher gave as an argument, unless it set the variable already."""
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
