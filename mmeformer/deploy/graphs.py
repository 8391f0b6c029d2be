# SPDX-License-Identifier: Apache-2.0
"""Models as graphs: tensors in, tensors out, every choice that depends on data an operator.

A graph calls the trained layers of a model and expresses what lies around them (anchors, choice of
boxes, suppression) so that it can be traced for any batch and size. Detectors and segmentors have a
module each beside this one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmeformer.backbones.base import PyramidBackbone


class Graph(nn.Module):
    """Base of all graphs.

    ``forward(image, *others)`` returns the outputs named by ``output_names``, then the raw tensors
    named by ``raw_names``: what the check of an export compares number by number, and what the
    finished file no longer holds (``raw_names = ()`` leaves them out). A subclass implements
    :meth:`run`.

    Args:
        normalise: makes the network's input of the ``image`` input; None takes it as it is.
    """

    extra_inputs: tuple[str, ...] = ()
    output_names: tuple[str, ...]
    raw_names: tuple[str, ...] = ()

    def __init__(self, normalise: nn.Module | None = None) -> None:
        super().__init__()
        self.normalise = normalise

    def forward(self, image: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        if self.normalise is not None:
            image = self.normalise(image)
            if "image_size" in self.extra_inputs:
                image = _blank_padding(image, *others)
        outputs = self.run(image, *others)
        return tuple(outputs[: len(self.output_names) + len(self.raw_names)])

    def run(self, image: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """``image`` (B, 3, H, W), normalised, and the ``extra_inputs`` -> all outputs."""
        raise NotImplementedError


def _blank_padding(image: Tensor, image_size: Tensor) -> Tensor:
    """Zeros beyond ``image_size`` (B, 2): height and width of each of the images (B, 3, H, W)."""
    rows, columns = (
        torch.arange(image.shape[axis], device=image.device) < image_size[:, axis - 2, None]
        for axis in (2, 3)
    )
    return image * (rows[:, None, :, None] & columns[:, None, None, :])


class Normalise(nn.Module):
    """Images as OpenCV reads them -> the network's input (B, 3, H, W) ``float32``.

    Args:
        mean, std: of the channels in the network's order, on a scale of 0 to 255.
        bgr_to_rgb: whether to reverse the channels.
        channels_last: input (B, H, W, 3) of ``uint8``; else (B, 3, H, W) of floating point numbers,
            still on a scale of 0 to 255.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], bgr_to_rgb: bool, channels_last: bool
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        order = [2, 1, 0] if bgr_to_rgb else [0, 1, 2]
        self.register_buffer("order", torch.tensor(order))
        self.channels_last = channels_last

    def forward(self, image: Tensor) -> Tensor:
        if self.channels_last:
            image = image.permute(0, 3, 1, 2).float()
        return (image[:, self.order] - self.mean) / self.std


class BackboneGraph(Graph):
    """The pyramid of the bare backbone: outputs ``level0`` (finest) and so on."""

    def __init__(self, backbone: PyramidBackbone, normalise: nn.Module | None = None) -> None:
        super().__init__(normalise)
        self.backbone = backbone
        self.output_names = tuple(f"level{i}" for i in range(len(backbone.out_indices)))

    def run(self, image: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Graph.run`."""
        return self.backbone(image)


def take(values: Tensor, index: Tensor) -> Tensor:
    """``values`` (B, N, D) at places ``index`` (B, K) of each image: (B, K, D)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def top_k(scores: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The ``limit`` best of (B, N) along N, or all if they are fewer: values and places."""
    count = scores.shape[1]
    if torch.jit.is_tracing():
        # A number would be frozen at what the traced example had.
        limit = torch.minimum(torch.tensor(limit), torch.as_tensor(count))
    else:
        limit = min(limit, count)
    return scores.topk(limit, dim=1)


def place_shifts(size: tuple[int, int], stride: tuple[int, int], like: Tensor) -> Tensor:
    """(H * W, 2): x and y in pixels by which each place of a map is away from the first one.

    Args:
        size: (H, W) of the map.
        stride: pixels per place, (x, y) as mmdet's anchor generators have it.
        like: gives type and device.
    """
    x = torch.arange(size[1], device=like.device).to(like.dtype) * stride[0]
    y = torch.arange(size[0], device=like.device).to(like.dtype) * stride[1]
    # Rows outside, columns inside, as a map is flattened.
    x = x[None, :].expand(y.shape[0], -1)
    y = y[:, None].expand(-1, x.shape[1])
    return torch.stack([x, y], -1).flatten(0, 1)


def require(condition: bool, what: str) -> None:
    """Raise a ``ValueError`` for a model that no graph here can express."""
    if not condition:
        raise ValueError(f"{what}; `--part backbone` exports the backbone of every model")
