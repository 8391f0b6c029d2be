# SPDX-License-Identifier: Apache-2.0
"""Segmentors of mmseg as graphs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmseg.models import EncoderDecoder
from mmseg.models.utils import Upsample
from torch import Tensor, nn

from mmeformer.deploy.graphs import Graph, require


class SegmentationGraph(Graph):
    """Class of every pixel: ``labels`` (B, H, W), ``uint8`` up to 256 classes.

    Logits are enlarged to the size of the input and then to ``output_size``, as mmseg does it, so
    that labels of an image that was resized for the network are as sharp as mmseg's.

    Args:
        model: an ``EncoderDecoder`` in "whole" test mode.
        normalise: see :class:`Graph`.
        any_output_size: whether there is the input ``output_size`` (2,) ``int64``: height and width
            of ``labels``. Else they have the size of the input.

    Raises:
        ValueError: another kind of model.
    """

    output_names = ("labels",)
    raw_names = ("raw_logits",)

    def __init__(
        self,
        model: nn.Module,
        normalise: nn.Module | None = None,
        any_output_size: bool = True,
    ) -> None:
        super().__init__(normalise)
        require(
            isinstance(model, EncoderDecoder) and isinstance(model.decode_head, nn.Module),
            f"{type(model).__name__} is not an EncoderDecoder of mmseg",
        )
        require(
            model.test_cfg.get("mode", "whole") == "whole",
            "the model tests in windows, and a graph sees one image: set "
            "--cfg-options model.test_cfg.mode=whole",
        )
        self.model = model
        self.extra_inputs = ("output_size",) if any_output_size else ()
        for name, module in list(model.named_modules()):
            if isinstance(module, Upsample) and not module.size:
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, _AnyUpsample(module))

    def run(self, image: Tensor, output_size: Tensor | None = None) -> tuple[Tensor, ...]:
        """See :meth:`Graph.run`."""
        head = self.model.decode_head
        raw = head(self.model.extract_feat(image))
        logits = self._resize(raw, image.shape[-2:])
        if output_size is not None:
            height, width = output_size.unbind()
            if not torch.jit.is_tracing():
                height, width = int(height), int(width)
            logits = self._resize(logits, (height, width))
        if head.out_channels == 1:
            labels = (logits.sigmoid() > head.threshold).squeeze(1)
        else:
            labels = logits.argmax(1)
        return labels.to(torch.uint8 if head.num_classes <= 256 else torch.int32), raw

    def _resize(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(
            logits, size=size, mode="bilinear", align_corners=self.model.align_corners
        )


class _AnyUpsample(nn.Module):
    """mmseg's ``Upsample``, which turns sizes into plain numbers, for a tracer."""

    def __init__(self, source: Upsample) -> None:
        super().__init__()
        require(float(source.scale_factor).is_integer(), "an Upsample by a fractional factor")
        self.factor = int(source.scale_factor)
        self.mode, self.align_corners = source.mode, source.align_corners

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[-2] * self.factor, x.shape[-1] * self.factor)
        return F.interpolate(x, size=size, mode=self.mode, align_corners=self.align_corners)
