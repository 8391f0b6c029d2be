# SPDX-License-Identifier: Apache-2.0
"""mmdet's GFL and RTMDet-Ins as graphs: with NMS, or with every box before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.dense_heads import GFLHead, RTMDetInsHead, RTMDetInsSepBNHead
from mmdet.models.detectors import SingleStageDetector
from mmdet.models.task_modules.coders import DistancePointBBoxCoder
from mmdet.models.task_modules.prior_generators import AnchorGenerator, MlvlPointGenerator
from mmengine.config import Config
from torch import Tensor, nn

from mmeformer.deploy import check, samples
from mmeformer.deploy.graphs import Graph, cell_shifts, require, take, top_k
from mmeformer.deploy.metadata import cut_settings, detector_settings
from mmeformer.detection.dynamic_masks import located, mask_logits, with_positions
from mmeformer.detection.lite_head import LiteGFLHead
from mmeformer.detection.lite_mask_head import LiteRTMDetInsHead
from mmeformer.detection.suppression import clip, suppress
from mmeformer.runtime import Detections

GFL = (GFLHead, LiteGFLHead)
RTMDET_INS = (RTMDetInsHead, RTMDetInsSepBNHead, LiteRTMDetInsHead)


def is_dense(model: Any) -> bool:
    """Whether a model is a detector of one stage with a head of GFL or RTMDet-Ins."""
    head = getattr(model, "bbox_head", None)
    return isinstance(model, SingleStageDetector) and type(head) in (*GFL, *RTMDET_INS)


class _OneStageGraph(Graph):
    """Base of the graphs.

    Args:
        model: a detector of one stage with a head of :data:`GFL` or, with masks,
            :data:`RTMDET_INS`.
        normalize: see :class:`Graph`.

    Raises:
        ValueError: the model has another head, or settings that the graph cannot express.
    """

    compare = staticmethod(check.compare_detections)
    set_prediction = staticmethod(samples.set_instances)

    masks = False
    """Whether the model has masks."""

    first_points: Tensor

    def __init__(self, model: Any, normalize: nn.Module | None = None) -> None:
        super().__init__(normalize)
        _check_supported(model)
        self.model = model
        head = model.bbox_head
        self.masks = type(head) in RTMDET_INS
        self.levels = range(head.prior_generator.num_levels)
        # The points of the first cell; all others are shifted by the stride.
        first = torch.cat(
            head.prior_generator.grid_priors([(1, 1)] * len(self.levels), device="cpu")
        )
        self.register_buffer("first_points", first if self.masks else head.anchor_center(first))

    def boxes(self, level: int, cells: Tensor, distances: Tensor, size: tuple[int, ...]) -> Tensor:
        """Boxes (B, K, 4) in pixels of the input, not clipped.

        Args:
            level: index.
            cells: (B, K), indices of cells of the map, row by row.
            distances: (B, K, 4 * (reg_max + 1)), logits; of RTMDet-Ins (B, K, 4), in pixels.
            size: (H, W) of the map.
        """
        head = self.model.bbox_head
        if self.masks:
            expected = distances.reshape(-1, 4)
        else:
            # The head's own `Integral` multiplies by a vector, which CoreML has no layer for.
            bins = distances.reshape(-1, 4, head.reg_max + 1).softmax(-1)
            stride = head.prior_generator.strides[level][0]
            expected = (bins * head.integral.project).sum(-1) * stride
        points = self.points(level, size, distances)[cells.flatten()]
        decoded: Tensor = head.bbox_coder.decode(points, expected)
        return decoded.view(cells.shape[0], -1, 4)

    def points(self, level: int, size: tuple[int, ...], like: Tensor) -> Tensor:
        """Points (H * W, 2) of a level's cells, in pixels; arguments: see :func:`cell_shifts`."""
        stride = self.model.bbox_head.prior_generator.strides[level]
        return self.first_points[level] + cell_shifts(size, stride, like)

    def kernels(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Weights (B, H_i * W_i, num_gen_params) of every cell, see :func:`located`, from maps."""
        head = self.model.bbox_head
        found = []
        for level, values in enumerate(maps):
            rows = values.flatten(2).transpose(1, 2)
            points = self.points(level, values.shape[-2:], values)
            stride = torch.full_like(points[:, :1], head.prior_generator.strides[level][0])
            found.append(located(head, rows, points, stride))
        return found

    def features(self, values: Tensor) -> Tensor:
        """Input of the masks' layers, see :func:`with_positions`, from the head's map."""
        return with_positions(values, self.model.bbox_head.prior_generator.strides[0])

    @staticmethod
    def settings(config: Config, model: Any) -> dict[str, Any]:
        """See :meth:`Graph.settings`."""
        _check_supported(model)
        test_cfg = config.model.test_cfg
        candidates = max(test_cfg.get("nms_pre", -1), 0) or None
        masks = type(model.bbox_head) in RTMDET_INS
        threshold = dict(mask_threshold=test_cfg.mask_thr_binary) if masks else {}
        detector = detector_settings(config, model, test_cfg) | cut_settings(config, model)
        return detector | dict(candidates=candidates) | threshold

    @staticmethod
    def predict(model: Any, image: Tensor, metainfo: dict[str, Any]) -> Detections:
        """See :meth:`Graph.predict`."""
        return samples.predict_detections(model, image, metainfo)


class DenseGraph(_OneStageGraph):
    """Graph for the boxes of all images of a batch, after NMS.

    Outputs, for N objects in total, each image's best first: ``boxes`` (N, 4) in pixels of the
    input (left, top, right, bottom edge), ``scores`` (N,), ``labels`` (N,) ``int64``,
    ``image_index`` (N,) ``int64``, and ``mask_logits`` (N, H, W) if the model has masks, on a map
    of the whole input at the finest stride.
    """

    extra_inputs = ("image_size",)
    output_names: tuple[str, ...] = ("boxes", "scores", "labels", "image_index")

    def __init__(self, model: Any, normalize: nn.Module | None = None) -> None:
        super().__init__(model, normalize)
        kinds = ["scores", "distances"]
        if self.masks:
            self.output_names += ("mask_logits",)
            kinds.append("kernels")
        self.raw_names = tuple(f"raw_{kind}{level}" for kind in kinds for level in self.levels)
        self.raw_names += ("raw_mask_features",) * self.masks

    def run(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Graph.run`."""
        head = self.model.bbox_head
        scores, distances, *others = head(self.model.extract_feat(image))
        objects, cells = self._objects(scores, distances, image_size)
        if not self.masks:
            return (*objects, *scores, *distances)
        kernels, features = others
        # Add the first cell of the first image: runtimes reject some operators on empty tensors.
        image_index, cells = (torch.cat([v, v.new_zeros(1)]) for v in (objects[-1], cells))
        own = torch.cat(self.kernels(kernels), 1)[image_index, cells]
        masks = mask_logits(head, own, self.features(features)[image_index])[:-1]
        return (*objects, masks, *scores, *distances, *kernels, features)

    def _objects(
        self, scores: Sequence[Tensor], distances: Sequence[Tensor], image_size: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Select the objects.

        Args:
            scores, distances: the head's maps of all levels.
            image_size: see :class:`Graph`.

        Returns:
            The outputs from ``boxes`` to ``image_index``; and (N,), the cell of each object,
            counted over all levels.
        """
        settings = self.model.bbox_head.test_cfg
        found: list[tuple[Tensor, ...]] = []
        before: Any = 0
        for level, maps in enumerate(zip(scores, distances, strict=True)):
            *best, cells = self._best(level, *maps)
            found.append((*best, cells + before))
            before = before + maps[0].shape[2] * maps[0].shape[3]
        boxes, values, labels, cells = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        boxes = clip(boxes, image_size[:, None])
        if settings.get("min_bbox_size", -1) >= 0:
            sides = boxes[..., 2:] - boxes[..., :2]
            values = torch.where(sides.amin(-1) > settings.min_bbox_size, values, -1)
        image_index, index = suppress(
            boxes,
            values,
            labels,
            settings.nms.iou_threshold,
            max(settings.get("score_thr", 0), 0),
            settings.max_per_img,
        )
        *objects, cells = (part[image_index, index] for part in (boxes, values, labels, cells))
        return (*objects, image_index), cells

    def _best(self, level: int, scores: Tensor, distances: Tensor) -> tuple[Tensor, ...]:
        """The best boxes (B, K, 4), scores, labels and cells (all B, K) of one level."""
        head = self.model.bbox_head
        size, classes = scores.shape[-2:], head.cls_out_channels
        flat = scores.permute(0, 2, 3, 1).flatten(1).sigmoid()
        best, index = top_k(flat, head.test_cfg.get("nms_pre", -1))
        labels = index % classes
        cells = torch.div(index, classes, rounding_mode="floor")
        chosen = take(distances.flatten(2).transpose(1, 2), cells)
        return self.boxes(level, cells, chosen, size), best, labels, cells

    def output_axes(self, any_size: bool) -> dict[str, dict[int, str]]:
        """See :meth:`Graph.output_axes`."""
        axes = {name: {0: "objects"} for name in self.output_names}
        if self.masks and any_size:
            axes["mask_logits"] |= {1: "mask_height", 2: "mask_width"}
        return axes


class DenseCandidatesGraph(_OneStageGraph):
    """Graph for every box of every level, before NMS, which :mod:`mmeformer.runtime` does.

    For every level i: ``scores{i}`` (B, H_i * W_i, classes) from 0 to 1 and ``boxes{i}``
    (B, H_i * W_i, 4) in pixels of the input, clipped to the image. If the model has masks,
    ``kernels{i}`` (B, H_i * W_i, num_gen_params) and ``mask_features``
    (B, 2 + num_prototypes, H_0, W_0), from which the runtime computes those of the boxes that it
    chooses; see :mod:`mmeformer.detection.dynamic_masks`.
    """

    extra_inputs: tuple[str, ...] = ("image_size",)

    def __init__(self, model: Any, normalize: nn.Module | None = None) -> None:
        super().__init__(model, normalize)
        kinds = ["scores", "boxes", *["kernels"] * self.masks]
        self.output_names = tuple(f"{kind}{i}" for kind in kinds for i in self.levels)
        self.output_names += ("mask_features",) * self.masks

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
        scores, boxes, others = self._all(image)
        return (*scores, *(clip(own, image_size[:, None]) for own in boxes), *others)

    def _all(self, image: Tensor) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]:
        """Scores of all levels; their boxes, not clipped; and the outputs for masks."""
        scores, boxes = [], []
        maps = self.model.bbox_head(self.model.extract_feat(image))
        for level, (logits, distances) in enumerate(zip(*maps[:2], strict=True)):
            batch, size = logits.shape[0], logits.shape[-2:]
            scores.append(logits.flatten(2).transpose(1, 2).sigmoid())
            rows = distances.flatten(2).transpose(1, 2)
            cells = torch.arange(rows.shape[1], device=rows.device).expand(batch, -1)
            boxes.append(self.boxes(level, cells, rows, size))
        if not self.masks:
            return scores, boxes, ()
        return scores, boxes, (*self.kernels(maps[2]), self.features(maps[3]))

    def output_axes(self, any_size: bool) -> dict[str, dict[int, str]]:
        """See :meth:`Graph.output_axes`."""
        if not any_size:
            return {}
        axes = {name: {0: "batch", 1: f"{name}_cells"} for name in self.output_names}
        if self.masks:
            axes["mask_features"] = {0: "batch", 2: "mask_height", 3: "mask_width"}
        return axes


class FixedCandidatesGraph(DenseCandidatesGraph):
    """The same for targets of one input, ``image``: boxes are not clipped, and have a fixed size.

    The runtime clips the boxes that it chooses.
    """

    extra_inputs = ()

    def run(self, image: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """See :meth:`Graph.run`."""
        scores, boxes, others = self._all(image)
        return (*scores, *boxes, *others)


def _check_supported(model: Any) -> None:
    require(is_dense(model), f"{type(model).__name__} has no head of GFL or RTMDet-Ins")
    head: Any = model.bbox_head
    coder, generator, settings = head.bbox_coder, head.prior_generator, head.test_cfg
    require(
        type(coder) is DistancePointBBoxCoder and coder.clip_border,
        "the bbox_coder is not a DistancePointBBoxCoder that clips to the image",
    )
    masks = type(head) in RTMDET_INS
    kind = MlvlPointGenerator if masks else AnchorGenerator
    require(type(generator) is kind, f"the anchor_generator is not of type {kind.__name__}")
    if masks:
        require(
            head.num_dyconvs == 3, f"bbox_head.num_dyconvs is {head.num_dyconvs}, but must be 3"
        )
        require(
            0 < settings.mask_thr_binary < 1,
            f"test_cfg.mask_thr_binary is {settings.mask_thr_binary}, but must be between 0 and 1",
        )
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
