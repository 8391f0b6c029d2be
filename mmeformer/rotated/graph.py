# SPDX-License-Identifier: Apache-2.0
"""The rotated GFL detector as a graph. Does not import mmrotate: the model already has."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.structures.bbox import get_box_tensor
from mmengine.config import Config
from torch import Tensor, nn

from mmeformer.deploy import check, samples
from mmeformer.deploy.graphs import Graph, cell_shifts, require, take, top_k
from mmeformer.deploy.metadata import detector_settings
from mmeformer.rotated.scale import training_images
from mmeformer.runtime import RotatedDetections


class _GFLGraph(Graph):
    """Base of both graphs.

    Args:
        model: a detector with a ``RotatedGFLHead``.
        normalize: see :class:`Graph`.

    Raises:
        ValueError: the model has another head.
    """

    compare = staticmethod(check.compare_detections)
    set_prediction = staticmethod(samples.set_instances)

    def __init__(self, model: Any, normalize: nn.Module | None = None) -> None:
        super().__init__(normalize)
        _check_supported(model)
        self.model = model

    @staticmethod
    def settings(config: Config, model: Any) -> dict[str, Any]:
        """See :meth:`Graph.settings`."""
        _check_supported(model)
        images, _ = training_images(config, getattr(model, "dataset_meta", None))
        return dict(
            detector_settings(config, model, config.model.test_cfg),
            patch_size=images.patch_size,
            training_sides=images.sides,
            candidates=max(config.model.test_cfg.get("nms_pre", -1), 0) or None,
        )

    @staticmethod
    def predict(model: Any, image: Tensor, metainfo: dict[str, Any]) -> RotatedDetections:
        """See :meth:`Graph.predict`."""
        return RotatedDetections(*samples.arrays(samples.predict_instances(model, image, metainfo)))


class RotatedGraph(_GFLGraph):
    """Graph for the candidates of all images of a batch, before NMS.

    ONNX has no operator for the overlap of rotated boxes, so :mod:`mmeformer.runtime` does the
    NMS. Outputs, for N candidates in total: ``boxes`` (N, 5), center x and y, width and height in
    pixels of the input and angle in radians (le135, as the model's coder gives it), ``scores``
    (N,), ``labels`` (N,) ``int64`` and ``image_index`` (N,) ``int64``.
    """

    extra_inputs = ("image_size",)
    output_names = ("boxes", "scores", "labels", "image_index")

    anchors: Tensor

    def __init__(self, model: Any, normalize: nn.Module | None = None) -> None:
        super().__init__(model, normalize)
        generator = model.bbox_head.prior_generator
        self.raw_names = tuple(
            f"raw_{kind}{level}"
            for kind in ("scores", "boxes")
            for level in range(generator.num_levels)
        )
        # The anchor of the first cell; all others are shifted by the stride.
        first = generator.grid_priors([(1, 1)] * generator.num_levels, device="cpu")
        self.register_buffer("anchors", torch.cat([get_box_tensor(level) for level in first]))

    def run(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Graph.run`."""
        head = self.model.bbox_head
        maps = head(self.model.extract_feat(image))
        levels = [
            self._level(level, scores, logits, image_size)
            for level, (scores, logits) in enumerate(zip(*maps, strict=True))
        ]
        boxes, scores, labels = (torch.cat(values, 1) for values in zip(*levels, strict=True))
        chosen = scores > head.test_cfg.get("score_thr", 0)
        smallest = head.test_cfg.get("min_bbox_size", -1)
        if smallest >= 0:
            chosen = chosen & (boxes[..., 2:4].amin(-1) > smallest)
        image_index, index = chosen.nonzero().unbind(1)
        found = (values[image_index, index] for values in (boxes, scores, labels))
        return (*found, image_index, *maps[0], *maps[1])

    def output_axes(self, any_size: bool) -> dict[str, dict[int, str]]:
        """See :meth:`Graph.output_axes`."""
        return {name: {0: "objects"} for name in self.output_names}

    def _level(
        self, level: int, scores: Tensor, logits: Tensor, image_size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best boxes (B, K, 5), scores (B, K) and labels (B, K) of one level."""
        head = self.model.bbox_head
        size, classes = scores.shape[-2:], head.cls_out_channels
        nms_pre = head.test_cfg.get("nms_pre", -1)
        best, index = top_k(scores.permute(0, 2, 3, 1).flatten(1).sigmoid(), nms_pre)
        labels = index % classes
        cells = torch.div(index, classes, rounding_mode="floor")
        deltas = head.integral(take(logits.flatten(2).transpose(1, 2), cells).flatten(0, 1))
        shifts = cell_shifts(size, head.prior_generator.strides[level], scores)[cells.flatten()]
        anchors = self.anchors[level].expand(shifts.shape[0], -1)
        anchors = torch.cat([anchors[:, :2] + shifts, anchors[:, 2:]], 1)
        boxes = get_box_tensor(head.bbox_coder.decode(anchors, deltas))
        boxes = boxes.view(cells.shape[0], -1, 5)
        # The coder can clip centers too, but only to an image size known beforehand.
        limit = (image_size.flip(-1) - 1)[:, None]
        centers = torch.minimum(boxes[..., :2].clamp(min=0), limit)
        return torch.cat([centers, boxes[..., 2:]], -1), best, labels


class RotatedCandidatesGraph(_GFLGraph):
    """Graph for every box of every level, for targets without operators to select boxes.

    For every level i: ``scores{i}`` (B, H_i * W_i, classes) from 0 to 1 and ``boxes{i}``
    (B, H_i * W_i, 5) as in :class:`RotatedGraph`, whose centers may lie outside the image;
    :mod:`mmeformer.runtime` chooses the best ones. Inputs have a fixed size.
    """

    def __init__(self, model: Any, normalize: nn.Module | None = None) -> None:
        super().__init__(model, normalize)
        levels = range(model.bbox_head.prior_generator.num_levels)
        self.output_names = tuple(f"{kind}{i}" for kind in ("scores", "boxes") for i in levels)

    def run(self, image: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Graph.run`."""
        head = self.model.bbox_head
        all_scores, all_logits = head(self.model.extract_feat(image))
        sizes = [tuple(map(int, level.shape[-2:])) for level in all_scores]
        anchors = head.prior_generator.grid_priors(sizes, device=image.device)
        scores, boxes = [], []
        for level, (logits, sides) in enumerate(zip(all_scores, all_logits, strict=True)):
            batch = logits.shape[0]
            scores.append(logits.permute(0, 2, 3, 1).flatten(1, 2).sigmoid())
            deltas = head.integral(sides.permute(0, 2, 3, 1).flatten(0, 2))
            priors = get_box_tensor(anchors[level]).repeat(batch, 1)
            decoded = get_box_tensor(head.bbox_coder.decode(priors, deltas))
            boxes.append(decoded.view(batch, -1, 5))
        return (*scores, *boxes)


class RotatedRawGraph(_GFLGraph):
    """Graph for the maps of the head, for targets without operators to select boxes.

    For every level i: ``scores{i}`` (B, classes, H_i, W_i) from 0 to 1 and ``deltas{i}``
    (B, 5, H_i, W_i): expected dx, dy, dw, dh and angle against the level's anchor.
    """

    def __init__(self, model: Any, normalize: nn.Module | None = None) -> None:
        super().__init__(model, normalize)
        levels = range(model.bbox_head.prior_generator.num_levels)
        self.output_names = tuple(f"{kind}{i}" for kind in ("scores", "deltas") for i in levels)

    def run(self, image: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Graph.run`."""
        head = self.model.bbox_head
        scores, logits = head(self.model.extract_feat(image))
        deltas = []
        for level in logits:
            batch, _, height, width = level.shape
            rows = head.integral(level.permute(0, 2, 3, 1).flatten(0, 2))
            deltas.append(rows.view(batch, height, width, 5).permute(0, 3, 1, 2))
        return (*(level.sigmoid() for level in scores), *deltas)


def _check_supported(model: Any) -> None:
    head: Any = getattr(model, "bbox_head", None)
    require(
        type(head).__name__ in ("RotatedGFLHead", "RotatedLiteGFLHead"),
        f"{type(model).__name__} has no RotatedGFLHead",
    )
    require(
        head.test_cfg.nms.get("type") == "nms_rotated"
        and set(head.test_cfg.nms) <= {"type", "iou_threshold"},
        "test_cfg.nms is not a plain nms_rotated",
    )
    require(
        head.test_cfg.max_per_img > 0,
        f"test_cfg.max_per_img is {head.test_cfg.max_per_img}, with which mmdet loses the "
        "worst objects; set the largest number of them",
    )
