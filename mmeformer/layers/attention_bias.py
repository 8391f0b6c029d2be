# SPDX-License-Identifier: Apache-2.0
"""The learned attention bias of both versions: a table of offsets, and how it is resized."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmeformer.layers.graphs import in_graph

RESIZE_MODES = ("displacement", "matrix")


def resample_in_graph(table: Tensor, dim: int, target: int) -> Tensor:
    """:func:`_resample_offsets` by tensor operations alone.

    For graphs that serve every ``target``: Python arithmetic would become constants there.
    """
    source = table.shape[dim]
    # Divide last: whole numbers stay whole, as quotients that are whole are exact. Not in float64,
    # with which onnxruntime-web cannot run the graph on a GPU.
    exact = torch.promote_types(table.dtype, torch.float32)
    positions = torch.arange(target, device=table.device, dtype=exact) * source / target
    positions = positions.clamp(max=source - 1)
    lower = positions.floor().clamp(max=max(source - 2, 0))
    share = (positions - lower).to(table.dtype)
    lower = lower.long()
    upper = (lower + 1).clamp(max=source - 1)
    below, above = table.index_select(dim, lower), table.index_select(dim, upper)
    if dim == -2:
        share = share[:, None]
    return below + (above - below) * share


@torch.inference_mode(False)
def _neighbors(
    source: int, target: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The two old offsets around each of ``target`` new ones, and the share of the second."""
    positions = [min(offset * source / target, source - 1) for offset in range(target)]
    lower = [min(int(position), max(source - 2, 0)) for position in positions]
    upper = [min(index + 1, source - 1) for index in lower]
    share = [position - index for position, index in zip(positions, lower, strict=True)]
    return (
        torch.tensor(lower, device=device),
        torch.tensor(upper, device=device),
        torch.tensor(share, device=device, dtype=dtype),
    )


# Once per size: on a GPU each of them is a copy from the host. What a tracer records is not kept:
# a second trace, as its own check makes, would differ from the first.
_known_neighbors = lru_cache(maxsize=1024)(_neighbors)


def _resample_offsets(table: Tensor, dim: int, target: int) -> Tensor:
    """Resample the offsets along ``dim`` to ``target`` offsets, by linear interpolation."""
    if torch.compiler.is_compiling():
        return resample_in_graph(table, dim, target)
    source = table.shape[dim]
    if source == target:
        return table
    # Gather and lerp, not a product with a weight matrix, which autocast would run in half
    # precision.
    neighbors = _neighbors if in_graph() else _known_neighbors
    lower, upper, share = neighbors(int(source), int(target), table.device, table.dtype)
    share = share.view([-1 if axis == dim % table.dim() else 1 for axis in range(table.dim())])
    below, above = table.index_select(dim, lower), table.index_select(dim, upper)
    return torch.lerp(below, above, share.expand_as(below))


def resize_offset_table(table: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Resize a table of offsets by displacement: (heads, Rh, Rw) -> (heads, *grid).

    Offset ``d`` of the new grid is offset ``d * R / grid`` of the old one: the same fraction of the
    image, so an entry still stands for the same displacement. Between two entries the value is
    interpolated linearly; beyond the last entry (the largest trained displacement) it is the last
    one. Offset 0 stays offset 0, and a grid ``k`` times as large keeps every old entry exactly, at
    ``k * d``.

    Differentiable; returns ``table`` itself if it has this grid already. This is the only resize of
    trained offsets in the project: the forward pass and the checkpoint loader share it.
    """
    return _resample_offsets(_resample_offsets(table, -2, grid[0]), -1, grid[1])


def expand_offset_table(table: Tensor, query_stride: int = 1) -> Tensor:
    """Expand a table (heads, H, W) to the bias matrix (heads, Nq, H * W) of that grid.

    Keys are at all positions of the grid, queries at every ``query_stride``-th position in each
    direction (Nq = ceil(H / s) * ceil(W / s)). Entry (query, key) is
    ``table[:, |s*qy - ky|, |s*qx - kx|]``.
    """
    dy = distances(table.shape[1], query_stride, table.device)
    dx = distances(table.shape[2], query_stride, table.device)
    return _select_rows(_select_columns(table, dx), dy)


def distances(side: int, query_stride: int, device: torch.device) -> Tensor:
    """|s * query - key| along one side: (queries, keys)."""
    return (_distances if in_graph() else _known_distances)(side, query_stride, device)


@torch.inference_mode(False)
def _distances(side: int, query_stride: int, device: torch.device) -> Tensor:
    places = torch.arange(side, device=device)
    return (places[::query_stride, None] - places).abs()


_known_distances = lru_cache(maxsize=1024)(_distances)


# Select along one axis at a time, not by pairs of indices: the gradient then adds whole rows or
# columns, where that of pairs adds single numbers, in one thread.


def _select_columns(table: Tensor, dx: Tensor) -> Tensor:
    """(heads, offsets, offsets) and the offsets (Wq, W) -> (heads, Wq, offsets, W)."""
    columns = table.index_select(2, dx.flatten())
    return columns.unflatten(2, dx.shape).transpose(1, 2).contiguous()


def _select_rows(columns: Tensor, dy: Tensor) -> Tensor:
    """(heads, Wq, offsets, W) and the offsets (Hq, H) -> (heads, Hq * Wq, H * W)."""
    rows = columns.index_select(2, dy.flatten()).unflatten(2, dy.shape)
    return rows.transpose(1, 2).flatten(3, 4).flatten(1, 2)


class AttentionBias(nn.Module):
    """Learned bias per head and displacement (|dy|, |dx|) between a query and a key.

    Args:
        num_heads: attention heads.
        grid: rows and columns of the table: offsets 0 .. grid - 1 in either direction.
        query_stride: 2 if queries are at every second position of the key grid, else 1.
        resize: how a feature map of another size gets its bias. ``"displacement"`` resizes the
            table of offsets (:func:`resize_offset_table`). ``"matrix"`` expands the table on its
            own grid and resizes that matrix by bicubic interpolation, exactly as the reference
            implementation does downstream (snap-research/EfficientFormer, ``detection/`` and
            ``segmentation/``). On maps that are not square this mixes rows and columns, so use it
            only for published downstream checkpoints.

    On a CPU, in eval mode and without gradients, the bias of the latest sizes is cached. Every use
    compares the table with the one that the cache was computed from, value by value, so neither
    training, loading nor moving can leave it stale. On a GPU such a comparison would wait for all
    work before it, and computing the bias takes a few short kernels.
    """

    MAX_CACHED_SIZES = 2
    """Landscape and portrait; one bias at 800 x 1344 px takes 35 MB."""

    MAX_CACHED_NUMBERS = 2**24
    """A larger bias (64 MiB in float32) is not cached as a whole: see :meth:`chunks`."""

    def __init__(
        self,
        num_heads: int,
        grid: tuple[int, int],
        query_stride: int = 1,
        resize: str = "displacement",
    ) -> None:
        super().__init__()
        if resize not in RESIZE_MODES:
            raise ValueError(f"bias_resize must be one of {RESIZE_MODES}, but is {resize!r}")
        self.query_stride = query_stride
        self.resize = resize
        self.table = nn.Parameter(torch.zeros(num_heads, *grid))
        self._cache: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._cached_table: Tensor | None = None

    def compute(self, size: tuple[int, ...]) -> Tensor:
        """The bias (heads, Nq, H * W) of a key map of ``size`` (H, W), without the cache."""
        if self.resize == "displacement":
            return expand_offset_table(resize_offset_table(self.table, size), self.query_stride)
        height, width = size
        stride = self.query_stride
        queries = -(-height // stride) * -(-width // stride)
        matrix = expand_offset_table(self.table, stride)
        return F.interpolate(
            matrix[None], size=(queries, height * width), mode="bicubic", align_corners=False
        )[0]

    def forward(self, size: tuple[int, ...]) -> Tensor:
        """``size`` (H, W) of the key map -> bias (heads, Nq, H * W)."""
        on_cpu = self.table.device.type == "cpu"
        if self.training or self._differentiable() or in_graph() or not on_cpu:
            return self.compute(size)
        return self._cached((size[0], size[1]))

    def _differentiable(self) -> bool:
        return torch.is_grad_enabled() and self.table.requires_grad

    def chunks(self, size: tuple[int, ...]) -> Callable[[int, int], Tensor]:
        """A function ``(first, last)`` that returns the bias of these queries (``last`` exclusive).

        The queries must be whole rows. The function returns (heads, queries, H * W) and is
        differentiable. A bias that is large or has a gradient never exists as a whole.
        """
        height, width = size
        per_row = -(-width // self.query_stride)
        numbers = self.table.shape[0] * -(-height // self.query_stride) * per_row * height * width
        small = numbers <= self.MAX_CACHED_NUMBERS and not self._differentiable()
        if self.resize != "displacement" or small:
            bias = self(size)
            return lambda first, last: bias[:, first:last]
        table = resize_offset_table(self.table, size)
        dy = distances(height, self.query_stride, table.device)
        columns = _select_columns(table, distances(width, self.query_stride, table.device))
        return lambda first, last: _select_rows(columns, dy[first // per_row : last // per_row])

    @torch.inference_mode(False)
    @torch.no_grad()
    def _cached(self, size: tuple[int, int]) -> Tensor:
        table, known = self.table, self._cached_table
        if (
            known is None
            or known.device != table.device
            or known.dtype != table.dtype
            or not torch.equal(known, table)
        ):
            self._cache.clear()
            self._cached_table = table.detach().clone()
        if size in self._cache:
            self._cache.move_to_end(size)
        else:
            self._cache[size] = self.compute(size)
            if len(self._cache) > self.MAX_CACHED_SIZES:
                self._cache.popitem(last=False)
        return self._cache[size]

    def __getstate__(self) -> dict[str, object]:
        # A copied or pickled module starts with an empty cache: it may be moved before its use.
        return {**self.__dict__, "_cache": OrderedDict(), "_cached_table": None}

    def extra_repr(self) -> str:
        heads, rows, columns = self.table.shape
        return (
            f"num_heads={heads}, grid=({rows}, {columns}), query_stride={self.query_stride}, "
            f"resize={self.resize!r}"
        )
