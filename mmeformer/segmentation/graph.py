# SPDX-License-Identifier: Apache-2.0
"""mmseg's segmentors as graphs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
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
from mmeformer.deploy.loops import repeat
from mmeformer.deploy.metadata import cut_settings, task_settings
from mmeformer.layers.graphs import in_export
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
        height, width = image.shape[-2:]
        rows = _Windows(height, window[0], stride[0])
        columns = _Windows(width, window[1], stride[1])

        def crop(row: Any, column: Any) -> Tensor:
            y, x = rows.start(row), columns.start(column)
            return image[..., y : y + rows.side, x : x + columns.side]

        def network(part: Tensor) -> Tensor:
            logits = self.model.decode_head(self.model.extract_feat(part))
            return self._resize(logits, (rows.side, columns.side))

        def placed(logits: Tensor, row: Any, column: Any) -> Tensor:
            y, x = rows.start(row), columns.start(column)
            return F.pad(logits, (x, width - columns.side - x, y, height - rows.side - y))

        def step(index: Tensor, total: Tensor) -> Tensor:
            place = index // columns.count, index % columns.count
            return total + placed(network(crop(*place)), *place)

        if self.any_size and in_export():
            shape = image.shape[0], self.model.decode_head.out_channels, height, width
            total: Any = repeat(rows.count * columns.count, image.new_zeros(shape), step)
        else:
            places = list(product(range(int(rows.count)), range(int(columns.count))))
            parts = [crop(*place) for place in places]
            logits: Iterable[Tensor] = map(network, parts)
            if in_export():
                # One batch: a network per window would make a large graph.
                logits = network(torch.cat(parts)).chunk(len(places))
            total = sum(placed(part, *place) for part, place in zip(logits, places, strict=True))
        return total / (rows.found()[:, None] * columns.found())

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
    """Windows along an axis; the last one is moved back to end at the border.

    Args:
        length: of the axis.
        window: length of a window; if the axis is shorter, it is one window.
        stride: from the start of a window to that of the next.
    """

    def __init__(self, length: Any, window: int, stride: int) -> None:
        self.length, self.stride = length, stride
        self.side = smaller(length, window)
        self.last = length - self.side
        self.count = (self.last + stride - 1) // stride + 1

    def start(self, index: Any) -> Any:
        """First place of a window."""
        return smaller(index * self.stride, self.last)

    def found(self) -> Tensor:
        """(length,) ``float32``: number of the windows at every place."""
        places = torch.arange(self.length)
        starts = (torch.arange(self.count) * self.stride).clamp(max=self.last)[:, None]
        return ((places >= starts) & (places < starts + self.side)).float().sum(0)


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
