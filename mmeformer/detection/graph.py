# SPDX-License-Identifier: Apache-2.0
"""mmdet's detectors as graphs: here Mask R-CNN and Faster R-CNN, including NMS and masks."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from mmdet.models import dense_heads
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.roi_heads import StandardRoIHead, mask_heads, roi_extractors
from mmdet.models.task_modules import coders
from mmdet.models.task_modules.coders.delta_xywh_bbox_coder import delta2bbox
from mmengine.config import Config
from torch import Tensor, nn

from mmeformer.deploy import check, samples
from mmeformer.deploy.graphs import Graph, cell_shifts, require, take, top_k
from mmeformer.deploy.metadata import cut_settings, detector_settings
from mmeformer.detection.coder import DeltaXYWHBBoxCoder
from mmeformer.detection.dense_graph import DenseGraph, is_dense
from mmeformer.detection.roi_heads import FCNMaskHead, SingleRoIExtractor
from mmeformer.detection.rpn_head import RPNHead
from mmeformer.detection.suppression import clip, suppress
from mmeformer.runtime import Detections

NO_LIMIT = 2**31 - 1
"""More boxes than any image has."""


class DetectionGraph(Graph):
    """Graph for the boxes and masks of all images of a batch, one image after the other.

    Outputs, for N objects in total, each image's best first: ``boxes`` (N, 4) in pixels of the
    input (left, top, right, bottom edge), ``scores`` (N,), ``labels`` (N,) ``int64``,
    ``image_index`` (N,) ``int64``, and ``masks`` (N, S, S) if the model has masks: probabilities on
    a grid over the box.

    Args:
        model: a two-stage detector with an ``RPNHead`` and a ``StandardRoIHead``.
        normalize: see :class:`Graph`.

    Raises:
        ValueError: the model has other components.
    """

    extra_inputs = ("image_size",)
    compare = staticmethod(check.compare_detections)
    set_prediction = staticmethod(samples.set_instances)

    base_anchors: Tensor

    @classmethod
    def for_model(cls, model: Any) -> type[Graph]:
        """See :meth:`Graph.for_model`: a detector of one stage has a graph of its own."""
        return DenseGraph if is_dense(model) else cls

    def __init__(self, model: Any, normalize: nn.Module | None = None) -> None:
        super().__init__(normalize)
        _check_supported(model)
        self.model = model
        self.output_names = ("boxes", "scores", "labels", "image_index")
        if model.roi_head.with_mask:
            self.output_names += ("masks",)
        levels = range(model.rpn_head.prior_generator.num_levels)
        self.raw_names = tuple(
            f"raw_{kind}{level}" for kind in ("rpn_scores", "rpn_boxes") for level in levels
        )
        anchors = model.rpn_head.prior_generator.base_anchors
        self.register_buffer("base_anchors", torch.stack(list(anchors)))

    def run(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Graph.run`."""
        features = self.model.extract_feat(image)
        rpn_scores, rpn_deltas = self.model.rpn_head(features)
        proposals, valid = self._proposals(rpn_scores, rpn_deltas, image_size)
        outputs = self._objects(features, proposals, valid, image_size)
        return (*outputs, *rpn_scores, *rpn_deltas)

    def _proposals(
        self, all_scores: list[Tensor], all_deltas: list[Tensor], image_size: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Proposals (B, K, 4) and a mask of the valid ones (B, K).

        K is the largest number of proposals of an image, and at least 1, so that no later layer
        gets an empty batch.
        """
        head, settings = self.model.rpn_head, self.model.rpn_head.test_cfg
        level_scores, level_boxes, levels = [], [], []
        for level, (logits, deltas) in enumerate(zip(all_scores, all_deltas, strict=True)):
            size = logits.shape[-2:]
            logits = logits.permute(0, 2, 3, 1).flatten(1)
            deltas = deltas.permute(0, 2, 3, 1).reshape(logits.shape[0], -1, 4)
            shifts = cell_shifts(size, head.prior_generator.strides[level], logits)
            anchors = self.base_anchors[level] + shifts.repeat(1, 2)[:, None]
            best, index = top_k(logits.sigmoid(), settings.get("nms_pre", -1))
            decoded = _decode(
                head.bbox_coder, anchors.flatten(0, 1)[index.flatten()], take(deltas, index)
            )
            level_scores.append(best)
            level_boxes.append(clip(decoded, image_size[:, None]))
            levels.append(torch.full_like(index[0], level))
        scores, boxes = torch.cat(level_scores, 1), torch.cat(level_boxes, 1)
        smallest = (boxes[..., 2:] - boxes[..., :2]).amin(-1)
        scores = torch.where(smallest > settings.get("min_bbox_size", -1), scores, -1)
        image, index = suppress(
            boxes, scores, torch.cat(levels), settings.nms.iou_threshold, -0.5, settings.max_per_img
        )
        # Put the list of all proposals into one row per image.
        counts = (image[:, None] == torch.arange(boxes.shape[0], device=image.device)).sum(0)
        starts = counts.cumsum(0) - counts
        rank = torch.arange(image.shape[0], device=image.device) - starts[image]
        width = counts.amax(0).clamp(min=1)
        slots = (image * width + rank)[:, None]
        total: Any = boxes.shape[0] * width  # a tensor, which a tracer follows
        chosen = boxes[image, index]
        rows = chosen.new_zeros(total, 4).scatter(0, slots.expand(-1, 4), chosen)
        valid = chosen.new_zeros(total).scatter(0, slots[:, 0], torch.ones_like(chosen[:, 0]))
        return rows.view(boxes.shape[0], -1, 4), valid.view(boxes.shape[0], -1) > 0

    def _objects(
        self, features: tuple[Tensor, ...], proposals: Tensor, valid: Tensor, image_size: Tensor
    ) -> tuple[Tensor, ...]:
        head = self.model.roi_head
        settings, bbox_head = head.test_cfg, head.bbox_head
        batch, count = valid.shape
        number = torch.arange(batch, device=valid.device)[:, None].expand(-1, count)
        rois = torch.cat([number[..., None].to(proposals), proposals], -1).flatten(0, 1)
        logits, deltas = bbox_head(_extract(head.bbox_roi_extractor, features, rois))
        classes = bbox_head.num_classes
        scores = logits.softmax(-1)[:, :-1].reshape(batch, -1, classes)
        scores = torch.where(valid[..., None], scores, -1).flatten(1)
        boxes = delta2bbox(
            rois[:, 1:], deltas, bbox_head.bbox_coder.means, bbox_head.bbox_coder.stds
        ).reshape(batch, count, -1, 4)
        boxes = clip(boxes, image_size[:, None, None])
        if bbox_head.reg_class_agnostic:
            boxes = boxes.expand(-1, -1, classes, -1)
        boxes = boxes.reshape(batch, -1, 4)
        labels = torch.arange(classes, device=boxes.device).repeat(count)
        image, index = suppress(
            boxes,
            scores,
            labels,
            settings.nms.iou_threshold,
            settings.score_thr,
            settings.max_per_img if settings.max_per_img > 0 else NO_LIMIT,
        )
        found = boxes[image, index]
        outputs = (found, scores[image, index], labels[index], image)
        if not head.with_mask:
            return outputs
        # Add a dummy region: convolutions of some runtimes reject an empty batch.
        padded = torch.cat([torch.cat([image[:, None].to(found), found], 1), rois[:1]])
        masks = head.mask_head(_extract(head.mask_roi_extractor, features, padded))[:-1]
        if not head.mask_head.class_agnostic:
            masks = masks[torch.arange(index.shape[0], device=index.device), labels[index]]
        else:
            masks = masks[:, 0]
        return (*outputs, masks.sigmoid())

    def output_axes(self, any_size: bool) -> dict[str, dict[int, str]]:
        """See :meth:`Graph.output_axes`."""
        return {name: {0: "objects"} for name in self.output_names}

    @staticmethod
    def settings(config: Config, model: Any) -> dict[str, Any]:
        """See :meth:`Graph.settings`."""
        _check_supported(model)
        test_cfg = config.model.test_cfg.rcnn
        masks = dict(mask_threshold=test_cfg.mask_thr_binary) if model.roi_head.with_mask else {}
        detector = detector_settings(config, model, test_cfg)
        return detector | cut_settings(config, model) | masks

    @staticmethod
    def predict(model: Any, image: Tensor, metainfo: dict[str, Any]) -> Detections:
        """See :meth:`Graph.predict`."""
        return samples.predict_detections(model, image, metainfo)


def _decode(coder: coders.DeltaXYWHBBoxCoder, anchors: Tensor, deltas: Tensor) -> Tensor:
    """Decode ``deltas`` (B, K, 4) against ``anchors`` (B * K, 4), without clipping."""
    # The coder's own method uses another formula during export.
    boxes = delta2bbox(anchors, deltas.flatten(0, 1), coder.means, coder.stds)
    return boxes.view(deltas.shape)


def _extract(
    extractor: roi_extractors.SingleRoIExtractor, features: tuple[Tensor, ...], rois: Tensor
) -> Tensor:
    """Pool features (M, C, S, S) of ``rois`` (M, 5: image index and edges), each from its level."""
    count = extractor.num_inputs
    levels = extractor.map_roi_levels(rois, count)
    rows, pooled = [], []
    for level, (feature, layer) in enumerate(
        zip(features[:count], extractor.roi_layers, strict=True)
    ):
        own = (levels == level).nonzero()[:, 0]
        rows.append(own)
        pooled.append(
            torchvision.ops.roi_align(
                feature,
                rois[own],
                layer.output_size,
                layer.spatial_scale,
                layer.sampling_ratio,
                layer.aligned,
            )
        )
    order = torch.cat(rows)
    back = torch.zeros_like(order).scatter(0, order, torch.arange(order.shape[0]).to(order))
    return torch.cat(pooled)[back]


def _check_supported(model: Any) -> None:
    name = type(model).__name__
    require(
        isinstance(model, TwoStageDetector),
        f"{name} is neither a two-stage detector of mmdet nor GFL nor RTMDet-Ins; only Mask R-CNN, "
        "Faster R-CNN, GFL and RTMDet-Ins can be exported and profiled whole",
    )
    rpn: Any = getattr(model, "rpn_head", None)
    roi: Any = getattr(model, "roi_head", None)
    require(
        type(rpn) in (RPNHead, dense_heads.RPNHead) and rpn.use_sigmoid_cls,
        "the rpn_head is not a plain RPNHead",
    )
    require(type(roi) is StandardRoIHead, "the roi_head is not a StandardRoIHead")
    require(not roi.with_shared_head, "the roi_head has a shared_head")
    for extractor in (roi.bbox_roi_extractor, *([roi.mask_roi_extractor] if roi.with_mask else [])):
        require(
            type(extractor) in (SingleRoIExtractor, roi_extractors.SingleRoIExtractor),
            "a RoI extractor is not a SingleRoIExtractor",
        )
        require(
            all(layer.pool_mode == "avg" for layer in extractor.roi_layers),
            "a RoIAlign has pool_mode other than avg",
        )
    if roi.with_mask:
        require(
            type(roi.mask_head) in (FCNMaskHead, mask_heads.FCNMaskHead),
            "the mask_head is not an FCNMaskHead",
        )
    for part, coder in (("rpn_head", rpn.bbox_coder), ("bbox_head", roi.bbox_head.bbox_coder)):
        require(
            type(coder) in (DeltaXYWHBBoxCoder, coders.DeltaXYWHBBoxCoder)
            and coder.clip_border
            and not coder.add_ctr_clamp,
            f"the bbox_coder of the {part} is not a plain DeltaXYWHBBoxCoder",
        )
    for part, settings in (("rpn", rpn.test_cfg), ("rcnn", roi.test_cfg)):
        require(
            settings.get("nms") is not None
            and settings.nms.get("type", "nms") == "nms"
            and set(settings.nms) <= {"type", "iou_threshold"},
            f"test_cfg.{part}.nms is not a plain nms",
        )
    require(
        rpn.test_cfg.max_per_img > 0,
        f"test_cfg.rpn.max_per_img is {rpn.test_cfg.max_per_img}, with which mmdet loses the worst "
        "proposals; set the largest number of them",
    )
    if roi.with_mask:
        require(
            roi.test_cfg.mask_thr_binary >= 0,
            f"test_cfg.rcnn.mask_thr_binary is {roi.test_cfg.mask_thr_binary}, but masks need a "
            "threshold",
        )
    require(not roi.bbox_head.custom_cls_channels, "the bbox_head has a custom activation")
