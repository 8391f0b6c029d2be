# SPDX-License-Identifier: Apache-2.0
"""Substitute for ``mmcv._ext`` where mmcv has no compiled one; see :mod:`mmeformer.ops`.

Functions have the names and arguments of mmcv's C++ functions, and like those write results into
tensors they are given. ``mmcv.ops`` asks for all operators at import, so an operator that is not
here exists by name, and raises an error when it is called.

Source: mmcv/ops/csrc/pytorch/pybind.cpp in mmcv 2.x (names and arguments).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
import torchvision
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmeformer.errors import UserError
from mmeformer.ops import rotated, rotated_roi_align

IS_SUBSTITUTE = True


class OperatorError(UserError, NotImplementedError):
    """An operator is not here; the message says how to get it."""


def get_compiler_version() -> str:
    """Say in place of a compiler that none was used."""
    return "none (torchvision's and PyTorch's operators)"


def get_compiling_cuda_version() -> str:
    """Say in place of a CUDA version that nothing was compiled."""
    return "not available"


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices (K,) of the boxes (N, 4) that stay, the best first; ``offset`` is added to sides."""
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(boxes.float(), scores.float(), iou_threshold)


def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    labels: Tensor,
    iou_threshold: float,
    multi_label: bool,
) -> Tensor:
    """Indices (K,) into ``dets`` (N, 5) of the boxes that stay, the best first.

    Among equal scores the first in the input ranks first, as in torchvision's NMS. ``order`` is not
    used: it comes from a sort that leaves equal scores in an order that depends on the machine.

    With ``multi_label`` the sixth column is the label, and boxes of different labels do not
    suppress each other: mmcv's CUDA kernel does the same, its CPU kernel ignores labels.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes = dets[order]
    label = boxes[:, 5] if multi_label else None
    return order[rotated.nms(boxes, iou_threshold, label)]


def box_iou_rotated(
    boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode_flag: int, aligned: bool
) -> None:
    """Write IoU (``mode_flag`` 0) or the share of the first box's area (1) into ``ious``."""
    mode = "iof" if mode_flag else "iou"
    ious.copy_(rotated.box_iou(boxes1, boxes2, mode, aligned).view_as(ious))


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the means over the bins of every region into ``output`` (K, C, height, width)."""
    _require_mean(pool_mode)
    input = _at_least_float32(input)
    size = (aligned_height, aligned_width)
    output.copy_(
        torchvision.ops.roi_align(
            input, rois.to(input.dtype), size, spatial_scale, sampling_ratio, aligned
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient of the maps into ``grad_input`` (B, C, H, W)."""
    _require_mean(pool_mode)
    grad_output = _at_least_float32(grad_output)
    rois = rois.to(grad_output.dtype)
    size = (aligned_height, aligned_width)
    if grad_output.device.type != "cpu" and torch.are_deterministic_algorithms_enabled():
        # PyTorch refuses torchvision's backward kernel there, but not its plain PyTorch operator.
        maps = torch.zeros_like(grad_input, dtype=grad_output.dtype, requires_grad=True)
        with torch.enable_grad():
            regions = torchvision.ops.roi_align(
                maps, rois, size, spatial_scale, sampling_ratio, aligned
            )
        grad_input.copy_(torch.autograd.grad(regions, maps, grad_output)[0])
        return
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad_output, rois, spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned
        )
    )


def _require_mean(pool_mode: int) -> None:
    if pool_mode != 1:
        _refuse("roi_align with pool_mode='max'")


def _at_least_float32(tensor: Tensor) -> Tensor:
    # float16 and bfloat16 cannot place a region to a pixel in a large map.
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def roi_align_rotated_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> None:
    """Write the means over the bins of every rotated region into ``output`` (K, C, height, width).

    Sides below zero are mirrored, as in mmcv's CUDA kernel; its CPU kernel refuses them.
    """
    size = (pooled_height, pooled_width)
    grid = rotated_roi_align.Grid(size, spatial_scale, sampling_ratio, aligned, clockwise)
    output.copy_(rotated_roi_align.roi_align(_at_least_float32(input), rois, grid))


def roi_align_rotated_backward(
    grad_output: Tensor,
    rois: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> None:
    """Write the gradient of the maps into ``grad_input`` (B, C, H, W)."""
    size = (pooled_height, pooled_width)
    grid = rotated_roi_align.Grid(size, spatial_scale, sampling_ratio, aligned, clockwise)
    grad_output = _at_least_float32(grad_output)
    grad_input.copy_(
        rotated_roi_align.roi_align_gradient(grad_output, rois, grad_input.shape, grid)
    )


def diff_iou_rotated_sort_vertices_forward(
    vertices: Tensor, mask: Tensor, num_valid: Tensor
) -> Tensor:
    """Indices of the corners of convex polygons in their order around the polygon.

    mmcv computes the differentiable IoU of rotated boxes around this operator
    (``mmcv.ops.diff_iou_rotated_2d``), with the corners of both boxes and all crossings of their
    sides as candidates.

    Args:
        vertices: (B, N, M, 2), candidates, relative to a point inside of the polygon.
        mask: (B, N, M), those that are corners of the polygon.
        num_valid: (B, N), how many are.

    Returns:
        (B, N, M + 1) int32: the corners in order, then the first of them until the end. mmcv's
        kernel has 9 columns, which boxes that are nearly the same exceed: all corners of both lie
        in the other one, and sides cross next to them. It ends with candidates at 0, not with the
        first corner; in a sum of areas between neighbors both are nothing.
    """
    x, y = _at_least_float32(vertices).unbind(-1)
    order = torch.atan2(y, x).masked_fill(~mask, torch.inf).argsort(dim=-1, stable=True)
    first = order[..., :1]
    corner = torch.arange(order.shape[-1], device=order.device) < num_valid[..., None]
    return torch.cat([torch.where(corner, order, first), first], -1).int()


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the focal loss of logits (N, C) into ``output`` (N, C).

    ``target`` (N,) has C for background. ``weight`` (C,) is a factor per class of the target, or
    empty. Logarithms are computed from the logits, so the loss of a confident mistake is exact;
    mmcv's kernel rounds the probability to 1 first.
    """
    x = _at_least_float32(input)
    p = x.sigmoid()
    positive = -alpha * (1 - p).pow(gamma) * logsigmoid(x)
    negative = -(1 - alpha) * p.pow(gamma) * logsigmoid(-x)
    output.copy_(_choose(positive, negative, target, weight))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the gradient of the summed loss with respect to the logits into ``grad_input``."""
    x = _at_least_float32(input)
    p = x.sigmoid()
    q = 1 - p
    positive = -alpha * q.pow(gamma) * (q - gamma * p * logsigmoid(x))
    negative = -(1 - alpha) * p.pow(gamma) * (gamma * q * logsigmoid(-x) - p)
    grad_input.copy_(_choose(positive, negative, target, weight))


def _choose(positive: Tensor, negative: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Per row, ``positive`` in the column of its target and ``negative`` elsewhere, weighted."""
    classes = torch.arange(positive.shape[1], device=positive.device)
    loss = torch.where(target[:, None] == classes, positive, negative)
    if weight.numel():
        # Background has no weight; mmcv's kernel reads past the end of ``weight`` there.
        of_row = torch.cat([weight.to(loss), loss.new_ones(1)])[target]
        loss = loss * of_row[:, None]
    return loss


def _refuse(operator: str) -> NoReturn:
    raise OperatorError(
        f"mmcv's operator {operator} needs to be compiled, and no model of mmeformer uses it. To "
        "compile mmcv's operators (a C++ compiler, for a GPU also nvcc; 10 to 60 minutes): make "
        "install-compiled, or pip install --force-reinstall --no-deps --no-cache-dir "
        "--no-build-isolation onedl-mmcv"
    )


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def operator(*args, **kwargs) -> NoReturn:
        _refuse(name)

    operator.__name__ = operator.__qualname__ = name
    # One object per name, so that it can be pickled.
    globals()[name] = operator
    return operator
