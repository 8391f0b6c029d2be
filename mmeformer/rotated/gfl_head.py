# SPDX-License-Identifier: Apache-2.0
"""GFL head for rotated boxes."""

from collections.abc import Sequence

import torch
from mmcv.cnn import ConvModule
from mmdet.models.dense_heads import AnchorHead
from mmdet.models.losses import QualityFocalLoss
from mmdet.models.task_modules.prior_generators import anchor_inside_flags
from mmdet.models.utils import multi_apply
from mmdet.structures.bbox import cat_boxes, get_box_tensor
from mmdet.utils import reduce_mean
from mmengine.structures import InstanceData
from mmrotate.structures.bbox import RotatedBoxes
from torch import Tensor, nn

from mmeformer.anchors import AnchorCache, Sizes, level_sizes, valid_indices, valid_sizes
from mmeformer.ops.iou import rotated_iou
from mmeformer.registry import MODELS

from .assigner import RotatedATSSAssigner
from .integral import RotatedIntegral

__all__ = ["RotatedGFLHead"]

_NORM = dict(type="GN", num_groups=32, requires_grad=True)
_ANCHORS = dict(
    type="mmrotate.FakeRotatedAnchorGenerator",
    scales=[4],
    ratios=[1.0],
    strides=[8, 16, 32, 64, 128],
)
_CODER = dict(type="mmeformer.DeltaXYWHTRBBoxCoder", angle_version="le135", proj_xy=True)
_FOCAL = dict(type="mmdet.FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0)
_IOU = dict(type="mmeformer.RotatedIoULoss", mode="log", loss_weight=1.0)
_INIT = dict(
    type="Normal",
    layer="Conv2d",
    std=0.01,
    override=dict(type="Normal", name="gfl_cls", std=0.01, bias_prob=0.01),
)


@MODELS.register_module()
class RotatedGFLHead(AnchorHead):
    """Dense head that predicts rotated boxes as expectations of distributions.

    Two towers of convolutions, shared by all levels, predict class scores and, per location, the
    logits of five distributions: dx, dy, dw, dh and angle relative to one square upright anchor.

    The losses select one of two settings:

    - Published setting of EfficientFormer's DOTA models (default): ``loss_cls`` is a focal loss and
      ``loss_bbox`` the rotated IoU loss, both averaged over the positives; no ``loss_dfl``.
    - Generalized focal loss: ``loss_cls=dict(type="mmdet.QualityFocalLoss", ...)`` learns the IoU
      of the predicted box as score, and box losses are weighted by the predicted score;
      ``loss_dfl=dict(type="mmdet.DistributionFocalLoss", loss_weight=0.25)`` shapes the
      distributions.

    Names and arguments follow mmdet's ``GFLHead`` and mmrotate's ``RotatedRetinaHead``. Losses and
    boxes are computed in float32, also under autocast. Without positives the box losses are 0 and
    all parameters still get a gradient.

    Source: Li et al., "Generalized Focal Loss", NeurIPS 2020.

    Args:
        num_classes: number of classes, without background.
        in_channels: channels of each level of the neck.
        feat_channels: channels of the towers.
        stacked_convs: convolutions per tower.
        conv_cfg: config of the towers' convolutions.
        norm_cfg: config of the towers' norms; default group norm with 32 groups.
        anchor_generator: rotated anchors, one per location; default angle 0, side 4 times the
            stride, strides 8 to 128.
        bbox_coder: coder of five deltas relative to an anchor; default: center offsets
            along the anchor's axes, logarithms of size ratios, angle in le135.
        reg_max: number of intervals of each distribution.
        delta_range: range of dx, dy, dw, dh.
        angle_range: range of the angle in radians.
        loss_cls: sigmoid classification loss.
        loss_bbox: loss of decoded boxes (N, 5) in pixels and radians.
        loss_dfl: loss of the distributions, or None.
        train_cfg: ``assigner``; ``allowed_border``: pixels by which an anchor's center may be
            outside the image, -1 (default) for any number; ``pos_weight``: weight of positives in
            ``loss_cls``, -1 (default) for 1.
        test_cfg: ``nms_pre``, ``min_bbox_size``, ``score_thr``, ``nms``, ``max_per_img``.
        init_cfg: initialization; default normal with std 0.01, and class biases for a prior
            probability of 0.01.

    Raises:
        ValueError: ``loss_cls`` is not a sigmoid loss, or a location has more than one anchor.
    """

    predictor_size = 3
    """Kernel size of the two convolutions behind the towers."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        feat_channels: int = 256,
        stacked_convs: int = 4,
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = _NORM,
        anchor_generator: dict = _ANCHORS,
        bbox_coder: dict = _CODER,
        reg_max: int = 8,
        delta_range: tuple[float, float] = (-2, 2),
        angle_range: tuple[float, float] = (-5, 2),
        loss_cls: dict = _FOCAL,
        loss_bbox: dict = _IOU,
        loss_dfl: dict | None = None,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        init_cfg: dict | list | None = _INIT,
    ) -> None:
        self.stacked_convs = stacked_convs
        self.conv_cfg = conv_cfg
        self.norm_cfg = norm_cfg
        self.reg_max = reg_max
        super().__init__(
            num_classes=num_classes,
            in_channels=in_channels,
            feat_channels=feat_channels,
            anchor_generator=anchor_generator,
            bbox_coder=bbox_coder,
            reg_decoded_bbox=True,
            loss_cls=loss_cls,
            loss_bbox=loss_bbox,
            train_cfg=train_cfg,
            test_cfg=test_cfg,
            init_cfg=init_cfg,
        )
        if not self.use_sigmoid_cls:
            raise ValueError("loss_cls needs use_sigmoid=True: the scores are sigmoids")
        self._anchors = AnchorCache(self.prior_generator)
        self.integral = RotatedIntegral(reg_max, delta_range, angle_range)
        self.loss_dfl = None if loss_dfl is None else MODELS.build(loss_dfl)

    def _init_layers(self) -> None:
        """Build the towers and the two predictors."""
        if self.num_base_priors != 1:
            raise ValueError(
                f"anchor_generator must give one anchor per location, not {self.num_base_priors}"
            )
        self._init_towers()
        size, padding = self.predictor_size, self.predictor_size // 2
        self.gfl_cls = nn.Conv2d(self.feat_channels, self.cls_out_channels, size, padding=padding)
        self.gfl_reg = nn.Conv2d(self.feat_channels, 5 * (self.reg_max + 1), size, padding=padding)

    def _init_towers(self) -> None:
        """Build one tower for classes and one for boxes."""
        self.cls_convs = self._tower()
        self.reg_convs = self._tower()

    def _tower(self) -> nn.Module:
        channels = [self.in_channels] + [self.feat_channels] * self.stacked_convs
        return nn.Sequential(
            *(
                ConvModule(
                    before, after, 3, padding=1, conv_cfg=self.conv_cfg, norm_cfg=self.norm_cfg
                )
                for before, after in zip(channels[:-1], channels[1:], strict=True)
            )
        )

    def forward(self, x: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Compute scores and box distributions of all levels.

        Args:
            x: levels (B, in_channels, H_i, W_i).

        Returns:
            ``cls_scores``, list of logits (B, num_classes, H_i, W_i); ``bbox_preds``, list of
            logits (B, 5 * (reg_max + 1), H_i, W_i).
        """
        return multi_apply(self.forward_single, x)

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute scores and box distributions of one level; shapes as in :meth:`forward`."""
        return self.gfl_cls(self.cls_convs(x)), self.gfl_reg(self.reg_convs(x))

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
            cls_scores, bbox_preds: outputs of :meth:`forward`.
            batch_gt_instances: per image ``bboxes``, RotatedBoxes (G, 5) in pixels and radians, and
                ``labels`` (G,). G may be 0.
            batch_img_metas: per image ``img_shape`` and ``pad_shape``.
            batch_gt_instances_ignore: per image ``bboxes`` to ignore.

        Returns:
            ``loss_cls``, ``loss_bbox`` and, if it is set, ``loss_dfl``; scalars.
        """
        sizes = level_sizes(cls_scores)
        device = cls_scores[0].device
        anchors = cat_boxes(self._anchors(sizes, device))
        # Includes the assigner: mmrotate rotates points by matrix products, which autocast rounds.
        with torch.autocast(device.type, enabled=False):
            labels, label_weights, positive, pos_targets = self.get_targets(
                anchors, sizes, batch_gt_instances, batch_img_metas, batch_gt_instances_ignore
            )
            scores = _flatten(cls_scores)
            num_positive = reduce_mean(scores.new_full((), len(positive))).clamp(min=1)
            # Without positives these are empty, so that losses and gradients are 0.
            logits = _flatten(bbox_preds)[positive]
            pos_anchors = anchors[positive % len(anchors)]
            boxes = get_box_tensor(self.bbox_coder.decode(pos_anchors, self.integral(logits)))

            losses = {}
            cls_targets: Tensor | tuple[Tensor, Tensor]
            if isinstance(self.loss_cls, QualityFocalLoss):
                quality = scores.new_zeros(len(scores))
                quality[positive] = rotated_iou(boxes.detach(), pos_targets)
                cls_targets = (labels, quality)
                weights = scores[positive].detach().sigmoid().amax(1)
            else:
                cls_targets = labels
                weights = scores.new_ones(len(positive))
            losses["loss_cls"] = self.loss_cls(
                scores, cls_targets, weight=label_weights, avg_factor=num_positive
            )
            total_weight = reduce_mean(weights.sum()).clamp(min=1)
            losses["loss_bbox"] = self.loss_bbox(
                boxes, pos_targets, weight=weights, avg_factor=total_weight
            )
            if self.loss_dfl is not None:
                deltas = self.bbox_coder.encode(pos_anchors, RotatedBoxes(pos_targets))
                losses["loss_dfl"] = self.loss_dfl(
                    logits.reshape(-1, self.reg_max + 1),
                    self.integral.to_bins(deltas).flatten(),
                    weight=weights.repeat_interleave(5),
                    avg_factor=5 * total_weight,
                )
        return losses

    def get_targets(
        self,
        anchors: RotatedBoxes,
        sizes: Sizes,
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict],
        batch_gt_instances_ignore: list[InstanceData] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the targets of all anchors of a batch.

        The host waits for the device once, for the number of positives.

        Args:
            anchors: (A, 5), level by level, the same for every image.
            sizes: height and width per level.
            batch_gt_instances, batch_img_metas, batch_gt_instances_ignore: as in
                :meth:`loss_by_feat`.

        Returns:
            ``labels`` (B * A,): class, or ``num_classes`` for background; ``label_weights``
            (B * A,): 0 for anchors that are neither object nor background; ``positive`` (P,):
            indices of the objects among them; ``pos_targets`` (P, 5): their boxes in pixels and
            radians.
        """
        ignores = batch_gt_instances_ignore or [None] * len(batch_img_metas)
        gt_inds = self._assign(anchors, sizes, batch_gt_instances, batch_img_metas, ignores)
        positive = (gt_inds > 0).nonzero().squeeze(1)
        pos_gt_inds = gt_inds[positive] - 1
        labels = torch.full_like(gt_inds, self.num_classes)
        labels[positive] = torch.cat([gts.labels for gts in batch_gt_instances])[pos_gt_inds]
        label_weights = (gt_inds >= 0).float()
        pos_weight = self.train_cfg.get("pos_weight", -1)
        if pos_weight > 0:
            label_weights[positive] = pos_weight
        boxes = torch.cat([get_box_tensor(gts.bboxes) for gts in batch_gt_instances])
        return labels, label_weights, positive, boxes[pos_gt_inds]

    def _assign(
        self,
        anchors: RotatedBoxes,
        sizes: Sizes,
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict],
        ignores: Sequence[InstanceData | None],
    ) -> Tensor:
        """Per anchor of a batch (B * A,) what the assigner says.

        1-based index among the objects of all images, 0 for background, -1 for neither.
        """
        generator, device = self.prior_generator, anchors.tensor.device
        counts = [height * width for height, width in sizes]
        border = self.train_cfg.get("allowed_border", -1)
        valid = [valid_sizes(generator, sizes, meta["pad_shape"]) for meta in batch_img_metas]
        if border < 0 and all(own == sizes for own in valid):
            return self._assign_images(anchors, counts, batch_gt_instances, ignores).flatten()
        # Images that the batch padded, each with its own anchors.
        assigned, before = [], 0
        for own, gts, meta, ignore in zip(
            valid, batch_gt_instances, batch_img_metas, ignores, strict=True
        ):
            inside = valid_indices(generator, sizes, own, device)
            own_counts = [height * width for height, width in own]
            if border >= 0:
                every = torch.ones_like(inside, dtype=torch.bool)
                flags = anchor_inside_flags(anchors[inside], every, meta["img_shape"], border)
                own_counts = torch.stack([f.sum() for f in flags.split(own_counts)]).tolist()
                inside = inside[flags]
            found = self._assign_images(anchors[inside], own_counts, [gts], [ignore])[0]
            gt_inds = found.new_full((len(anchors),), -1)
            gt_inds[inside] = torch.where(found > 0, found + before, found)
            assigned.append(gt_inds)
            before += len(gts)
        return torch.cat(assigned)

    def _assign_images(
        self,
        anchors: RotatedBoxes,
        counts: list[int],
        batch_gt_instances: list[InstanceData],
        ignores: Sequence[InstanceData | None],
    ) -> Tensor:
        """See :meth:`_assign`, for images with the same ``anchors``: (B, A)."""
        if isinstance(self.assigner, RotatedATSSAssigner):
            return self.assigner.assign_batch(anchors, counts, batch_gt_instances, ignores)[0]
        assigned, before = [], 0
        for gts, ignore in zip(batch_gt_instances, ignores, strict=True):
            priors = InstanceData(priors=anchors)
            found = self.assigner.assign(priors, counts, gts, ignore).gt_inds
            assigned.append(torch.where(found > 0, found + before, found))
            before += len(gts)
        return torch.stack(assigned)

    def predict_by_feat(
        self, cls_scores: list[Tensor], bbox_preds: list[Tensor], *args, **kwargs
    ) -> list[InstanceData]:
        """Predict the boxes of a batch, after NMS.

        Args:
            cls_scores, bbox_preds: outputs of :meth:`forward`.
            *args, **kwargs: as in mmdet's ``BaseDenseHead.predict_by_feat``.

        Returns:
            Per image ``bboxes`` (N, 5) in pixels and radians (le135), ``scores`` (N,) and
            ``labels`` (N,), sorted by score.
        """
        with torch.autocast(cls_scores[0].device.type, enabled=False):
            deltas = []
            for logits in bbox_preds:
                batch, _, height, width = logits.shape
                level = self.integral(_flatten([logits]))
                deltas.append(level.reshape(batch, height, width, 5).permute(0, 3, 1, 2))
            cls_scores = [scores.float() for scores in cls_scores]
            return super().predict_by_feat(cls_scores, deltas, *args, **kwargs)


def _flatten(maps: list[Tensor]) -> Tensor:
    """Levels (B, C, H_i, W_i) as float32 rows (B * A, C): by image, level, row, column."""
    rows = [level.permute(0, 2, 3, 1).flatten(1, 2) for level in maps]
    return torch.cat(rows, 1).flatten(0, 1).float()
