# SPDX-License-Identifier: Apache-2.0
"""The rotated GFL head: layers, coder, losses, prediction, and that it learns."""

import copy
import math
import warnings

import pytest
import tiny
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from mmrotate.models.task_modules.assigners import RotatedATSSAssigner as MMRotateAssigner
from mmrotate.registry import MODELS as MMROTATE_MODELS
from mmrotate.structures.bbox import QuadriBoxes, RotatedBoxes
from torch import nn

from mmeformer.ops.iou import rotated_iou
from mmeformer.registry import MODELS, TASK_UTILS
from mmeformer.rotated import gfl_head
from mmeformer.rotated.gfl_head import RotatedGFLHead

STRIDES = (8, 16, 32, 64, 128)
TEST_CFG = ConfigDict(
    nms_pre=2000,
    min_bbox_size=0,
    score_thr=0.05,
    nms=dict(type="nms_rotated", iou_threshold=0.1),
    max_per_img=2000,
)
GFL = dict(
    loss_cls=dict(type="mmdet.QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0),
    loss_dfl=dict(type="mmdet.DistributionFocalLoss", loss_weight=0.25),
)
SETTINGS = pytest.mark.parametrize("setting", [{}, GFL], ids=["published", "gfl"])


def build_head(channels=32, seed=0, assigner=None, **overrides):
    torch.manual_seed(seed)
    cfg = dict(
        num_classes=3,
        in_channels=channels,
        feat_channels=32,
        stacked_convs=1,
        norm_cfg=dict(type="GN", num_groups=8),
        train_cfg=dict(assigner=assigner or dict(type="mmeformer.RotatedATSSAssigner", topk=9)),
        test_cfg=TEST_CFG,
    )
    head = RotatedGFLHead(**(cfg | overrides))
    head.init_weights()
    return head


def features(batch=2, size=128, channels=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, channels, math.ceil(size / s), math.ceil(size / s)) for s in STRIDES]
    return tuple(torch.randn(*shape, generator=generator) for shape in shapes)


def objects(boxes=((50, 60, 30, 12, 0.4), (90, 30, 60, 20, 2.2)), labels=(0, 2)):
    return InstanceData(
        bboxes=RotatedBoxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 5)),
        labels=torch.tensor(labels, dtype=torch.long),
    )


def no_objects():
    return objects((), ())


def metas(batch=2, size=128):
    meta = dict(img_shape=(size, size), pad_shape=(size, size), scale_factor=(1.0, 1.0))
    return [dict(meta) for _ in range(batch)]


def cat_anchors(head):
    sizes = [(128 // s, 128 // s) for s in STRIDES]
    levels = head.get_anchors(sizes, metas(1), device="cpu")[0][0]
    return RotatedBoxes(torch.cat([level.tensor for level in levels]))


def total(losses):
    return sum(losses.values())


def test_default_layers_are_those_of_the_published_head():
    head = RotatedGFLHead(num_classes=15, in_channels=256)
    for tower in (head.cls_convs, head.reg_convs):
        assert len(tower) == 4
        for layer in tower:
            assert layer.conv.weight.shape == (256, 256, 3, 3)
            assert layer.conv.bias is None
            assert isinstance(layer.norm, nn.GroupNorm) and layer.norm.num_groups == 32
            assert isinstance(layer.activate, nn.ReLU)
    assert head.gfl_cls.weight.shape == (15, 256, 3, 3)
    assert head.gfl_reg.weight.shape == (45, 256, 3, 3)
    towers = 2 * 4 * (256 * 256 * 9 + 2 * 256)
    assert sum(p.numel() for p in head.parameters()) == towers + 60 * (256 * 9 + 1)


def test_initial_scores_are_the_prior_and_boxes_the_anchors():
    head = build_head()
    cls_scores, bbox_preds = head(features())
    assert torch.cat([s.flatten() for s in cls_scores]).sigmoid().mean().item() == pytest.approx(
        0.01, rel=0.05
    )
    deltas = head.integral(bbox_preds[0].permute(0, 2, 3, 1).reshape(-1, 45))
    torch.testing.assert_close(
        deltas, torch.tensor([[0, 0, 0, 0, -1.5]]).expand_as(deltas), rtol=0, atol=0.4
    )


def test_forward_shapes():
    cls_scores, bbox_preds = build_head(reg_max=4)(features())
    sides = [16, 8, 4, 2, 1]
    assert [tuple(s.shape) for s in cls_scores] == [(2, 3, n, n) for n in sides]
    assert [tuple(p.shape) for p in bbox_preds] == [(2, 25, n, n) for n in sides]


def test_one_upright_square_anchor_per_location():
    anchors, flags = build_head().get_anchors([(4, 3)] * 5, metas(1), device="cpu")
    for level, stride in zip(anchors[0], STRIDES, strict=True):
        x, y, w, h, angle = level.tensor.unbind(1)
        torch.testing.assert_close(x, torch.arange(3.0).repeat(4) * stride)
        torch.testing.assert_close(y, torch.arange(4.0).repeat_interleave(3) * stride)
        assert (w == 4 * stride).all() and (h == 4 * stride).all() and (angle == 0).all()
    assert len(flags[0]) == 5


def test_default_coder_decodes_as_specified():
    """Scalar reference: centre in the anchor's own axes, exponential sizes, angle in le135."""
    coder = TASK_UTILS.build(gfl_head._CODER)
    generator = torch.Generator().manual_seed(0)
    anchors = torch.rand(200, 5, generator=generator) * torch.tensor([500, 500, 60, 60, 6.0]) + 5
    deltas = (torch.rand(200, 5, generator=generator) - 0.5) * torch.tensor([4, 4, 4, 4, 10.0])
    boxes = coder.decode(RotatedBoxes(anchors), deltas).tensor
    for anchor, delta, box in zip(anchors.tolist(), deltas.tolist(), boxes.tolist(), strict=True):
        x, y, w, h, angle = anchor
        dx, dy, dw, dh, turn = delta
        cos, sin = math.cos(angle), math.sin(angle)
        expected = [
            x + dx * w * cos - dy * h * sin,
            y + dx * w * sin + dy * h * cos,
            w * math.exp(dw),
            h * math.exp(dh),
            (angle + turn + math.pi / 4) % math.pi - math.pi / 4,
        ]
        assert box == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert (boxes[:, 4] >= -math.pi / 4).all() and (boxes[:, 4] < 3 * math.pi / 4).all()


def test_default_coder_inverts_itself_and_does_not_overflow():
    coder = TASK_UTILS.build(gfl_head._CODER)
    anchors = RotatedBoxes(torch.tensor([[64.0, 64, 32, 32, 0]]).repeat(2, 1))
    boxes = objects().bboxes
    deltas = coder.encode(anchors, objects().bboxes)
    torch.testing.assert_close(coder.decode(anchors, deltas).tensor, boxes.tensor)
    far = coder.decode(anchors, torch.tensor([[0, 0, 1e4, -1e4, 0]] * 2)).tensor
    assert torch.isfinite(far).all() and (far[:, 2:4] > 0).all()


@SETTINGS
@pytest.mark.parametrize("registry", [MODELS, MMDET_MODELS, MMROTATE_MODELS])
def test_builds_from_the_registries_of_detectors(registry, setting):
    head = registry.build(
        dict(type="mmeformer.RotatedGFLHead", num_classes=2, in_channels=32, **setting)
    )
    assert isinstance(head, RotatedGFLHead)


def reference_losses(head, cls_scores, bbox_preds, batch_gts, batch_metas, gfl):
    """Losses by mmrotate's assigner and plain loops over the anchors, formulas of the papers."""
    assigner = MMRotateAssigner(topk=9, iou_calculator=dict(type="mmrotate.RBboxOverlaps2D"))
    anchors = cat_anchors(head)
    counts = [s.shape[-2] * s.shape[-1] for s in cls_scores]
    points = [torch.linspace(-2, 2, 9)] * 4 + [torch.linspace(-5, 2, 9)]
    classes, weights, box_losses, distribution_losses = 0.0, [], [], []
    for image, gts in enumerate(batch_gts):
        gt_inds = assigner.assign(InstanceData(priors=anchors), counts, gts).gt_inds
        scores = torch.cat([s[image].flatten(1).T for s in cls_scores]).detach()
        logits = torch.cat([p[image].flatten(1).T for p in bbox_preds]).detach()
        for a in range(len(anchors)):
            target = torch.zeros(head.num_classes)
            p = scores[a].sigmoid()
            if gt_inds[a] > 0:
                label = gts.labels[gt_inds[a] - 1]
                gt = gts.bboxes.tensor[gt_inds[a] - 1]
                distributions = logits[a].reshape(5, 9).softmax(1)
                dx, dy, dw, dh, turn = (
                    (distribution * at).sum()
                    for distribution, at in zip(distributions, points, strict=True)
                )
                x, y, w, h, _ = anchors.tensor[a]
                box = torch.stack([x + dx * w, y + dy * h, w * dw.exp(), h * dh.exp(), turn])
                iou = rotated_iou(box, gt)
                target[label] = iou if gfl else 1
                weights.append(p.max() if gfl else 1)
                box_losses.append(-iou.clamp(min=1e-6).log())
                deltas = [(gt[0] - x) / w, (gt[1] - y) / h, (gt[2] / w).log(), (gt[3] / h).log()]
                deltas.append(gt[4] if gt[4] <= 2 else gt[4] - math.pi)
                entropy = 0.0
                for delta, distribution, at in zip(deltas, distributions, points, strict=True):
                    left = int((delta >= at).sum()) - 1
                    share = (delta - at[left]) / (at[left + 1] - at[left])
                    entropy -= (1 - share) * distribution[left].log()
                    entropy -= share * distribution[left + 1].log()
                distribution_losses.append(entropy / 5)
            if gfl:
                modulation = (target - p).abs() ** 2
                classes -= (modulation * (target * p.log() + (1 - target) * (1 - p).log())).sum()
            else:
                classes -= (0.25 * target * (1 - p) ** 2 * p.log()).sum()
                classes -= (0.75 * (1 - target) * p**2 * (1 - p).log()).sum()
    weights, box_losses, distribution_losses = map(
        torch.as_tensor, (weights, box_losses, distribution_losses)
    )
    losses = dict(
        loss_cls=classes / len(weights),
        loss_bbox=(weights * box_losses).sum() / weights.sum(),
    )
    if gfl:
        losses["loss_dfl"] = 0.25 * (weights * distribution_losses).sum() / weights.sum()
    return losses


@SETTINGS
def test_losses_equal_a_plain_loop(setting):
    head = build_head(**setting)
    # Scores of about one half: quality focal loss does not normalise by a weight below 1.
    head.gfl_cls.bias.data.zero_()
    nn.init.normal_(head.gfl_cls.weight, std=0.1)
    nn.init.normal_(head.gfl_reg.weight, std=0.1)
    outs = head(features())
    batch = [objects(), objects(((64, 64, 100, 40, -0.5), (30, 90, 40, 12, 2.3)), (1, 0))]
    losses = head.loss_by_feat(*outs, batch, metas())
    expected = reference_losses(head, *outs, batch, metas(), gfl=setting is GFL)
    assert set(losses) == set(expected)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(float(expected[name]), rel=1e-3), name


def test_averages_are_taken_over_ranks(monkeypatch):
    """A rank with three times its own positives in the mean divides by three times as many."""
    head = build_head()
    outs = head(features(1))
    alone = head.loss_by_feat(*outs, [objects()], metas(1))
    monkeypatch.setattr(gfl_head, "reduce_mean", lambda tensor: 3 * tensor)
    among = head.loss_by_feat(*outs, [objects()], metas(1))
    for name in alone:
        torch.testing.assert_close(among[name], alone[name] / 3)


def train_as_rank(rank, folder):
    """Some steps of DDP on two ranks, of which the second has no objects; saves the weights."""
    torch.distributed.init_process_group("gloo")
    for name, setting in (("focal", {}), ("gfl", GFL)):
        head = build_head(**setting)
        step_on_two_ranks(nn.parallel.DistributedDataParallel(head), rank)
        torch.save(head.state_dict(), folder / f"{name}-{rank}.pth")
    del head
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def step_on_two_ranks(model, rank):
    head = model.module
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        gts = objects() if rank == 0 else no_objects()
        total(head.loss_by_feat(*model(features(1, seed=rank)), [gts], metas(1))).backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.forks
def test_ranks_stay_together_when_one_has_no_objects(tmp_path):
    assert tiny.fork(lambda rank: train_as_rank(rank, tmp_path), 2) == [0, 0]
    for name, setting in (("focal", {}), ("gfl", GFL)):
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pth") for rank in range(2))
        untrained = build_head(**setting).state_dict()
        assert any(not torch.equal(first[key], untrained[key]) for key in first)
        for key, value in first.items():
            assert torch.equal(value, second[key]) and value.isfinite().all(), key


@pytest.mark.parametrize(
    "overrides",
    [
        dict(stacked_convs=2),
        dict(feat_channels=64),
        dict(norm_cfg=None),
        dict(conv_cfg=dict(type="ConvWS")),
        dict(reg_max=16),
        dict(num_classes=4),
        dict(init_cfg=dict(type="Normal", layer="Conv2d", std=0.1)),
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_arguments_of_the_layers_have_an_effect(overrides):
    outs, others = (build_head(**kwargs)(features()) for kwargs in ({}, overrides))
    flat, other = (torch.cat([t.flatten() for maps in o for t in maps]) for o in (outs, others))
    assert flat.shape != other.shape or not torch.allclose(flat, other)


@pytest.mark.parametrize(
    "overrides",
    [
        dict(delta_range=(-1, 2)),
        dict(angle_range=(-4, 2)),
        dict(bbox_coder=dict(type="mmrotate.DeltaXYWHTRBBoxCoder", angle_version="le90")),
        dict(
            anchor_generator=dict(
                type="mmrotate.FakeRotatedAnchorGenerator",
                scales=[6],
                ratios=[1.0],
                strides=STRIDES,
            )
        ),
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_arguments_of_the_boxes_have_an_effect(overrides):
    results = []
    for kwargs in ({}, overrides):
        head = build_head(**kwargs)
        (result,) = head.predict_by_feat(
            *head(features(1)), batch_img_metas=metas(1), cfg=any_score(nms=None)
        )
        results.append(result.bboxes.tensor)
    assert not torch.allclose(*results)


def test_loss_is_an_average_over_images():
    """Twice the same images give the same losses: the sum is divided by all positives."""
    head = build_head()
    single = head.loss_by_feat(*head(features(1)), [objects()], metas(1))
    feats = [torch.cat([level, level]) for level in features(1)]
    double = head.loss_by_feat(*head(tuple(feats)), [objects(), objects()], metas(2))
    for name in single:
        torch.testing.assert_close(single[name], double[name])


def set_distributions(head, cls_scores, bbox_preds, gts):
    """Write perfect boxes into the logits of the positives; returns their mask over anchors."""
    sizes = [tuple(s.shape[-2:]) for s in cls_scores]
    anchors = cat_anchors(head)
    labels, _, indices, targets = head.get_targets(anchors, sizes, [gts], metas(1))
    positive = labels < head.num_classes
    assert torch.equal(positive.nonzero().squeeze(1), indices)
    deltas = head.bbox_coder.encode(anchors[positive], RotatedBoxes(targets))
    bins = head.integral.to_bins(deltas)
    left = bins.floor()
    target = torch.full((len(bins), 5, 9), 1e-9)
    target.scatter_(2, left.long()[..., None], (left + 1 - bins)[..., None].clamp(min=1e-9))
    target.scatter_(2, left.long()[..., None] + 1, (bins - left)[..., None].clamp(min=1e-9))
    flat = torch.cat([p.permute(0, 2, 3, 1).flatten(1, 2) for p in bbox_preds], 1)
    flat[0, positive] = target.log().flatten(1)
    parts = flat.split([h * w for h, w in sizes], 1)
    preds = [
        part.reshape(1, h, w, 45).permute(0, 3, 1, 2)
        for part, (h, w) in zip(parts, sizes, strict=True)
    ]
    return preds, positive


def test_perfect_distributions_have_no_box_loss_and_the_entropy_as_dfl():
    head = build_head(**GFL)
    cls_scores, bbox_preds = ([t.detach() for t in outs] for outs in head(features(1)))
    gts = objects(((50, 60, 30, 12, 0.4), (90, 30, 60, 20, 2.2)), (0, 2))
    random = head.loss_by_feat(cls_scores, bbox_preds, [gts], metas(1))
    perfect_preds, positive = set_distributions(head, cls_scores, bbox_preds, gts)
    perfect = head.loss_by_feat(cls_scores, perfect_preds, [gts], metas(1))
    assert positive.sum() > 5
    assert perfect["loss_bbox"] < 0.02 * random["loss_bbox"]
    assert perfect["loss_dfl"] < 0.5 * random["loss_dfl"]


def test_quality_focal_loss_learns_the_iou():
    """The gradient of the positive's score vanishes where the sigmoid equals the IoU."""
    head = build_head(**GFL)
    cls_scores, bbox_preds = ([t.detach() for t in outs] for outs in head(features(1)))
    gts = objects(((50, 60, 30, 12, 0.4),), (1,))
    perfect_preds, positive = set_distributions(head, cls_scores, bbox_preds, gts)
    # Perfect boxes against a target shifted along itself: IoU 0.6.
    shift = 30 * 0.25
    gts.bboxes.tensor[0, :2] += shift * torch.tensor([math.cos(0.4), math.sin(0.4)])
    head.assigner = FixedAssigner(positive.long())
    signs = []
    for score in (0.5, 0.7):
        scores = [torch.full_like(s, math.log(score / (1 - score))) for s in cls_scores]
        for level in scores:
            level.requires_grad_()
        head.loss_by_feat(scores, perfect_preds, [gts], metas(1))["loss_cls"].backward()
        grad = torch.cat([s.grad[0, 1].flatten() for s in scores])[positive]
        signs.append(grad.sign().unique().tolist())
    assert signs == [[-1.0], [1.0]]


def test_the_iou_is_a_target_and_not_learned_by_the_class_loss():
    head = build_head(**GFL)
    losses = head.loss_by_feat(*head(features(1)), [objects()], metas(1))
    losses["loss_cls"].backward()
    assert head.gfl_reg.weight.grad is None


class FixedAssigner:
    """Gives every image the same assignment."""

    def __init__(self, gt_inds):
        self.gt_inds = gt_inds

    def assign(self, *args):
        return InstanceData(gt_inds=self.gt_inds)


def test_pos_weight_weighs_the_positives_of_the_class_loss():
    outs = build_head()(features(1))
    losses = []
    for weight in (-1, 1, 5):
        head = build_head()
        head.train_cfg["pos_weight"] = weight
        losses.append(head.loss_by_feat(*outs, [objects()], metas(1))["loss_cls"].item())
    assert losses[0] == losses[1] < losses[2]


def counted(head, meta, gts, ignored=None):
    """Mask over the anchors: does the score of the location have a gradient?"""
    scores = [torch.zeros(1, 3, 128 // s, 128 // s, requires_grad=True) for s in STRIDES]
    boxes = [torch.zeros(1, 45, 128 // s, 128 // s) for s in STRIDES]
    ignored = None if ignored is None else [ignored]
    head.loss_by_feat(scores, boxes, [gts], [meta], ignored)["loss_cls"].backward()
    grads = torch.cat([s.grad[0].flatten(1).T for s in scores])
    anchors = head.get_anchors([s.shape[-2:] for s in scores], [meta], device="cpu")[0][0]
    return (grads != 0).all(1), torch.cat([level.centers for level in anchors])


def test_all_anchors_count_by_default():
    mask, _ = counted(build_head(), metas(1)[0], objects())
    assert mask.all()


def test_ignored_anchors_do_not_count():
    head = build_head(
        assigner=dict(type="mmeformer.RotatedATSSAssigner", topk=9, ignore_iof_thr=0.5)
    )
    ignored = InstanceData(bboxes=RotatedBoxes(torch.tensor([[20.0, 100, 100, 60, 0.3]])))
    mask, _ = counted(head, metas(1)[0], objects(), ignored)
    gt_inds = head.assigner.assign(
        InstanceData(priors=cat_anchors(head)), [256, 64, 16, 4, 1], objects(), ignored
    ).gt_inds
    assert (gt_inds == -1).sum() > 20
    assert torch.equal(mask, gt_inds >= 0)


def test_padding_does_not_count():
    meta = metas(1)[0] | dict(pad_shape=(128, 64))
    mask, centers = counted(build_head(), meta, objects(((30, 60, 30, 12, 0.4),), (0,)))
    assert torch.equal(mask, centers[:, 0] < 64)


def test_allowed_border_limits_the_anchors_to_the_image():
    meta = metas(1)[0] | dict(img_shape=(128, 70))
    gts = objects(((30, 60, 30, 12, 0.4),), (0,))
    head = build_head()
    for border, limit in ((-1, 1000), (0, 70), (10, 80)):
        head.train_cfg["allowed_border"] = border
        mask, centers = counted(head, meta, gts)
        assert torch.equal(mask, centers[:, 0] <= limit)


EMPTY_BATCHES = {
    "no image has objects": lambda: [no_objects(), no_objects()],
    "one image has none": lambda: [objects(), no_objects()],
    "all objects too small for a positive": lambda: [
        objects(((50, 50, 0.01, 0.01, 0), (51, 51, 0, 0, 0)), (0, 1)),
        no_objects(),
    ],
    "cropped away, from polygons": lambda: [
        InstanceData(
            bboxes=QuadriBoxes(torch.zeros(0, 8)).convert_to("rbox"),
            labels=torch.zeros(0, dtype=torch.long),
        ),
        no_objects(),
    ],
    "filtered away": lambda: [
        objects()[torch.zeros(2, dtype=torch.bool)],
        objects()[torch.zeros(2, dtype=torch.bool)],
    ],
    "objects without area among others": lambda: [
        objects(((50, 50, 40, 0, 0.3), (50, 50, 0, 0, 0), (70, 70, 30, 20, 1)), (0, 1, 2)),
        objects(((64, 64, 1e4, 1e-3, 0.3), (64, 64, 1e4, 1e4, 0)), (0, 1)),
    ],
    "objects far outside": lambda: [objects(((1e6, -1e6, 30, 20, 0.2),), (0,)), no_objects()],
}


@SETTINGS
@pytest.mark.parametrize("case", list(EMPTY_BATCHES))
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_trains_on_without_nan_when_boxes_are_missing(case, setting, autocast):
    """Finite losses, and a gradient for each parameter as DDP requires."""
    head = build_head(**setting)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            outs = head(features())
            losses = head.loss_by_feat(*outs, EMPTY_BATCHES[case](), metas())
        # Also no division by no positives.
        assert all(0 <= loss < 50 for loss in losses.values()), losses
        total(losses).backward()
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
        optimizer.step()


@SETTINGS
def test_losses_and_boxes_are_float32_under_autocast(setting):
    head = build_head(**setting)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = head(features(1))
        assert outs[0][0].dtype == outs[1][0].dtype == torch.bfloat16
        losses = head.loss_by_feat(*outs, [objects()], metas(1))
        (result,) = head.predict_by_feat(*outs, batch_img_metas=metas(1), cfg=any_score())
    # The same logits without autocast.
    full = [[level.float() for level in maps] for maps in outs]
    for name, loss in head.loss_by_feat(*full, [objects()], metas(1)).items():
        assert losses[name].dtype == torch.float32
        torch.testing.assert_close(losses[name], loss, rtol=0, atol=0)
    (expected,) = head.predict_by_feat(*full, batch_img_metas=metas(1), cfg=any_score())
    assert result.bboxes.tensor.dtype == torch.float32
    assert torch.equal(result.bboxes.tensor, expected.bboxes.tensor)


def test_assigns_without_autocast(monkeypatch):
    """A box border close to an anchor's centre must not be rounded to the other side."""
    head = build_head()
    assign, seen = head.assigner.assign_batch, []

    def recording(*args):
        seen.append(torch.is_autocast_enabled("cpu"))
        return assign(*args)

    monkeypatch.setattr(head.assigner, "assign_batch", recording)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head.loss_by_feat(*head(features(1)), [objects()], metas(1))
    assert seen == [False]


def any_score(**overrides):
    cfg = copy.deepcopy(TEST_CFG)
    cfg.score_thr = 0.0
    cfg.update(overrides)
    return cfg


def test_predicts_the_boxes_of_the_distributions():
    head = build_head()
    cls_scores, bbox_preds = ([t.detach() for t in outs] for outs in head(features(1)))
    gts = objects(((50, 60, 30, 12, 0.4), (90, 30, 60, 20, 2.2)), (0, 2))
    preds, positive = set_distributions(head, cls_scores, bbox_preds, gts)
    # Surest where an object was assigned, otherwise below the threshold.
    flat = torch.full((len(positive), 3), -10.0)
    sizes = [tuple(s.shape[-2:]) for s in cls_scores]
    anchors = cat_anchors(head).tensor
    for index in positive.nonzero().squeeze(1):
        delta = head.integral(
            torch.cat([p.permute(0, 2, 3, 1).flatten(1, 2) for p in preds], 1)[0, index][None]
        )
        box = head.bbox_coder.decode(RotatedBoxes(anchors[index][None]), delta).tensor
        best = rotated_iou(box, gts.bboxes.tensor).argmax()
        flat[index, gts.labels[best]] = 2.0
    parts = flat.split([h * w for h, w in sizes])
    scores = [part.T.reshape(1, 3, h, w) for part, (h, w) in zip(parts, sizes, strict=True)]
    (result,) = head.predict_by_feat(scores, preds, batch_img_metas=metas(1), rescale=True)
    assert isinstance(result.bboxes, RotatedBoxes)
    assert len(result) == 2, "NMS leaves one box per object"
    order = result.labels.argsort()
    assert result.labels[order].tolist() == [0, 2]
    iou = rotated_iou(result.bboxes.tensor[order], gts.bboxes.tensor)
    assert (iou > 0.97).all(), iou
    torch.testing.assert_close(result.scores, torch.full((2,), 2.0).sigmoid())


def test_test_settings_are_respected():
    head = build_head(seed=3)
    nn.init.normal_(head.gfl_cls.weight, std=0.5)
    outs = head(features(1))
    count = {
        name: len(head.predict_by_feat(*outs, batch_img_metas=metas(1), cfg=cfg)[0])
        for name, cfg in dict(
            all=any_score(),
            sure=any_score(score_thr=0.5),
            few=any_score(max_per_img=3),
            few_per_level=any_score(nms_pre=1),
            loose=any_score(nms=dict(type="nms_rotated", iou_threshold=0.9)),
        ).items()
    }
    assert count["few"] == 3
    assert count["few_per_level"] <= 5
    assert count["few_per_level"] < count["all"] < count["loose"]
    assert 0 < count["sure"] < count["all"]
    nothing = head.predict_by_feat(*outs, batch_img_metas=metas(1), cfg=any_score(score_thr=1.0))
    assert len(nothing[0]) == 0 and nothing[0].bboxes.tensor.shape == (0, 5)


def test_rescale_returns_to_the_original_image():
    head = build_head()
    outs = head(features(1))
    (same,) = head.predict_by_feat(*outs, batch_img_metas=metas(1), cfg=any_score())
    scaled = metas(1)
    scaled[0]["scale_factor"] = (0.5, 0.5)
    (double,) = head.predict_by_feat(*outs, batch_img_metas=scaled, cfg=any_score(), rescale=True)
    torch.testing.assert_close(double.bboxes.tensor[:, :4], same.bboxes.tensor[:, :4] * 2)


def test_loss_and_predict_of_data_samples_give_no_warnings():
    """The way a detector calls the head; RotatedBoxes.clip would warn at every call."""
    head = build_head()
    samples = []
    for gts in (objects(), no_objects()):
        sample = DetDataSample(metainfo=metas(1)[0], gt_instances=gts)
        sample.ignored_instances = InstanceData(bboxes=RotatedBoxes(torch.zeros(0, 5)))
        samples.append(sample)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = head.loss(features(), samples)
        results = head.predict(features(), samples, rescale=True)
    assert set(losses) == {"loss_cls", "loss_bbox"}
    assert len(results) == 2


class TinyDetector(nn.Module):
    """Three strided convolutions and two levels, enough to fit one image."""

    def __init__(self, setting):
        super().__init__()
        layers, channels = [], 3
        for width in (16, 32, 32):
            layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.GroupNorm(8, width), nn.ReLU()]
            channels = width
        self.stem = nn.Sequential(*layers)
        self.down = nn.Conv2d(32, 32, 3, 2, 1)
        anchors = dict(
            type="mmrotate.FakeRotatedAnchorGenerator", scales=[4], ratios=[1.0], strides=[8, 16]
        )
        self.head = build_head(anchor_generator=anchors, **setting)

    def forward(self, image):
        fine = self.stem(image)
        return self.head((fine, self.down(fine)))


def draw(boxes, labels, size):
    """One colour per class, filled by the test whether a pixel lies inside the box."""
    pixels = torch.stack(torch.meshgrid(*[torch.arange(size) + 0.5] * 2, indexing="xy"), -1)
    image = torch.zeros(3, size, size)
    for box, label in zip(boxes, labels, strict=True):
        inside = RotatedBoxes(box[None]).find_inside_points(pixels.reshape(-1, 2)).squeeze(1)
        image[label, inside.reshape(size, size)] = 1
    return image[None]


@SETTINGS
def test_overfits_one_image(setting):
    torch.manual_seed(0)
    boxes = (
        (30, 30, 40, 14, 0.5),
        (92, 40, 50, 16, 2.0),
        (45, 95, 36, 24, -0.4),
        (100, 100, 44, 12, 1.2),
    )
    gts = objects(boxes, (0, 1, 2, 0))
    image = draw(gts.bboxes.tensor, gts.labels.tolist(), 128)
    model = TinyDetector(setting)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history = []
    for _ in range(150):
        losses = model.head.loss_by_feat(*model(image), [gts], metas(1))
        optimizer.zero_grad()
        total(losses).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    first, last = history[:5], history[-5:]
    assert sum(sum(h.values()) for h in last) < 0.6 * sum(sum(h.values()) for h in first)
    for name in history[0]:
        assert sum(h[name] for h in last) < sum(h[name] for h in first), name
    model.eval()
    with torch.no_grad():
        (result,) = model.head.predict_by_feat(*model(image), batch_img_metas=metas(1))
    iou = rotated_iou(gts.bboxes.tensor[:, None], result.bboxes.tensor[None])
    iou[gts.labels[:, None] != result.labels[None]] = 0
    # The best boxes of the image are its objects.
    assert (iou[:, :4].amax(1) > 0.5).all(), iou[:, :8]


@pytest.mark.parametrize(
    "overrides,message",
    [
        (dict(loss_cls=dict(type="mmdet.CrossEntropyLoss", use_sigmoid=False)), "use_sigmoid"),
        (
            dict(
                anchor_generator=dict(
                    type="mmrotate.FakeRotatedAnchorGenerator",
                    scales=[4, 5],
                    ratios=[1.0],
                    strides=[8],
                )
            ),
            "one anchor per location, not 2",
        ),
    ],
)
def test_bad_configs_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        build_head(**overrides)
