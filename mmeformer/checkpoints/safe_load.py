# SPDX-License-Identifier: Apache-2.0
"""Read checkpoint files without ever running what is in them.

A ``.pth`` file is a pickle, and a pickle may call any function. Here every file goes through
``torch.load(weights_only=True)``, which knows tensors and plain containers only, widened by the
few types below that training checkpoints of mmengine and of the reference hold. There is no
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

from mmeformer.errors import CheckpointError

TIMM = "timm://"

_FOLDER = 0x10
"""Mark of a folder among the attributes of a ZIP archive's part."""


def _statistic(owner: type, name: str) -> Callable:
    """Stands in for ``getattr`` in checkpoints.

    A pickled ``HistoryBuffer`` names its own statistics as ``getattr(HistoryBuffer, "mean")``. The
    real ``getattr`` would give a file much more than that.
    """
    if owner is HistoryBuffer and name in HistoryBuffer._statistics_methods:
        return HistoryBuffer._statistics_methods[name]
    raise pickle.UnpicklingError(f"GLOBAL getattr({owner!r}, {name!r}) is not allowed")


def _numeric_dtype(code: str, align: bool = False, copy: bool = False) -> np.dtype:
    """Stands in for ``numpy.dtype`` in checkpoints: numbers only, no objects, no records."""
    if isinstance(code, str) and re.fullmatch(r"[<>=|]?[bifu]\d{1,2}", code):
        return np.dtype(code, align, copy)
    raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({code!r}) is not allowed")


def _numpy_functions() -> list[tuple[Callable, str]]:
    # numpy 2 renamed its core, so files name it either way; numpy 1.26 has a shell of the new name.
    core = np._core if hasattr(getattr(np, "_core", None), "multiarray") else np.core
    return [
        (getattr(core.multiarray, name), f"numpy.{module}.multiarray.{name}")
        for name in ("_reconstruct", "scalar")
        for module in ("core", "_core")
    ]


# What a checkpoint may hold besides tensors and plain containers: mmengine's logs (arrays in
# history buffers), numpy numbers (best scores), and the arguments in the reference's checkpoints.
_ALLOWED: list = [
    HistoryBuffer,
    (_statistic, "builtins.getattr"),
    (_numeric_dtype, "numpy.dtype"),
    np.ndarray,
    argparse.Namespace,
    *sorted({type(np.dtype(code)) for code in "?bhilqBHILQefd"}, key=lambda cls: cls.__name__),
    *_numpy_functions(),
]
# A history buffer fills its list of statistics when the first one is made.
HistoryBuffer()


def _container(head: bytes) -> str | None:
    """``"torch"`` or ``"safetensors"`` by the first bytes of a file, or None for neither."""
    # The length of a safetensors header may begin with any byte, so it is looked at first.
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 100_000_000:
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return "torch"
    return None


def _foreign(head: bytes) -> str:
    """What a file that is no checkpoint seems to be, and the mend."""
    text = head.lstrip().lower()
    if not head:
        return "is empty: download or copy it again"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return (
            "is a web page, not a checkpoint: the download got an error or login page. Open the "
            "address in a browser to see which, and save the file itself"
        )
    if text.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file itself: run `git lfs pull` where it came from"
    return "is neither a PyTorch nor a safetensors file, or is damaged: download or copy it again"


def read(path: str | Path, map_location="cpu") -> dict:
    """Read a ``.pth``, ``.bin`` or ``.safetensors`` file (told apart by content, not by name).

    Args:
        path: a local file.
        map_location: a device or its name; None keeps tensors where they were saved.

    Returns:
        The file's dict, as it is; of a ``.safetensors`` file its tensors, or (where the file has
        an entry ``meta`` in JSON) ``{"state_dict": tensors, "meta": dict}``.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, no checkpoint, or would run code. Nothing was run.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    with path.open("rb") as file:
        head = file.read(512)
    container = _container(head)
    if container is None:
        raise CheckpointError(f"{path} {_foreign(head)}")
    if container == "safetensors":
        content = _read_safetensors(path, map_location)
    else:
        content = _read_torch(path, map_location)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a dict of tensors: save the model's "
            "state dict instead"
        )
    return content


def _read_safetensors(path: Path, map_location) -> dict:
    try:
        content = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, "pt") as file:
            texts = file.metadata() or {}
        # What our conversion writes, for lack of another place in this format.
        meta = json.loads(texts["meta"]) if "meta" in texts else None
    except Exception as error:  # safetensors raises several kinds, all about a damaged file
        raise CheckpointError(_damage(path, error)) from error
    if map_location is not None:
        content = {name: tensor.to(map_location) for name, tensor in content.items()}
    return content if meta is None else {"state_dict": content, "meta": meta}


def _read_torch(path: Path, map_location):
    try:
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            # What torch warns of here (foreign protocols, programs) is an error below.
            warnings.simplefilter("ignore", UserWarning)
            _check_sums(path)
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, error)) from error
    except Exception as error:  # what a damaged archive raises depends on where the damage is
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript program, not a checkpoint: save the state dict of the "
                "model it was made from"
            ) from error
        if "map_location" in str(error):
            raise CheckpointError(
                f"{path} was saved on a device that this machine lacks: read it with "
                'map_location="cpu"'
            ) from error
        raise CheckpointError(_damage(path, error)) from error


def _check_sums(path: Path) -> None:
    # torch does not look at the check sums of its archives, so damaged weights would go unnoticed.
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for part in archive.infolist():
                # torch takes it for a folder, and gives memory that nothing was written to.
                if part.external_attr & _FOLDER and part.file_size:
                    raise zipfile.BadZipFile(f"its part {part.filename} is marked as a folder")
            if bad := archive.testzip():
                raise zipfile.BadZipFile(f"the check sum of its part {bad} is wrong")


def _damage(path: Path, error: Exception) -> str:
    sentence = re.split(r"\.\s|\n", str(error).strip() or type(error).__name__)[0]
    return f"{path} is damaged or incomplete ({sentence}): download or copy it again"


def _refusal(path: Path, error: pickle.UnpicklingError) -> str:
    message = str(error)
    names = re.findall(r"GLOBAL ([^\n]+?) (?:was not|is not|whose module)", message)
    # Some refusals name no global, such as a call of something that a file made up itself.
    reason = re.search(r"WeightsUnpickler error:\s*([^\n]+)", message)
    what = ", ".join(names) or (reason[1] if reason else message.strip().splitlines()[0])
    return (
        f"{path} is refused: it holds more than tensors and plain values ({what}), and reading "
        "that could run code. Nothing was run. Get the file from its author's own page; if you "
        "trust it, load it where it was made and save only the state dict. A damaged file can "
        "look like this too"
    )


def download(url: str) -> Path:
    """Local copy of ``url`` in torch's own cache of checkpoints; downloads it if missing.

    In a distributed run the main process downloads and the others wait.

    Raises:
        CheckpointError: the download failed; names the address.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = os.path.basename(urllib.parse.urlparse(url).path)
    if not name:
        raise CheckpointError(f"{url} names no file: give the address of the checkpoint itself")
    path = folder / name
    if is_main_process():
        _fetch(url, path)
    barrier()
    # On a second machine the main process's cache is another one.
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
            f"{url} could not be downloaded ({error}): check the address and the connection, or "
            "download it elsewhere and give its local path"
        ) from error


def load_from_local(filename: str, map_location=None) -> dict:
    """mmengine's loader of local paths; see :func:`read`."""
    return read(filename, map_location)


def load_from_http(filename: str, map_location=None) -> dict:
    """mmengine's loader of addresses; see :func:`download` and :func:`read`."""
    path = download(filename)
    try:
        return read(path, map_location)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. This is the copy of {filename} in torch's cache: delete it to download it "
            "again"
        ) from error


def load_from_timm(filename: str, map_location=None) -> dict:
    """Loader of ``timm://<model>.<tag>``: timm's own download and cache, safetensors if it can.

    Without a network it takes the file from the cache of the Hugging Face hub. Tensors arrive on
    the CPU.

    Raises:
        CheckpointError: timm knows no such weights, or they can be neither found nor downloaded.
    """
    name = filename.removeprefix(TIMM)
    published = get_pretrained_cfg(name)
    if published is None or not published.hf_hub_id:
        raise CheckpointError(
            f"{filename} is unknown to timm {timm.__version__}: names look like "
            f"{TIMM}efficientformerv2_s0.snap_dist_in1k"
        )
    try:
        return load_state_dict_from_hf(published.hf_hub_id, weights_only=True)
    except Exception as error:  # the hub, its transport and both readers each have their own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{filename} could neither be read from the cache of the Hugging Face hub nor "
            f"downloaded from its repository {published.hf_hub_id} ({first}): check the "
            "connection, or download model.safetensors elsewhere and give its local path"
        ) from error


def _look_up(filename: str, table: dict[str, str], map_location) -> dict:
    name = filename.split("://", 1)[1]
    if name not in table:
        raise CheckpointError(f"{filename} is unknown to mmengine: check the name")
    return load_from_http(table[name], map_location)


def load_from_torchvision(filename: str, map_location=None) -> dict:
    """mmengine's loader of ``torchvision://`` names."""
    return _look_up(filename, get_torchvision_models(), map_location)


def load_from_openmmlab(filename: str, map_location=None) -> dict:
    """mmengine's loader of ``open-mmlab://`` names."""
    return _look_up(filename, get_external_models(), map_location)


def load_from_mmcls(filename: str, map_location=None) -> dict:
    """mmengine's loader of ``mmcls://`` names: the backbone alone."""
    content = _look_up(filename, get_mmcls_models(), map_location)
    state_dict = content.get("state_dict", content)
    prefix = "backbone."
    return {
        "state_dict": {
            key.removeprefix(prefix): value
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
    }


def load_from_unsupported(filename: str, map_location=None) -> dict:
    """Takes the place of mmengine's loaders that unpickle without restriction."""
    raise CheckpointError(
        f"{filename}: checkpoints of this kind cannot be read weights-only. Download the file and "
        "give its local path"
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


def load(source: str | Path, map_location="cpu") -> dict:
    """Read a checkpoint from a local path, an address or a named collection (``timm://...``).

    Raises:
        FileNotFoundError: no such local file.
        CheckpointError: see :func:`read`.
    """
    source = str(source)
    loader = next(found for prefix, found in _LOADERS.items() if re.match(prefix, source))
    return loader(source, map_location)


def install() -> None:
    """Make mmengine read every checkpoint through this file, with no fallback.

    Covers all that goes through mmengine's ``CheckpointLoader``: ``load_from`` and ``resume`` of
    the Runner, ``init_detector``, ``init_model``, the inferencers, and ``Pretrained``
    initialisation of any module. Uses mmengine's public registration; may be called again.
    """
    for prefix, loader in _LOADERS.items():
        CheckpointLoader.register_scheme(prefix, loader=loader, force=True)
