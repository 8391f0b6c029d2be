# SPDX-License-Identifier: Apache-2.0
"""mmdet's GFL, also with the light head, as graphs: with NMS, or with every box before it."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.dense_heads import GFLHead
from mmdet.models.detectors import SingleStageDetector
from mmdet.models.task_modules.coders import DistancePointBBoxCoder
from mmdet.models.task_modules.prior_generators import AnchorGenerator
from mmengine.config import Config
from torch import Tensor, nn

from mmeformer.deploy import check, samples
from mmeformer.deploy.graphs import Graph, cell_shifts, require, take, top_k
from mmeformer.deploy.metadata import detector_settings
from mmeformer.detection.lite_head import LiteGFLHead
from mmeformer.detection.suppression import clip, suppress
from mmeformer.runtime import Detections


def is_dense(model: Any) -> bool:
    """Whether a model is a detector of one stage with a GFL head, mmdet's or the light one."""
    head = getattr(model, "bbox_head", None)
    return isinstance(model, SingleStageDetector) and type(head) in (GFLHead, LiteGFLHead)


class _GFLGraph(Graph):
    """Base of the graphs.

    Args:
        model: a detector of one stage with a ``GFLHead`` or ``LiteGFLHead``.
        normalize: see :class:`Graph`.

    Raises:
        ValueError: the model has another head, or settings that the graph cannot express.
    """

    compare = staticmethod(check.compare_detections)
    set_prediction = staticmethod(samples.set_instances)

    first_points: Tensor

    def __init__(self, model: Any, normalize: nn.Module | None = None) -> None:
        super().__init__(normalize)
        _check_supported(model)
        self.model = model
        head = model.bbox_head
        self.levels = range(head.prior_generator.num_levels)
        # The points of the first cell; all others are shifted by the stride.
        first = head.prior_generator.grid_priors([(1, 1)] * len(self.levels), device="cpu")
        self.register_buffer("first_points", head.anchor_center(torch.cat(first)))

    def boxes(self, level: int, cells: Tensor, distances: Tensor, size: tuple[int, ...]) -> Tensor:
        """Boxes (B, K, 4) in pixels of the input, not clipped.

        Args:
            level: index.
            cells: (B, K), indices of cells of the map, row by row.
            distances: (B, K, 4 * (reg_max + 1)), logits.
            size: (H, W) of the map.
        """
        head = self.model.bbox_head
        stride = head.prior_generator.strides[level]
        # The head's own `Integral` multiplies by a vector, which CoreML has no layer for.
        bins = distances.reshape(-1, 4, head.reg_max + 1).softmax(-1)
        expected = (bins * head.integral.project).sum(-1) * stride[0]
        shifts = cell_shifts(size, stride, distances)[cells.flatten()]
        points = self.first_points[level] + shifts
        decoded: Tensor = head.bbox_coder.decode(points, expected)
        return decoded.view(cells.shape[0], -1, 4)

    @staticmethod
    def settings(config: Config, model: Any) -> dict[str, Any]:
        """See :meth:`Graph.settings`."""
        _check_supported(model)
        test_cfg = config.model.test_cfg
        candidates = max(test_cfg.get("nms_pre", -1), 0) or None
        return dict(detector_settings(config, model, test_cfg), candidates=candidates)

    @staticmethod
    def predict(model: Any, image: Tensor, metainfo: dict[str, Any]) -> Detections:
        """See :meth:`Graph.predict`."""
        found = samples.predict_instances(model, image, metainfo)
        return Detections(*samples.arrays(found), metainfo["ori_shape"])


class DenseGraph(_GFLGraph):
    """Graph for the boxes of all images of a batch, after NMS.

    Outputs, for N objects in total, each image's best first: ``boxes`` (N, 4) in pixels of the
    input (left, top, right, bottom edge), ``scores`` (N,), ``labels`` (N,) ``int64`` and
    ``image_index`` (N,) ``int64``.
    """

    extra_inputs = ("image_size",)
    output_names = ("boxes", "scores", "labels", "image_index")

    def __init__(self, model: Any, normalize: nn.Module | None = None) -> None:
        super().__init__(model, normalize)
        self.raw_names = tuple(
            f"raw_{kind}{level}" for kind in ("scores", "distances") for level in self.levels
        )

    def run(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Graph.run`."""
        head = self.model.bbox_head
        settings = head.test_cfg
        maps = head(self.model.extract_feat(image))
        found = [
            self._best(level, scores, distances)
            for level, (scores, distances) in enumerate(zip(*maps, strict=True))
        ]
        boxes, scores, labels = (torch.cat(values, 1) for values in zip(*found, strict=True))
        boxes = clip(boxes, image_size[:, None])
        if settings.get("min_bbox_size", -1) >= 0:
            sides = boxes[..., 2:] - boxes[..., :2]
            scores = torch.where(sides.amin(-1) > settings.min_bbox_size, scores, -1)
        image_index, index = suppress(
            boxes,
            scores,
            labels,
            settings.nms.iou_threshold,
            max(settings.get("score_thr", 0), 0),
            settings.max_per_img,
        )
        objects = (values[image_index, index] for values in (boxes, scores, labels))
        return (*objects, image_index, *maps[0], *maps[1])

    def _best(self, level: int, scores: Tensor, distances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best boxes (B, K, 4), scores (B, K) and labels (B, K) of one level."""
        head = self.model.bbox_head
        size, classes = scores.shape[-2:], head.cls_out_channels
        flat = scores.permute(0, 2, 3, 1).flatten(1).sigmoid()
        best, index = top_k(flat, head.test_cfg.get("nms_pre", -1))
        labels = index % classes
        cells = torch.div(index, classes, rounding_mode="floor")
        chosen = take(distances.flatten(2).transpose(1, 2), cells)
        return self.boxes(level, cells, chosen, size), best, labels

    def output_axes(self, any_size: bool) -> dict[str, dict[int, str]]:
        """See :meth:`Graph.output_axes`."""
        return {name: {0: "objects"} for name in self.output_names}


class DenseCandidatesGraph(_GFLGraph):
    """Graph for every box of every level, before NMS, which :mod:`mmeformer.runtime` does.

    For every level i: ``scores{i}`` (B, H_i * W_i, classes) from 0 to 1 and ``boxes{i}``
    (B, H_i * W_i, 4) in pixels of the input, clipped to the image.
    """

    extra_inputs: tuple[str, ...] = ("image_size",)

    def __init__(self, model: Any, normalize: nn.Module | None = None) -> None:
        super().__init__(model, normalize)
        self.output_names = tuple(f"{kind}{i}" for kind in ("scores", "boxes") for i in self.levels)

    @classmethod
    def for_model(cls, model: Any) -> type[Graph]:
        """See :meth:`Graph.for_model`."""
        if not is_dense(model):
            raise ValueError(
                "this target has no operators to select boxes and masks of "
                f"{type(model).__name__}: export it to ONNX with --nms inside, or only its "
                "--part backbone"
            )
        return cls

    def run(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Graph.run`."""
        outputs = self._all(image)
        count = len(self.levels)
        return (*outputs[:count], *(clip(b, image_size[:, None]) for b in outputs[count:]))

    def _all(self, image: Tensor) -> tuple[Tensor, ...]:
        """Scores of all levels, then their boxes, not clipped."""
        head = self.model.bbox_head
        scores, boxes = [], []
        maps = head(self.model.extract_feat(image))
        for level, (logits, distances) in enumerate(zip(*maps, strict=True)):
            batch, size = logits.shape[0], logits.shape[-2:]
            scores.append(logits.flatten(2).transpose(1, 2).sigmoid())
            rows = distances.flatten(2).transpose(1, 2)
            cells = torch.arange(rows.shape[1], device=rows.device).expand(batch, -1)
            boxes.append(self.boxes(level, cells, rows, size))
        return (*scores, *boxes)

    def output_axes(self, any_size: bool) -> dict[str, dict[int, str]]:
        """See :meth:`Graph.output_axes`."""
        if not any_size:
            return {}
        return {name: {0: "batch", 1: f"{name}_cells"} for name in self.output_names}


class FixedCandidatesGraph(DenseCandidatesGraph):
    """The same for targets of one input, ``image``: boxes are not clipped, and have a fixed size.

    The runtime clips the boxes that it chooses.
    """

    extra_inputs = ()

    def run(self, image: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """See :meth:`Graph.run`."""
        return self._all(image)


def _check_supported(model: Any) -> None:
    require(is_dense(model), f"{type(model).__name__} has no GFLHead or LiteGFLHead")
    head: Any = model.bbox_head
    coder, generator, settings = head.bbox_coder, head.prior_generator, head.test_cfg
    require(
        type(coder) is DistancePointBBoxCoder and coder.clip_border,
        "the bbox_coder is not a DistancePointBBoxCoder that clips to the image",
    )
    require(type(generator) is AnchorGenerator, "the anchor_generator is not an AnchorGenerator")
    require(
        settings.nms.get("type", "nms") == "nms" and set(settings.nms) <= {"type", "iou_threshold"},
        "test_cfg.nms is not a plain nms",
    )
    require(
        settings.get("min_bbox_size", -1) <= 0,
        f"test_cfg.min_bbox_size is {settings.get('min_bbox_size')}, in pixels of the image, which "
        "the graph does not know; set 0",
    )
    require(
        settings.max_per_img > 0,
        f"test_cfg.max_per_img is {settings.max_per_img}, with which mmdet loses the worst "
        "objects; set the largest number of them",
    )
