# SPDX-License-Identifier: Apache-2.0
"""Write ExecuTorch files for XNNPACK, and check them by running them in ExecuTorch."""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import executorch.data.bin
import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.devtools.backend_debug.delegation_info import DelegationInfo, get_delegation_info
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor, nn
from torch.export import ExportedProgram

from mmeformer.deploy.check import Comparison
from mmeformer.deploy.graphs import Graph, build_graph, compare_session, examples
from mmeformer.deploy.substitutes import replace_modules
from mmeformer.runtime.executorch import OUTPUTS, ExecuTorchSession
from mmeformer.runtime.metadata import KEY, Metadata

aten = torch.ops.aten


def write(
    model: nn.Module,
    graph_class: Callable[..., Graph],
    metadata: Metadata,
    images: Sequence[Path],
    path: Path,
) -> Comparison:
    """Write a file and compare it with the model, number by number.

    Args:
        model: as it was trained.
        graph_class: see :func:`mmeformer.deploy.graphs.graph_class`.
        metadata: of a fixed size and batch; kept in the file.
        images: real images to compare on, beside random ones.
        path: of the file.
    """
    graph = make_graph(model, graph_class, metadata)
    reference = graph_class(copy.deepcopy(model), graph.normalize).eval()
    reference.raw_names = ()
    program = torch.export.export(graph, (examples(metadata, [])[0],))
    info = lower(program, graph.output_names, metadata, path)
    comparison = compare_session(ExecuTorchSession(path), reference, metadata, images, "ExecuTorch")
    comparison.add(delegation(info), True)
    return comparison


def make_graph(model: nn.Module, graph_class: Callable[..., Graph], metadata: Metadata) -> Graph:
    """The graph of a model, without raw tensors, in operators that XNNPACK has."""
    graph = build_graph(graph_class, model, metadata, channels_last=True)
    graph.raw_names = ()
    replace_modules(graph, nn.LayerNorm, TokenNorm)
    replace_modules(graph, nn.GroupNorm, MapNorm)
    return graph.eval().requires_grad_(False)


def lower(
    program: ExportedProgram, output_names: Sequence[str], metadata: Metadata, path: Path
) -> DelegationInfo:
    """Write an exported graph to a file; returns which operators XNNPACK computes."""
    _find_flatc()
    constants = {KEY: metadata.to_json(), OUTPUTS: json.dumps(list(output_names))}
    with warnings.catch_warnings():
        # Of ExecuTorch's own calls to PyTorch.
        warnings.simplefilter("ignore", FutureWarning)
        edge = to_edge_transform_and_lower(
            program.run_decompositions(EQUAL_FORMS),
            partitioner=[XnnpackPartitioner()],
            constant_methods=constants,
        )
        path.write_bytes(edge.to_executorch().buffer)
    return get_delegation_info(edge.exported_program().graph_module)


def _find_flatc() -> None:
    """Name ExecuTorch's own ``flatc``, which older versions look for in ``PATH`` alone."""
    bundled = Path(next(iter(executorch.data.bin.__path__))) / "flatc"
    if shutil.which("flatc") is None and bundled.is_file():
        os.environ.setdefault("FLATC_EXECUTABLE", str(bundled))


def delegation(info: DelegationInfo) -> str:
    """One line: how many operators XNNPACK computes, and which others there are."""
    others = {
        kind.op_type: kind.non_delegated
        for kind in info.delegation_by_operator.values()
        # A delegated part's outputs are taken from a tuple, others are written to planned memory.
        if kind.non_delegated and kind.op_type not in ("getitem", "alloc")
    }
    line = (
        f"{info.num_delegated_nodes} of {info.num_delegated_nodes + sum(others.values())} "
        f"operators in XNNPACK, in {info.num_delegated_subgraphs} parts"
    )
    if others:
        line += "; others: " + ", ".join(f"{count} {name}" for name, count in others.items())
    return line


# --- operators that XNNPACK does not have, in those that it has -----------------------------------


class TokenNorm(nn.Module):
    """A layer norm of the last axis: means are products with a constant."""

    mean: Tensor

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        (width,) = norm.normalized_shape
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.register_buffer("mean", torch.full((1, width), 1 / width))

    def forward(self, x: Tensor) -> Tensor:
        x = x - F.linear(x, self.mean)
        x = x * torch.rsqrt(F.linear(x * x, self.mean) + self.eps)
        return x * self.weight + self.bias


class MapNorm(nn.Module):
    """A group norm of maps: means of channels, whose means over groups are convolutions."""

    mean: Tensor
    spread: Tensor

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        width = norm.num_channels // self.groups
        self.register_buffer("mean", torch.full((self.groups, width, 1, 1), 1 / width))
        self.register_buffer("spread", torch.ones(norm.num_channels, 1, 1, 1))
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", norm.weight.detach()[:, None, None].clone())
        self.register_buffer("bias", norm.bias.detach()[:, None, None].clone())

    def means(self, x: Tensor) -> Tensor:
        """Mean of each group, at each of its channels: (B, C, H, W) -> (B, C, 1, 1)."""
        x = F.conv2d(x.mean((2, 3), keepdim=True), self.mean, groups=self.groups)
        return F.conv2d(x, self.spread, groups=self.groups)

    def forward(self, x: Tensor) -> Tensor:
        x = x - self.means(x)
        return x * torch.rsqrt(self.means(x * x) + self.eps) * self.weight + self.bias


# Forms of single operators. `NotImplemented` leaves an operator as it is.


def _softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    """In two axes: of maps that convolutions gave, XNNPACK's runs along the channels instead."""
    if dtype is not None or dim not in (-1, x.dim() - 1):
        return NotImplemented
    return aten._softmax(x.reshape(-1, x.shape[-1]), -1, False).view(x.shape)


def _matmul(left: Tensor, right: Tensor) -> Any:
    """Of equal batch axes without expanding them."""
    if left.dim() < 3 or left.shape[:-2] != right.shape[:-2]:
        return NotImplemented
    matrices = (x.reshape(-1, *x.shape[-2:]) for x in (left, right))
    return torch.bmm(*matrices).view(*left.shape[:-1], right.shape[-1])


def _upsample_nearest(x: Tensor, size: Sequence[int] | None, scales: Sequence[float] | None) -> Any:
    """By whole factors: copies side by side."""
    batch, width, rows, columns = x.shape
    if size is None:
        assert scales is not None  # one of them is given
        size = (int(rows * scales[0]), int(columns * scales[1]))
    if size[0] % rows or size[1] % columns:
        return NotImplemented
    down, across = size[0] // rows, size[1] // columns
    # XNNPACK joins up to five tensors, which must be several: each gets a view of its own.
    x = torch.cat([x.reshape(batch, width, -1, 1) for _ in range(across)], 3)
    x = torch.cat([x.view(batch, width, rows, -1) for _ in range(down)], 3)
    return x.view(batch, width, *size)


def _mean(x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """Of two axes of four: of the last two, which are kept and then dropped."""
    reduced = sorted(axis % x.dim() for axis in dim or ())
    if x.dim() != 4 or len(reduced) != 2 or keepdim or dtype is not None:
        return NotImplemented
    kept = [axis for axis in range(4) if axis not in reduced]
    if reduced != [2, 3]:
        x = x.permute(*kept, *reduced)
    return x.mean((2, 3), keepdim=True).flatten(1)


def _alias(x: Tensor) -> Tensor:
    """A slice of everything, for example."""
    return x


def _split(x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    """By slices."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [x.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True)]


EQUAL_FORMS = {
    aten.softmax.int: _softmax,
    aten.matmul.default: _matmul,
    aten.upsample_nearest2d.vec: _upsample_nearest,
    aten.mean.dim: _mean,
    aten.alias.default: _alias,
    aten.split_with_sizes.default: _split,
}
"""Operators in forms that XNNPACK computes, with equal results."""
