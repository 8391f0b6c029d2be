# SPDX-License-Identifier: Apache-2.0
"""mmseg's segmentors as graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.models.utils import Upsample
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmeformer.deploy import check
from mmeformer.deploy.graphs import Graph, require, smaller
from mmeformer.deploy.metadata import cut_settings, task_settings
from mmeformer.runtime import Segmentation
from mmeformer.segmentation.settings import require_windows


class SegmentationGraph(Graph):
    """Class of every pixel: ``labels`` (B, H, W), ``uint8`` up to 256 classes.

    Logits are resized to the size of the input and then to ``output_size``, as in mmseg, so that
    the labels of an image that was resized for the network are those of mmseg. A model that tests
    in windows (``mode=slide``) sees all windows of an image as one batch.

    Args:
        model: an ``EncoderDecoder``.
        normalize: see :class:`Graph`.

    Raises:
        ValueError: another kind of model, or windows with gaps between them.
    """

    extra_inputs: tuple[str, ...] = ("output_size",)
    output_names = ("labels",)
    raw_names = ("raw_logits",)
    compare = staticmethod(check.compare_labels)

    def __init__(self, model: Any, normalize: nn.Module | None = None) -> None:
        super().__init__(normalize)
        require(
            isinstance(model, EncoderDecoder) and isinstance(model.decode_head, nn.Module),
            f"{type(model).__name__} is not an EncoderDecoder of mmseg",
        )
        require_windows(model)
        if model.test_cfg.get("mode") == "slide":
            height, width = model.test_cfg.crop_size
            self.window = (height, width)
        self.model = model
        for name, module in list(model.named_modules()):
            parent, _, attribute = name.rpartition(".")
            if isinstance(module, Upsample) and not module.size:
                setattr(model.get_submodule(parent), attribute, _AnyUpsample(module))
            elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size not in (1, (1, 1)):
                setattr(model.get_submodule(parent), attribute, _AnyPool(module))

    def run(self, image: Tensor, output_size: Tensor | None = None) -> tuple[Tensor, ...]:
        """See :meth:`Graph.run`."""
        head = self.model.decode_head
        if self.window is None:
            raw = head(self.model.extract_feat(image))
            logits = self._resize(raw, image.shape[-2:])
        else:
            logits = raw = self._in_windows(image, self.window, self.model.test_cfg.stride)
        if output_size is not None:
            # A trace records tensors, but not the Python numbers in them.
            size: Any = output_size.unbind() if torch.jit.is_tracing() else output_size.tolist()
            logits = self._resize(logits, size)
        if head.out_channels == 1:
            labels = (logits.sigmoid() > head.threshold).squeeze(1)
        else:
            labels = logits.argmax(1)
        return labels.to(torch.uint8 if head.num_classes <= 256 else torch.int32), raw

    def _in_windows(self, image: Tensor, window: Sequence[int], stride: Sequence[int]) -> Tensor:
        """Logits (B, classes, H, W), means over windows, as in mmseg's ``slide_inference``."""
        rows = _Windows(image.shape[-2], window[0], stride[0])
        columns = _Windows(image.shape[-1], window[1], stride[1])
        parts = columns.cut(rows.cut(image.transpose(-2, -1)).transpose(-2, -1))
        logits = self.model.decode_head(self.model.extract_feat(parts))
        logits = columns.join(self._resize(logits, parts.shape[-2:]))
        return rows.join(logits.transpose(-2, -1)).transpose(-2, -1)

    def _resize(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(
            logits, size=size, mode="bilinear", align_corners=self.model.align_corners
        )

    def output_axes(self, any_size: bool) -> dict[str, dict[int, str]]:
        """See :meth:`Graph.output_axes`."""
        batch = {0: "batch"} if any_size else {}
        return {"labels": {**batch, 1: "output_height", 2: "output_width"}}

    @staticmethod
    def settings(config: Config, model: Any) -> dict[str, Any]:
        """See :meth:`Graph.settings`."""
        return task_settings(config, model) | cut_settings(config, model)

    @staticmethod
    def predict(model: Any, image: Tensor, metainfo: dict[str, Any]) -> Segmentation:
        """See :meth:`Graph.predict`."""
        (sample,) = model.predict(image, [SegDataSample(metainfo=metainfo)])
        return Segmentation(sample.pred_sem_seg.data[0].numpy())

    @staticmethod
    def set_prediction(sample: SegDataSample, result: Segmentation) -> None:
        """See :meth:`Graph.set_prediction`."""
        labels = torch.from_numpy(result.labels.astype("int64"))
        sample.set_data({"pred_sem_seg": PixelData(data=labels[None])})


class FixedSizeSegmentationGraph(SegmentationGraph):
    """A :class:`SegmentationGraph` with ``labels`` of the size of the input.

    CoreML cannot resize to a size that is an input.
    """

    extra_inputs = ()


class _Windows:
    """Windows along the last axis of maps; the last one is moved back to end at the border.

    No map has more than five axes, which CoreML requires.

    Args:
        length: of the axis.
        window: length of a window; if the axis is shorter, it is one window.
        stride: from the start of a window to that of the next.
    """

    def __init__(self, length: int, window: int, stride: int) -> None:
        self.length, self.stride = length, stride
        self.most = -(-window // stride) + 1
        """Largest number of windows that share a place, with the one that was moved back."""
        self.side = smaller(length, window)
        last = length - self.side
        self.count = (last + stride - 1) // stride + 1
        self.starts = (torch.arange(self.count) * stride).clamp(max=last)

    def cut(self, maps: Tensor) -> Tensor:
        """(B, C, H, length) -> (B * count, C, H, side)."""
        parts = maps[..., self.starts[:, None] + torch.arange(self.side)]
        return parts.permute(0, 3, 1, 2, 4).flatten(0, 1)

    def join(self, parts: Tensor) -> Tensor:
        """(B * count, C, H, side) -> (B, C, H, length): the mean of the windows at every place."""
        parts = parts.reshape(-1, self.count, *parts.shape[1:]).permute(0, 2, 3, 1, 4).flatten(-2)
        places = torch.arange(self.length)
        total: Any = 0
        found: Any = 0
        for index in range(self.most):
            number = (places // self.stride + 1).clamp(max=self.count - 1) - index
            exists = number >= 0
            number = number.clamp(min=0)
            inside = places - self.starts[number]
            exists = exists & (inside >= 0) & (inside < self.side)
            inside = inside.clamp(min=0).clamp(max=self.side - 1)
            weight = exists.to(parts.dtype)
            total = total + parts[..., number * self.side + inside] * weight
            found = found + weight
        return total / found


class _AnyUpsample(nn.Module):
    """mmseg's ``Upsample`` for any size: sizes do not become constants of the traced example."""

    def __init__(self, source: Upsample) -> None:
        super().__init__()
        require(float(source.scale_factor).is_integer(), "an Upsample by a fractional factor")
        self.factor = int(source.scale_factor)
        self.mode, self.align_corners = source.mode, source.align_corners

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[-2] * self.factor, x.shape[-1] * self.factor)
        return F.interpolate(x, size=size, mode=self.mode, align_corners=self.align_corners)


class _AnyPool(nn.Module):
    """``AdaptiveAvgPool2d``, as in mmseg's ``UPerHead`` and ``PSPHead``, for any size of maps.

    ONNX has only windows of equal size. Here each axis is multiplied by a matrix of means.
    """

    def __init__(self, source: nn.AdaptiveAvgPool2d) -> None:
        super().__init__()
        size: Any = source.output_size
        self.sides: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        require(None not in self.sides, "an AdaptiveAvgPool2d that keeps a side")

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.sides
        return _means(height, x.shape[-2], x) @ x @ _means(width, x.shape[-1], x).T


def _means(count: int, length: Any, like: Tensor) -> Tensor:
    """Matrix (count, length) of the means over PyTorch's windows along an axis.

    Window i begins at ``floor(i * length / count)`` and ends before
    ``ceil((i + 1) * length / count)``.
    """
    window = torch.arange(count, device=like.device)[:, None]
    place = torch.arange(length, device=like.device)
    # place < ceil(a / count) means place * count < a.
    inside = ((place + 1) * count > window * length) & (place * count < (window + 1) * length)
    weight = inside.to(like.dtype)
    return weight / weight.sum(1, keepdim=True)
