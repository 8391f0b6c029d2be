# SPDX-License-Identifier: Apache-2.0
"""Adapt a run to the machine: GPU or CPU, one process or several, any launcher."""

from __future__ import annotations

import atexit
import gc
import os
import subprocess

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

from mmeformer.settings import type_name
from mmeformer.training.memory import keep_freed_memory, return_freed_memory
from mmeformer.training.optim import FEW_KERNELS


def prepare_device(config: Config, launcher: str) -> None:
    """Adapt a config to the machine, in place, so that it runs on GPUs, clusters and a plain CPU.

    The optimizer is fused (:func:`fuse_optimizer`). With a GPU: see :func:`use_gpu`. Without one,
    processes communicate over gloo (the process group is created here, as mmengine's own start
    needs a CUDA device), batch norms are not synchronized (PyTorch has no CPU kernel for it), and
    mixed precision becomes full precision with a message in the log.
    """
    config.launcher = launcher
    fuse_optimizer(config)
    if torch.cuda.is_available():
        use_gpu(config, torch.cuda.is_bf16_supported(including_emulation=False))
        return
    if config.model.get("backbone", {}).get("with_cp"):
        # Who asks for recomputation is short of memory, not of time.
        return_freed_memory()
    else:
        keep_freed_memory()
    if type_name(config.get("optim_wrapper", {})) == "AmpOptimWrapper":
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
    _unsynchronize_norms(config.model)
    if launcher == "slurm":
        _export_slurm_ranks()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
        # A gloo thread that outlives the interpreter would abort the process at its end.
        atexit.register(_leave_process_group)


def fuse_optimizer(config: Config) -> None:
    """Let PyTorch's optimizers update all weights in a few kernels, unless the config chooses.

    On a CPU a step takes a fifth of the time (``mmeformer.training.optim`` joins the groups).
    """
    wrapper = config.get("optim_wrapper") or ConfigDict()
    optimizer = wrapper.get("optimizer") or ConfigDict()
    names = [kind.__name__ for kind in FEW_KERNELS]
    if type_name(optimizer) in names and not {"foreach", "fused"} & set(optimizer):
        optimizer.fused = True


def use_gpu(config: Config, bf16: bool) -> None:
    """Set what trains faster on a GPU, in place, where the config says nothing else.

    Images are loaded into pinned memory, and AMP computes in bfloat16 instead of float16, which
    needs no loss scaling.

    Args:
        config: of a training or a test.
        bf16: whether the GPU computes in bfloat16.
    """
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if config.get(name):
            config[name].setdefault("pin_memory", True)
    wrapper = config.get("optim_wrapper") or ConfigDict()
    if type_name(wrapper) == "AmpOptimWrapper" and bf16 and "dtype" not in wrapper:
        wrapper.dtype = "bfloat16"
        if wrapper.get("loss_scale", "dynamic") == "dynamic":
            # The range of float32: small gradients do not become zero.
            wrapper.loss_scale = 1.0


def _leave_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        # The model, which has the group too, is in a circle of references with its runner.
        gc.collect()


def _unsynchronize_norms(node) -> None:
    """Replace every ``SyncBN`` of a model config by ``BN``, in place."""
    if isinstance(node, dict):
        if type_name(node) in ("SyncBN", "SyncBatchNorm"):
            node["type"] = "BN"
        for value in node.values():
            _unsynchronize_norms(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _unsynchronize_norms(value)


def _export_slurm_ranks() -> None:
    """Set the environment variables of torch.distributed from those of Slurm."""
    environment = os.environ
    if "SLURM_PROCID" not in environment:
        raise ValueError(
            "launcher slurm works only in a Slurm job (SLURM_PROCID is not set); start the command "
            "with srun"
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
