# SPDX-License-Identifier: Apache-2.0
"""Read checkpoint files without ever running code in them.

A ``.pth`` file is a pickle, and a pickle may call any function. Here every file is read with
``torch.load(weights_only=True)``, which accepts only tensors and plain containers, and the few
other types below that training checkpoints of mmengine and the reference contain. There is no
fallback to full unpickling, neither in :func:`read` nor, after :func:`install`, in mmengine.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import struct
import urllib.parse
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.runner.checkpoint import (
    CheckpointLoader,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)
from timm.models import get_pretrained_cfg, load_state_dict_from_hf

from mmeformer.checkpoints.parse import without_compilation
from mmeformer.errors import CheckpointError
from mmeformer.files import refuse_url

TIMM = "timm://"
MapLocation = str | torch.device | None
"""Device to read tensors to; None keeps them where they were saved."""

_FOLDER = 0x10
"""Bit that marks a folder in the attributes of a ZIP archive's member."""


def _get_statistic(owner: type, name: str) -> Callable[..., object]:
    """Replacement of ``getattr`` in checkpoints: only methods of a ``HistoryBuffer``.

    A pickled ``HistoryBuffer`` refers to its statistics as ``getattr(HistoryBuffer, "mean")``. The
    real ``getattr`` would give a file access to much more.
    """
    statistics: dict[str, Callable[..., object]] = HistoryBuffer._statistics_methods
    if owner is HistoryBuffer and name in statistics:
        return statistics[name]
    raise pickle.UnpicklingError(f"GLOBAL getattr({owner!r}, {name!r}) is not allowed")


def _numeric_dtype(code: str, align: bool = False, copy: bool = False) -> np.dtype[np.generic]:
    """Replacement of ``numpy.dtype`` in checkpoints: only numbers, no objects, no records."""
    if isinstance(code, str) and re.fullmatch(r"[<>=|]?[bifu]\d{1,2}", code):
        dtype: np.dtype[np.generic] = np.dtype(code, align, copy)
        return dtype
    raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({code!r}) is not allowed")


def _numpy_functions() -> list[tuple[Callable[..., object], str]]:
    # numpy 2 renamed numpy.core to numpy._core, so files contain either name; numpy 1.26 has an
    # empty numpy._core.
    core: Any = getattr(np, "_core", None)
    if not hasattr(core, "multiarray"):
        core = np.core
    return [
        (getattr(core.multiarray, name), f"numpy.{module}.multiarray.{name}")
        for name in ("_reconstruct", "scalar")
        for module in ("core", "_core")
    ]


# Allowed besides tensors and plain containers: mmengine's logs (arrays in history buffers), numpy
# numbers (best scores), and the arguments in the reference's checkpoints.
_ALLOWED: list[Callable[..., object] | tuple[Callable[..., object], str]] = [
    HistoryBuffer,
    (_get_statistic, "builtins.getattr"),
    (_numeric_dtype, "numpy.dtype"),
    np.ndarray,
    argparse.Namespace,
    *sorted({type(np.dtype(code)) for code in "?bhilqBHILQefd"}, key=lambda cls: cls.__name__),
    *_numpy_functions(),
]
# The list of statistics is filled when the first history buffer is created.
HistoryBuffer()


def _container_format(head: bytes) -> str | None:
    """``"torch"`` or ``"safetensors"``, by the first bytes of a file; None if it is neither."""
    # The length of a safetensors header may begin with any byte, so safetensors is checked first.
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 100_000_000:
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return "torch"
    return None


def _explain_other_file(head: bytes) -> str:
    """Say what kind of file this seems to be instead of a checkpoint, and the fix."""
    text = head.lstrip().lower()
    if not head:
        return "is empty: download or copy it again"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return (
            "is a web page, not a checkpoint: the download got an error or login page. Open the "
            "address in a browser and save the file itself"
        )
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"
    return "is neither a PyTorch nor a safetensors file, or is damaged: download or copy it again"


def read(path: str | Path, map_location: MapLocation = "cpu") -> dict[str, Any]:
    """Read a ``.pth``, ``.bin`` or ``.safetensors`` file (recognized by content, not by name).

    Args:
        path: a local file.
        map_location: a device or its name; None keeps tensors where they were saved.

    Returns:
        The file's dict; names of tensors are without the wrappers of torch.compile. For a
        ``.safetensors`` file: its tensors, or (if its metadata has an entry ``meta`` that is a dict
        in JSON) ``{"state_dict": tensors, "meta": dict}``.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: the file is damaged, is not a checkpoint, or would run code. No code in
            the file was run.
    """
    refuse_url(path, "checkpoint")
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    with path.open("rb") as file:
        head = file.read(512)
    container = _container_format(head)
    if container is None:
        raise CheckpointError(f"{path} {_explain_other_file(head)}")
    if container == "safetensors":
        return _plain_names(_read_safetensors(path, map_location))
    content = _read_torch(path, map_location)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a dict of tensors: save the model's "
            "state dict instead"
        )
    return _plain_names(content)


def _plain_names(content: dict[str, Any]) -> dict[str, Any]:
    """Remove the wrappers of torch.compile from the names of tensors, in place."""
    state = content.get("state_dict", content)
    if isinstance(state, dict) and any("_orig_mod." in str(name) for name in state):
        for name in list(state):
            # Each in turn, so that the order stays.
            state[without_compilation(name) if isinstance(name, str) else name] = state.pop(name)
    return content


def _read_safetensors(path: Path, map_location: MapLocation) -> dict[str, Any]:
    try:
        content = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, "pt") as file:
            texts = file.metadata() or {}
    except Exception as error:  # safetensors raises several kinds, all about a damaged file
        raise CheckpointError(_damaged_message(path, error)) from error
    if map_location is not None:
        content = {name: tensor.to(map_location) for name, tensor in content.items()}
    try:
        # Written by our conversion; the format has no other place for metadata.
        meta = json.loads(texts["meta"])
    except (KeyError, ValueError, RecursionError):  # texts of other programs may be anything
        return content
    return {"state_dict": content, "meta": meta} if isinstance(meta, dict) else content


def _read_torch(path: Path, map_location: MapLocation) -> object:
    try:
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            # What torch warns of here (unusual protocols, TorchScript programs) are errors below.
            warnings.simplefilter("ignore", UserWarning)
            _verify_archive(path)
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refused_message(path, error)) from error
    except Exception as error:  # damage raises many kinds, depending on where it is
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript program, not a checkpoint: save the state dict of the "
                "model it was made from"
            ) from error
        if "map_location" in str(error):
            raise CheckpointError(
                f"{path} was saved on a device that this machine does not have: read it with "
                'map_location="cpu"'
            ) from error
        raise CheckpointError(_damaged_message(path, error)) from error


def _verify_archive(path: Path) -> None:
    # torch does not verify the checksums of its archives, so damaged weights would go unnoticed.
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                # torch would treat it as a folder and return uninitialized memory.
                if member.external_attr & _FOLDER and member.file_size:
                    raise zipfile.BadZipFile(f"its member {member.filename} is marked as a folder")
            if bad := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of its member {bad} is wrong")


def _damaged_message(path: Path, error: Exception) -> str:
    sentence = re.split(r"\.\s|\n", str(error).strip() or type(error).__name__)[0]
    return f"{path} is damaged or incomplete ({sentence}): download or copy it again"


def _refused_message(path: Path, error: pickle.UnpicklingError) -> str:
    message = str(error)
    names = re.findall(r"GLOBAL ([^\n]+?) (?:was not|is not|whose module)", message)
    # Some refusals do not name a global, such as a call of a function that does not exist.
    reason = re.search(r"WeightsUnpickler error:\s*([^\n]+)", message)
    what = ", ".join(names) or (reason[1] if reason else message.strip().splitlines()[0])
    return (
        f"{path} is refused: it holds more than tensors and plain values ({what}), and reading "
        "that could run code. Nothing was run. Get the file from its author's own page; if you "
        "trust it, load it where it was made and save only the state dict. A damaged file can "
        "also cause this error"
    )


def download(url: str) -> Path:
    """Download a checkpoint into torch's cache, unless it is there.

    In a distributed run the main process downloads and the others wait.

    Returns:
        The local copy.

    Raises:
        CheckpointError: the download failed; the message names the URL.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = os.path.basename(urllib.parse.urlparse(url).path)
    if not name:
        raise CheckpointError(f"{url} names no file: use the URL of the checkpoint itself")
    path = folder / name
    if is_main_process():
        _fetch(url, path)
    barrier()
    # Another machine has a cache of its own.
    _fetch(url, path)
    return path


def _fetch(url: str, path: Path) -> None:
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), progress=False)
    except OSError as error:
        raise CheckpointError(
            f"{url} could not be downloaded ({error}): check the URL and the connection, or "
            "download it elsewhere and use its local path"
        ) from error


def load_from_local(filename: str, map_location: MapLocation = None) -> dict[str, Any]:
    """Loader of local paths for mmengine; see :func:`read`."""
    return read(filename, map_location)


def load_from_http(filename: str, map_location: MapLocation = None) -> dict[str, Any]:
    """Loader of URLs for mmengine; see :func:`download` and :func:`read`."""
    path = download(filename)
    try:
        return read(path, map_location)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. This is the copy of {filename} in torch's cache: delete it to download it "
            "again"
        ) from error


def load_from_timm(filename: str, map_location: MapLocation = None) -> dict[str, Any]:
    """Loader of ``timm://<model>.<tag>``: timm's own download and cache, safetensors if possible.

    Without a network it uses the cache of the Hugging Face hub. Tensors are on the CPU.

    Raises:
        CheckpointError: timm has no such weights, or they can be neither found nor downloaded.
    """
    name = filename.removeprefix(TIMM)
    published = get_pretrained_cfg(name)
    if published is None or not published.hf_hub_id:
        raise CheckpointError(
            f"{filename} is unknown to timm {timm.__version__}: names look like "
            f"{TIMM}efficientformerv2_s0.snap_dist_in1k"
        )
    try:
        state: dict[str, Any] = load_state_dict_from_hf(published.hf_hub_id, weights_only=True)
        return state
    except Exception as error:  # the hub, its transport and both readers each have their own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{filename} could neither be read from the cache of the Hugging Face hub nor "
            f"downloaded from its repository {published.hf_hub_id} ({first}): check the "
            "connection, or download model.safetensors elsewhere and use its local path"
        ) from error


def _load_named(filename: str, table: dict[str, str], map_location: MapLocation) -> dict[str, Any]:
    """Load a name of one of mmengine's collections (name -> URL)."""
    name = filename.split("://", 1)[1]
    if name not in table:
        raise CheckpointError(f"{filename} is unknown to mmengine: check the name")
    return load_from_http(table[name], map_location)


def load_from_torchvision(filename: str, map_location: MapLocation = None) -> dict[str, Any]:
    """Loader of ``torchvision://`` names for mmengine."""
    return _load_named(filename, get_torchvision_models(), map_location)


def load_from_openmmlab(filename: str, map_location: MapLocation = None) -> dict[str, Any]:
    """Loader of ``open-mmlab://`` names for mmengine."""
    return _load_named(filename, get_external_models(), map_location)


def load_from_mmcls(filename: str, map_location: MapLocation = None) -> dict[str, Any]:
    """Loader of ``mmcls://`` names for mmengine: only the backbone."""
    content = _load_named(filename, get_mmcls_models(), map_location)
    state_dict = content.get("state_dict", content)
    prefix = "backbone."
    return {
        "state_dict": {
            key.removeprefix(prefix): value
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
    }


def load_from_unsupported(filename: str, map_location: MapLocation = None) -> dict[str, Any]:
    """Refuse names for which mmengine's loader would unpickle without restriction."""
    raise CheckpointError(
        f"{filename}: checkpoints of this kind cannot be read weights-only. Download the file and "
        "use its local path"
    )


# mmengine matches these from the start of the name, as regular expressions, longest first.
_LOADERS = {
    r"(\S+\:)?s3://": load_from_unsupported,
    r"(\S+\:)?petrel://": load_from_unsupported,
    "pavi://": load_from_unsupported,
    "modelzoo://": load_from_torchvision,
    "torchvision://": load_from_torchvision,
    "open-mmlab://": load_from_openmmlab,
    "openmmlab://": load_from_openmmlab,
    "mmcls://": load_from_mmcls,
    TIMM: load_from_timm,
    "http://": load_from_http,
    "https://": load_from_http,
    "": load_from_local,
}


def load(source: str | Path, map_location: MapLocation = "cpu") -> dict[str, Any]:
    """Read a checkpoint from a local path, a URL or a named collection (``timm://...``).

    Raises:
        FileNotFoundError: the local file does not exist.
        CheckpointError: see :func:`read`.
    """
    source = str(source)
    loader = next(found for prefix, found in _LOADERS.items() if re.match(prefix, source))
    return loader(source, map_location)


def install() -> None:
    """Make mmengine read every checkpoint through this module, with no fallback.

    This covers all uses of mmengine's ``CheckpointLoader``: ``load_from`` and ``resume`` of the
    Runner, ``init_detector``, ``init_model``, the inferencers, and ``Pretrained`` initialization of
    any module. It uses mmengine's public registration and may be called again.
    """
    for prefix, loader in _LOADERS.items():
        CheckpointLoader.register_scheme(prefix, loader=loader, force=True)
