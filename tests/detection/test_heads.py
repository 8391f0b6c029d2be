# SPDX-License-Identifier: Apache-2.0
"""Heads of Mask R-CNN: losses, gradients, proposals and targets equal those of mmdet's."""

import copy

import numpy as np
import pytest
import tiny
import torch
from mmdet.models.detectors import two_stage
from mmdet.models.roi_heads.mask_heads import FCNMaskHead as MMDetMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor as MMDetExtractor
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder as MMDetCoder
from mmdet.models.task_modules.samplers import SamplingResult
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from mmeformer.detection import DeltaXYWHBBoxCoder, FCNMaskHead, SingleRoIExtractor

SIZE = 128


def with_types_of_mmdet(config):
    """The config with the names of mmdet's own classes."""
    if isinstance(config, dict):
        config = {key: with_types_of_mmdet(value) for key, value in config.items()}
        name = str(config.get("type", ""))
        if name.startswith("mmeformer.") and "EfficientFormer" not in name:
            config["type"] = name.removeprefix("mmeformer.")
    return config


def build_pair(change=lambda model: None):
    """Mask R-CNN of the configs, and the same with mmdet's classes; all anchors are sampled."""
    init_default_scope("mmdet")
    model = tiny.network("detection").model
    model.backbone.init_cfg = None
    for stage in (model.train_cfg.rpn, model.train_cfg.rcnn):
        stage.sampler.num = 100_000
    model.train_cfg.rpn_proposal.update(nms_pre=200, max_per_img=60)
    change(model)
    theirs = Config(with_types_of_mmdet(copy.deepcopy(model.to_dict())))
    torch.manual_seed(0)
    pair = MODELS.build(model), MODELS.build(theirs)
    pair[1].load_state_dict(pair[0].state_dict())
    for detector in pair:
        # Spread scores: equal ones may rank in any order.
        for name, parameter in detector.named_parameters():
            if "rpn" in name or "fc_" in name:
                with torch.no_grad():
                    parameter.copy_(
                        0.05 * torch.randn(parameter.shape, generator=torch.manual_seed(len(name)))
                    )
        detector.train()
    types = {type(module).__module__.split(".")[0] for module in pair[1].modules()}
    assert "mmdet" in types and type(pair[0].rpn_head) is not type(pair[1].rpn_head)
    return pair


def image(boxes, ignored=(), shape=(SIZE, SIZE)):
    """One image with rectangular objects, of the padded size ``shape``."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = np.zeros((len(boxes), SIZE, SIZE), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    sample = DetDataSample(
        metainfo=dict(
            img_shape=shape, pad_shape=shape, batch_input_shape=(SIZE, SIZE), scale_factor=(1, 1)
        )
    )
    sample.gt_instances = InstanceData(
        bboxes=boxes, labels=torch.arange(len(boxes)) % 3, masks=BitmapMasks(masks, SIZE, SIZE)
    )
    sample.ignored_instances = InstanceData(
        bboxes=torch.tensor(ignored, dtype=torch.float32).reshape(-1, 4)
    )
    return sample


OBJECTS = [[10, 10, 60, 50], [40, 40, 100, 90], [70, 5, 90, 60]]
BATCHES = {
    "objects": lambda: [image(OBJECTS), image(OBJECTS[:1])],
    "smaller image": lambda: [image(OBJECTS), image([[5, 5, 40, 30]], shape=(64, 96))],
    "no objects in one": lambda: [image(OBJECTS), image([])],
    "no objects": lambda: [image([]), image([])],
    "ignored": lambda: [image(OBJECTS, [[0, 60, 60, 128]]), image(OBJECTS[1:])],
}


def losses_and_gradients(detector, samples):
    torch.manual_seed(1)
    detector.zero_grad()
    losses = detector.loss(torch.randn(2, 3, SIZE, SIZE), samples)
    total, logged = detector.parse_losses(losses)
    total.backward()
    gradients = {n: p.grad for n, p in detector.named_parameters() if p.grad is not None}
    return logged, gradients


def assert_equal_steps(pair, samples):
    (ours, our_gradients), (theirs, their_gradients) = (
        losses_and_gradients(detector, copy.deepcopy(samples)) for detector in pair
    )
    assert set(ours) == set(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert set(our_gradients) == set(their_gradients)
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def pair():
    return build_pair()


@pytest.mark.parametrize("batch", BATCHES)
def test_losses_and_gradients_equal_those_of_mmdet(pair, batch):
    assert_equal_steps(pair, BATCHES[batch]())


def agnostic(model):
    model.roi_head.bbox_head.reg_class_agnostic = True
    model.roi_head.mask_head.class_agnostic = True


def decoded(model):
    for head in (model.rpn_head, model.roi_head.bbox_head):
        head.reg_decoded_bbox = True
        head.loss_bbox = dict(type="GIoULoss", loss_weight=2.0)


def weighted(model):
    model.train_cfg.rpn.pos_weight = 2.0
    model.train_cfg.rcnn.pos_weight = 0.5


def bordered(model):
    model.train_cfg.rpn.allowed_border = 0
    model.train_cfg.rpn.assigner.ignore_iof_thr = 0.5
    model.train_cfg.rcnn.assigner.ignore_iof_thr = 0.5


def softmax(model):
    model.rpn_head.loss_cls.use_sigmoid = False


@pytest.mark.parametrize("change", [agnostic, decoded, weighted, bordered, softmax])
def test_other_settings_too(change):
    pair = build_pair(change)
    for batch in ("ignored", "smaller image"):
        assert_equal_steps(pair, BATCHES[batch]())


def test_proposals_equal_those_of_mmdet(pair):
    samples = BATCHES["smaller image"]()
    metas = [sample.metainfo | dict(scale_factor=(0.5, 2.0)) for sample in samples]
    feats = [torch.randn(2, tiny.WIDTH, SIZE // s, SIZE // s) for s in (4, 8, 16, 32, 64)]
    for options in (
        dict(nms_pre=100, max_per_img=50, min_bbox_size=0),
        dict(nms_pre=-1, max_per_img=1000, min_bbox_size=12),
        dict(nms_pre=100, max_per_img=50, min_bbox_size=1000),
        dict(nms_pre=50, max_per_img=50, nms=dict(iou_threshold=0.3, class_agnostic=True)),
    ):
        cfg = Config(dict(nms=dict(type="nms", iou_threshold=0.7)) | options)
        for rescale in (False, True):
            with torch.no_grad():
                ours, theirs = (
                    detector.rpn_head.predict_by_feat(
                        *detector.rpn_head(feats),
                        batch_img_metas=metas,
                        cfg=cfg,
                        rescale=rescale,
                    )
                    for detector in pair
                )
            for first, second in zip(ours, theirs, strict=True):
                assert len(first) == len(second)
                torch.testing.assert_close(first.bboxes, second.bboxes)
                torch.testing.assert_close(first.scores, second.scores)
                assert first.labels.dtype == torch.long and not first.labels.any()


def test_no_valid_anchor_is_an_error(pair):
    head = copy.deepcopy(pair[0].rpn_head)
    head.train_cfg["allowed_border"] = 0
    samples = [image([], shape=(8, 8))] * 2
    with pytest.raises(ValueError, match="no anchor is inside the image of \\(8, 8\\) px"):
        head.loss_by_feat(
            *head([torch.randn(2, tiny.WIDTH, 128 // s, 128 // s) for s in (4, 8, 16, 32, 64)]),
            [sample.gt_instances for sample in samples],
            [sample.metainfo for sample in samples],
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_step_under_autocast_is_near_that_in_float32(pair, dtype):
    samples = BATCHES["smaller image"]()
    exact, _ = losses_and_gradients(pair[0], copy.deepcopy(samples))
    with torch.autocast("cpu", dtype):
        rounded, gradients = losses_and_gradients(pair[0], samples)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    for name in ("loss_rpn_cls", "loss_rpn_bbox", "loss_mask"):
        torch.testing.assert_close(rounded[name], exact[name], rtol=0.05, atol=1e-3)


def regions(number=40, levels=4):
    start = torch.rand(number, 2) * 60
    size = 2.0 ** (torch.rand(number, 1) * 6 + 1) * (0.5 + torch.rand(number, 2))
    # Of two images; sizes reach all levels but the last one, unless it is asked for.
    rois = torch.cat([torch.randint(0, 2, (number, 1)), start, start + size], 1)
    return rois[size.amax(1) < 8 * 2**levels]


@pytest.mark.parametrize("levels", [3, 4])
@pytest.mark.parametrize("rescale", [None, 1.5])
def test_regions_equal_those_of_mmdet(levels, rescale):
    options = dict(
        roi_layer=dict(type="RoIAlign", output_size=(3, 5), sampling_ratio=0),
        out_channels=4,
        featmap_strides=[4, 8, 16, 32][:levels],
        finest_scale=8,
    )
    rois = regions(levels=levels)
    for chosen in (rois, rois[:0], rois[:1]):
        results = []
        for kind in (SingleRoIExtractor, MMDetExtractor):
            generator = torch.Generator().manual_seed(0)
            feats = [
                torch.randn(2, 4, 128 // s, 128 // s, generator=generator).requires_grad_()
                for s in options["featmap_strides"]
            ]
            pooled = kind(**options)(feats, chosen, rescale)
            (pooled * torch.arange(pooled.numel()).view_as(pooled)).sum().backward()
            results.append((pooled, *(feat.grad for feat in feats)))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


def test_regions_are_not_rounded_under_autocast():
    extractor = SingleRoIExtractor(
        dict(type="RoIAlign", output_size=2, sampling_ratio=0), 1, [4, 8], finest_scale=8
    )
    maps = [torch.arange(400.0).expand(1, 1, 4, 400), torch.arange(200.0).expand(1, 1, 4, 200)]
    rois = torch.tensor([[0, 1001.5, 2, 1009.5, 8], [0, 1203, 2, 1233, 14]])
    exact = extractor(maps, rois)
    low = extractor([feat.bfloat16() for feat in maps], rois)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, rtol=2**-7, atol=0)


def test_coder_equals_that_of_mmdet():
    for means, stds in (([0.0] * 4, [1.0] * 4), ([0.1, 0, -0.1, 0.2], [0.1, 0.1, 0.2, 0.2])):
        start = torch.rand(20, 2) * 50
        anchors = torch.cat([start, start + 5 + torch.rand(20, 2) * 40], 1)
        ours, theirs = (kind(means, stds) for kind in (DeltaXYWHBBoxCoder, MMDetCoder))
        assert torch.equal(
            ours.encode(anchors, anchors.flip(0)), theirs.encode(anchors, anchors.flip(0))
        )
        for classes in (1, 3):
            # Up to beyond the limit of sizes.
            deltas = 4 * torch.randn(20, classes * 4)
            for limit in (None, (40, 60)):
                assert torch.equal(
                    ours.decode(anchors, deltas, limit), theirs.decode(anchors, deltas, limit)
                )
        assert ours.decode(anchors[:0], deltas[:0]).shape == (0, 12)
        torch.testing.assert_close(
            ours.decode(anchors, ours.encode(anchors, anchors.flip(0))), anchors.flip(0)
        )


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("number", [2, 9])
def test_mask_targets_equal_those_of_mmdet(soft, number):
    """With fewer regions than objects, and with more."""
    generator = np.random.default_rng(0)
    masks = BitmapMasks(generator.integers(0, 2, (5, 40, 60)).astype(np.uint8), 40, 60)
    start = torch.rand(number, 2) * 40 - 5
    result = SamplingResult.__new__(SamplingResult)
    result.pos_priors = torch.cat([start, start + 4 + torch.rand(number, 2) * 40], 1)
    result.pos_assigned_gt_inds = torch.arange(number) * 3 % 5
    none = SamplingResult.__new__(SamplingResult)
    none.pos_priors, none.pos_assigned_gt_inds = torch.zeros(0, 4), torch.zeros(0).long()
    cfg = Config(dict(mask_size=7, soft_mask_target=soft))
    batch = [InstanceData(masks=masks), InstanceData(masks=BitmapMasks([], 40, 60))]
    ours, theirs = (
        kind(num_convs=1).get_targets([result, none], batch, cfg)
        for kind in (FCNMaskHead, MMDetMaskHead)
    )
    assert ours.shape == (number, 7, 7) and ours.any()
    assert torch.equal(ours, theirs)


def test_a_checkpoint_of_mmdets_classes_fits(pair):
    assert [*pair[0].state_dict()] == [*pair[1].state_dict()]
    assert isinstance(pair[0], two_stage.TwoStageDetector)
