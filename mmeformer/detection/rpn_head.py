# SPDX-License-Identifier: Apache-2.0
"""Region proposals: losses and proposals of all levels and images at once."""

from typing import Any

import torch
from mmcv.ops import batched_nms
from mmdet.models import dense_heads
from mmdet.models.task_modules.prior_generators import anchor_inside_flags
from mmdet.models.task_modules.samplers import SamplingResult
from mmdet.structures.bbox import get_box_tensor, scale_boxes
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor

from mmeformer.anchors import AnchorCache, Sizes, level_sizes, valid_indices, valid_sizes
from mmeformer.registry import MODELS

__all__ = ["RPNHead"]


@MODELS.register_module()
class RPNHead(dense_heads.RPNHead):
    """``mmdet.RPNHead`` with the losses of the sampled anchors only, in one call for all levels.

    Layers, parameters, targets and proposals are mmdet's, and so are the losses, up to the order of
    their sums and that each is one number instead of one per level. Anchors and proposals are
    float32 under autocast too, where mmdet rounds them to the type of the scores: by up to 4 px of
    1,000 in bfloat16.

    Source: Ren et al., "Faster R-CNN", NeurIPS 2015, section 3.1.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._anchors = AnchorCache(self.prior_generator)

    def loss_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict],
        batch_gt_instances_ignore: list[InstanceData] | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            cls_scores: per level (B, A * classes, H_i, W_i).
            bbox_preds: per level (B, A * 4, H_i, W_i).
            batch_gt_instances: per image ``bboxes`` (G, 4) and ``labels`` (G,), all 0.
            batch_img_metas: per image ``img_shape`` and ``pad_shape``.
            batch_gt_instances_ignore: per image ``bboxes`` to ignore.

        Returns:
            ``loss_rpn_cls`` and ``loss_rpn_bbox``, scalars.

        Raises:
            ValueError: no anchor is valid.
        """
        sizes = level_sizes(cls_scores)
        anchors = torch.cat(self._anchors(sizes, cls_scores[0].device))
        ignores = batch_gt_instances_ignore or [None] * len(batch_img_metas)
        chosen = [
            self._sample(anchors, sizes, *image)
            for image in zip(batch_gt_instances, batch_img_metas, ignores, strict=True)
        ]
        results = [result for result, _, _ in chosen]
        positive = torch.cat([pos + i * len(anchors) for i, (_, pos, _) in enumerate(chosen)])
        negative = torch.cat([neg + i * len(anchors) for i, (_, _, neg) in enumerate(chosen)])
        avg_factor = sum(result.avg_factor for result in results)

        scores = _rows(cls_scores, self.cls_out_channels).flatten(0, 1)
        labels = torch.cat(
            [
                *(result.pos_gt_labels for result in results),
                negative.new_full((len(negative),), self.num_classes),
            ]
        )
        weights = scores.new_ones(len(labels), dtype=torch.float32)
        if self.train_cfg["pos_weight"] > 0:
            weights[: len(positive)] = self.train_cfg["pos_weight"]
        loss_cls = self.loss_cls(
            scores[torch.cat([positive, negative])], labels, weights, avg_factor=avg_factor
        )

        deltas = _rows(bbox_preds, self.bbox_coder.encode_size).flatten(0, 1)[positive]
        priors = torch.cat([result.pos_priors for result in results])
        targets = torch.cat([get_box_tensor(result.pos_gt_bboxes) for result in results])
        if self.reg_decoded_bbox:
            deltas = get_box_tensor(self.bbox_coder.decode(priors, deltas))
        else:
            targets = self.bbox_coder.encode(priors, targets)
        loss_bbox = self.loss_bbox(deltas, targets, avg_factor=avg_factor)
        return dict(loss_rpn_cls=loss_cls, loss_rpn_bbox=loss_bbox)

    def _sample(
        self,
        anchors: Tensor,
        sizes: Sizes,
        gt_instances: InstanceData,
        img_meta: dict,
        gt_instances_ignore: InstanceData | None,
    ) -> tuple[SamplingResult, Tensor, Tensor]:
        """Samples of one image, and the indices of positives and negatives in ``anchors``."""
        generator = self.prior_generator
        valid = valid_sizes(generator, sizes, img_meta["pad_shape"])
        inside = None
        if valid != sizes:
            inside = valid_indices(generator, sizes, valid, anchors.device)
        border = self.train_cfg["allowed_border"]
        if border >= 0:
            inside = torch.arange(len(anchors), device=anchors.device) if inside is None else inside
            every = torch.ones_like(inside, dtype=torch.bool)
            flags = anchor_inside_flags(anchors[inside], every, img_meta["img_shape"], border)
            inside = inside[flags]
        if inside is not None:
            anchors = anchors[inside]
        if len(anchors) == 0:
            raise ValueError(
                f"no anchor is inside the image of {img_meta['img_shape'][:2]} px: set "
                "rpn_head.train_cfg.allowed_border to -1, or check image and anchor sizes"
            )
        priors = InstanceData(priors=anchors)
        assigned = self.assigner.assign(priors, gt_instances, gt_instances_ignore)
        result = self.sampler.sample(assigned, priors, gt_instances)
        if inside is None:
            return result, result.pos_inds, result.neg_inds
        return result, inside[result.pos_inds], inside[result.neg_inds]

    def predict_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        score_factors: list[Tensor] | None = None,
        batch_img_metas: list[dict] | None = None,
        cfg: ConfigDict | None = None,
        rescale: bool = False,
        with_nms: bool = True,
    ) -> list[InstanceData]:
        """Compute the proposals of a batch.

        Args:
            cls_scores, bbox_preds: see :meth:`loss_by_feat`.
            score_factors: not used.
            batch_img_metas: per image ``img_shape``, with ``rescale`` also ``scale_factor``.
            cfg: ``nms_pre``, ``min_bbox_size``, ``nms`` and ``max_per_img``; default ``test_cfg``.
            rescale: whether boxes are in pixels of the original image.
            with_nms: must be true.

        Returns:
            Per image ``bboxes`` (N, 4) in pixels, ``scores`` (N,) and ``labels`` (N,), all 0;
            sorted by score.
        """
        assert with_nms and batch_img_metas is not None
        cfg = self.test_cfg if cfg is None else cfg
        sizes = level_sizes(cls_scores)
        levels = zip(
            cls_scores, bbox_preds, self._anchors(sizes, cls_scores[0].device), strict=True
        )
        best = [self._best(*level, cfg.get("nms_pre", -1)) for level in levels]
        scores, deltas, anchors = (torch.cat(values, 1) for values in zip(*best, strict=True))
        counts = [values.shape[1] for values, _, _ in best]
        level_ids = torch.cat([scores.new_full((n,), i) for i, n in enumerate(counts)])
        boxes = torch.stack(
            [
                get_box_tensor(self.bbox_coder.decode(*image, max_shape=meta["img_shape"]))
                for *image, meta in zip(anchors, deltas, batch_img_metas, strict=True)
            ]
        )
        if rescale:
            boxes = torch.stack(
                [
                    scale_boxes(image, [1 / factor for factor in meta["scale_factor"]])
                    for image, meta in zip(boxes, batch_img_metas, strict=True)
                ]
            )
        # Boxes that are too small come last, and are cut off there: one wait for all images.
        valid = torch.ones_like(scores, dtype=torch.bool)
        if cfg.get("min_bbox_size", -1) >= 0:
            valid = (boxes[..., 2:] - boxes[..., :2] > cfg.min_bbox_size).all(-1)
        order = torch.where(valid, scores, -1).argsort(dim=1, descending=True, stable=True)
        proposals = []
        for index, number, image_boxes, image_scores in zip(
            order, valid.sum(1).tolist(), boxes, scores, strict=True
        ):
            index = index[:number]
            proposals.append(
                _suppress(image_boxes[index], image_scores[index], level_ids[index], cfg)
            )
        return proposals

    def _best(
        self, scores: Tensor, deltas: Tensor, anchors: Tensor, number: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (B, K), offsets (B, K, 4) and anchors (B, K, 4) of one level."""
        # Proposals are inputs of the second stage, not a path for gradients.
        scores = _rows([scores.detach()], self.cls_out_channels).float()
        scores = scores.sigmoid() if self.use_sigmoid_cls else scores.softmax(-1)[..., :-1]
        scores = scores.squeeze(-1)
        deltas = _rows([deltas.detach()], self.bbox_coder.encode_size).float()
        if not 0 < number < scores.shape[1]:
            return scores, deltas, anchors.expand_as(deltas)
        scores, index = scores.topk(number)
        deltas = deltas.gather(1, index[..., None].expand(-1, -1, deltas.shape[2]))
        return scores, deltas, anchors[index]


def _rows(maps: list[Tensor], channels: int) -> Tensor:
    """Levels (B, A * C, H_i, W_i) as rows (B, N, C), by level, row, column and anchor."""
    return torch.cat([m.permute(0, 2, 3, 1).reshape(len(m), -1, channels) for m in maps], 1)


def _suppress(boxes: Tensor, scores: Tensor, levels: Tensor, cfg: Any) -> InstanceData:
    """NMS within each level."""
    if len(boxes):
        kept, keep = batched_nms(boxes, scores, levels, cfg.nms)
        # Soft NMS changes scores.
        boxes, scores = boxes[keep], kept[:, -1]
    boxes, scores = boxes[: cfg.max_per_img], scores[: cfg.max_per_img]
    labels = torch.zeros_like(scores, dtype=torch.long)
    return InstanceData(bboxes=boxes, scores=scores, labels=labels)
