# SPDX-License-Identifier: Apache-2.0
"""The deterministic weights and inputs behind ``tests/golden``: everything follows from names."""

import json
import math
import zlib
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


@cache
def manifest() -> dict:
    """variant -> format -> tensor name -> shape."""
    return json.loads((GOLDEN / "manifest.json").read_text())


def golden(variant: str) -> dict[str, np.ndarray]:
    """The stored outputs of a variant."""
    return dict(np.load(GOLDEN / f"{variant}.npz"))


def weight(key: str, shape) -> torch.Tensor:
    """The value of the tensor ``key`` of a published format."""
    return _weight(key, tuple(shape)).clone()


# The formats of a variant share most names; this is about as many as the largest variant has.
@lru_cache(maxsize=1500)
def _weight(key: str, shape: tuple) -> torch.Tensor:
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"0:{key}".encode())))
    n, leaf = math.prod(shape), key.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.tensor(1)
    if leaf == "running_var":
        values = rng.uniform(0.5, 1.5, n)
    elif leaf == "running_mean":
        values = rng.normal(0, 0.2, n)
    elif leaf.startswith("attention_bias"):
        values = rng.normal(0, 1.0, n)
    elif leaf.startswith("layer_scale"):
        values = rng.uniform(0.1, 0.5, n)
    elif leaf == "bias":
        values = rng.normal(0, 0.1, n)
    elif len(shape) == 1:
        values = rng.uniform(0.5, 1.5, n)
    else:
        values = rng.normal(0, 1, n) / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


def published_state_dict(variant: str, form: str) -> dict[str, torch.Tensor]:
    """A state dict with the names and shapes of the published file, computed indices left out."""
    return {
        key: weight(key, shape)
        for key, shape in manifest()[variant][form].items()
        if "attention_bias_idxs" not in key
    }


def image(height: int, width: int) -> torch.Tensor:
    """The input (1, 3, height, width) of the golden outputs."""
    rng = np.random.Generator(np.random.PCG64(0))
    return torch.from_numpy(rng.normal(0, 1, (1, 3, height, width)).astype(np.float32))


def relative_error(ours: torch.Tensor, theirs) -> float:
    """Largest difference, relative to the largest value."""
    theirs = torch.as_tensor(theirs)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours - theirs).abs().max() / theirs.abs().max())
