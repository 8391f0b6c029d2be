# SPDX-License-Identifier: Apache-2.0
"""A GPU computes what the CPU computes. ``pytest -m gpu`` takes three minutes at most."""

import contextlib
import copy

import numpy as np
import pytest
import tiny
import torch
from helpers import build_backbone
from launches import Launches
from mmdet.structures.mask import BitmapMasks
from mmengine.optim import build_optim_wrapper
from samples import random_sample
from trained_like import trained_like

from mmeformer.backbones import EfficientFormer, EfficientFormerV2
from mmeformer.deploy import fold, models
from mmeformer.detection.masks import PackedMasks
from mmeformer.layers import blocks
from mmeformer.training import device as training_device
from mmeformer.training.cuda_graphs import Recorded
from mmeformer.training.hooks import on_host
from mmeformer.training.optim import update_in_few_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
TASKS = ("detection", "segmentation", "rotated")
SIDE = 128


@pytest.fixture(autouse=True)
def exact():
    """Full float32, and kernels that add in a fixed order where there are any."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed
    torch._dynamo.reset()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    theirs = theirs.detach().double().cpu()
    return float((ours.detach().double().cpu() - theirs).abs().max() / theirs.abs().max())


def tiny_backbone(family: str, **kwargs):
    kind = EfficientFormerV2 if family == "v2" else EfficientFormer
    return trained_like(kind(tiny.ARCH, bias_grid=4, **{"drop_path_rate": 0.0, **kwargs}))


def task_model(task: str, **settings):
    config = tiny.network(task)
    if task == "detection":
        # All regions and anchors: which of them are drawn depends on the device.
        config.model.train_cfg.rpn.sampler.num = 10**6
        config.model.train_cfg.rcnn.sampler.num = 10**6
    elif task == "segmentation":
        config.model.decode_head.dropout_ratio = 0
    config.update(settings)
    torch.manual_seed(0)
    return config, trained_like(models.build_model(config)).train()


def batch(task: str) -> dict:
    images = [
        torch.randint(0, 256, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))
        for seed in range(2)
    ]
    return dict(
        inputs=[image.to(torch.uint8) for image in images],
        data_samples=[random_sample(task, 5, SIDE, seed) for seed in range(2)],
    )


def losses_and_gradients(model, task: str, context=contextlib.nullcontext):
    data = model.data_preprocessor(copy.deepcopy(batch(task)), True)
    with context():
        losses = model(**data, mode="loss")
    total, _ = model.parse_losses(losses)
    total.backward()
    return total.detach(), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


@torch.no_grad()
def test_backbones_of_all_variants(variant):
    backbone = trained_like(build_backbone(variant, drop_path_rate=0.0))
    on_gpu = copy.deepcopy(backbone).cuda()
    image = torch.randn(2, 3, 96, 128)
    for training in (False, True):
        pairs = zip(
            on_gpu.train(training)(image.cuda()), backbone.train(training)(image), strict=True
        )
        for ours, theirs in pairs:
            assert ours.is_contiguous()
            assert relative(ours, theirs) < 1e-3


@pytest.mark.parametrize("family", ["v1", "v2"])
@pytest.mark.parametrize("with_cp", [False, True])
def test_gradients_in_double_precision(family, with_cp):
    on_cpu = tiny_backbone(family, with_cp=with_cp).double().train()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    image = torch.randn(2, 3, 96, 128, dtype=torch.double)
    for model, x in ((on_cpu, image), (on_gpu, image.cuda())):
        sum(level.square().mean() for level in model(x)).backward()
    for (name, ours), theirs in zip(on_gpu.named_parameters(), on_cpu.parameters(), strict=True):
        if theirs.grad.abs().max() > 1e-12:  # biases before norms have none
            assert relative(ours.grad, theirs.grad) < 1e-6, name


@pytest.mark.parametrize("task", TASKS)
def test_losses_and_gradients_of_a_step(task):
    _, on_cpu = task_model(task)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    theirs, their_gradients = losses_and_gradients(on_cpu, task)
    ours, gradients = losses_and_gradients(on_gpu, task)
    assert relative(ours, theirs) < 1e-4
    assert set(gradients) == set(their_gradients)
    heads = [name for name in gradients if "head" in name and name.endswith("weight")]
    assert heads
    for name in heads:
        assert relative(gradients[name], their_gradients[name]) < 0.02, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("task", TASKS)
def test_mixed_precision_is_finite_and_near(task, dtype):
    _, model = task_model(task)
    model = model.cuda()
    exact, _ = losses_and_gradients(copy.deepcopy(model), task)
    ours, gradients = losses_and_gradients(model, task, lambda: torch.autocast("cuda", dtype))
    assert relative(ours, exact) < 0.1
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("task", TASKS)
def test_steps_with_our_settings_lower_the_loss(task):
    """Fused optimizer and AMP as `prepare_device` sets them."""
    config, model = task_model(task)
    config.optim_wrapper.type = "AmpOptimWrapper"
    config.optim_wrapper.optimizer.lr = 1e-3
    training_device.prepare_device(config, "none")
    assert config.optim_wrapper.optimizer.fused and config.optim_wrapper.dtype == "bfloat16"
    model = model.cuda()
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    losses = []
    for _ in range(12):
        losses.append(float(model.train_step(copy.deepcopy(batch(task)), wrapper)["loss"]))
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < np.mean(losses[:3])


@pytest.fixture
def any_kernels():
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


class _Cut(Exception):
    """Ends a training before an iteration."""


def cut():
    raise _Cut


@pytest.mark.parametrize("task", tiny.all_tasks())
def test_deterministic_runs_resume_bit_for_bit(task, tmp_path, any_kernels):
    config = tiny.everything(task, tmp_path)
    unbroken = tiny.train(config, tmp_path / "unbroken", deterministic=True)
    with pytest.raises(_Cut):
        tiny.train(config, tmp_path / "cut", at={3: cut}, deterministic=True)
    resumed = tiny.train(config, tmp_path / "cut", "auto", deterministic=True)
    assert sorted(resumed) == [2, 3] and tiny.equal(unbroken, resumed)
    tiny.assert_same_state(tmp_path / "unbroken/iter_4.pth", tmp_path / "cut/iter_4.pth")


@pytest.mark.parametrize("task", TASKS)
def test_predictions(task):
    _, model = task_model(task)
    model = model.eval()
    results = []
    for where in (model, copy.deepcopy(model).cuda(), fold(model).cuda()):
        with torch.no_grad():
            results.append(where.test_step(copy.deepcopy(batch(task))))
    for found in results[1:]:
        for ours, theirs in zip(found, results[0], strict=True):
            if task == "segmentation":
                same = ours.pred_sem_seg.data.cpu() == theirs.pred_sem_seg.data
                assert same.float().mean() > 0.999
            else:
                ours, theirs = ours.pred_instances, theirs.pred_instances
                # Near the thresholds, rounding decides.
                assert abs(len(ours) - len(theirs)) <= 1 + len(theirs) // 50
                count = min(len(ours), len(theirs), 5)
                assert relative(ours.scores[:count], theirs.scores[:count]) < 1e-3


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_compiled_equals_eager(family):
    backbone = tiny_backbone(family).cuda().train()
    compiled = copy.deepcopy(backbone)
    compiled.compile()
    for width in (128, 160):  # the second size compiles for all sizes
        image = torch.randn(2, 3, 96, width, device="cuda")
        backbone.zero_grad(), compiled.zero_grad()
        outputs = backbone(image), compiled(image)
        for ours, theirs in zip(outputs[1], outputs[0], strict=True):
            assert relative(ours, theirs) < 1e-4
        for levels in outputs:
            sum(level.square().mean() for level in levels).backward()
        for (name, ours), theirs in zip(
            compiled.named_parameters(), backbone.parameters(), strict=True
        ):
            if theirs.grad.abs().max() > 1e-5:
                assert relative(ours.grad, theirs.grad) < 5e-3, name


@pytest.mark.parametrize("family", ["v1", "v2"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_cuda_graphs_equal_eager_training(family, dtype, drop_path):
    """Several steps, whose weights and statistics change; another size in between runs eagerly."""
    eager = tiny_backbone(family, drop_path_rate=drop_path).cuda().train()
    recorded = copy.deepcopy(eager)
    recorded.forward = Recorded(recorded)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (eager, recorded)]
    for step, width in enumerate((128, 128, 160, 128)):
        image = torch.randn(2, 3, 96, width, generator=torch.Generator().manual_seed(step)).cuda()
        outputs = []
        for model, optimizer in zip((eager, recorded), optimizers, strict=True):
            optimizer.zero_grad()
            torch.cuda.manual_seed(step)
            if model is recorded:
                model.forward.start_step()
            with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
                levels = model(image)
            outputs.append([level.detach().clone() for level in levels])
            sum(level.float().square().mean() for level in levels).backward()
        for (name, theirs), ours in zip(
            eager.named_parameters(), recorded.parameters(), strict=True
        ):
            if theirs.grad.abs().max() > 1e-4:
                assert relative(ours.grad, theirs.grad) < (0.1 if dtype else 1e-2), name
        for optimizer in optimizers:
            optimizer.step()
        for ours, theirs in zip(outputs[1], outputs[0], strict=True):
            assert ours.dtype == theirs.dtype
            assert relative(ours, theirs) < (0.05 if dtype else 1e-3)
    tensors = recorded.state_dict()
    for name, theirs in eager.state_dict().items():
        if theirs.is_floating_point() and theirs.abs().max() > 1e-3:
            assert relative(tensors[name], theirs) < (0.1 if dtype else 1e-2), name
    recorded.eval()
    with torch.no_grad():
        for ours, theirs in zip(recorded(image), eager.eval()(image), strict=True):
            assert relative(ours, theirs) < 0.1


def test_cuda_graphs_keep_their_tensors():
    """Though caches forget them; a second call in one step keeps the maps of the first."""
    eager = tiny_backbone("v1").cuda().train()
    recorded = copy.deepcopy(eager)
    recorded.forward = Recorded(recorded)
    images = [torch.randn(2, 3, 96, 128, device="cuda") for _ in range(2)]
    recorded(images[0])
    blocks._window.cache_clear()
    torch.cuda.empty_cache()
    for model in (eager, recorded):
        model.zero_grad()
        if model is recorded:
            model.forward.start_step()
        sum(level.square().mean() for image in images for level in model(image)).backward()
    for (name, theirs), ours in zip(eager.named_parameters(), recorded.parameters(), strict=True):
        if theirs.grad.abs().max() > 1e-4:
            assert relative(ours.grad, theirs.grad) < 1e-2, name


def test_a_step_updates_all_parameters_in_few_kernels():
    _, model = task_model("detection")
    model = model.cuda()
    settings = dict(
        optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05, fused=True),
        paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    )
    optimizer = build_optim_wrapper(model, settings).optimizer
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    counts = []
    for prepare in (lambda _: None, update_in_few_kernels):
        prepare(optimizer)
        optimizer.step()
        with Launches() as launches:
            optimizer.step()
        counts.append(launches.operators["_fused_adamw_"])
    assert counts[0] == len(optimizer.param_groups) > 100 and counts[1] == 2


def test_a_forward_pass_never_waits_for_the_gpu():
    for family in ("v1", "v2"):
        backbone = tiny_backbone(family).cuda().eval()
        image = torch.randn(1, 3, 96, 128, device="cuda")
        for mode in (torch.no_grad, contextlib.nullcontext):
            with mode():
                before = backbone(image)
                torch.cuda.set_sync_debug_mode("error")  # a wait raises
                try:
                    levels = backbone(image)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                assert [relative(*pair) < 1e-5 for pair in zip(levels, before, strict=True)] == [
                    True
                ] * 4


def test_weights_are_channels_last_on_the_gpu_only():
    backbone = tiny_backbone("v2")
    weight = backbone.stem.conv2.conv.weight
    assert weight.is_contiguous()
    backbone.cuda()
    assert backbone.stem.conv2.conv.weight is weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_nms_against_its_definition():
    from mmcv.ops import nms

    torch.manual_seed(0)
    corner = torch.rand(400, 2) * 100
    boxes = torch.cat([corner, corner + torch.rand(400, 2) * 40 + 1], 1)
    scores = torch.rand(400)
    kept = []
    for index in scores.argsort(descending=True).tolist():
        x1, y1, x2, y2 = boxes[index].tolist()
        for other in kept:
            a1, b1, a2, b2 = boxes[other].tolist()
            width, height = min(x2, a2) - max(x1, a1), min(y2, b2) - max(y1, b1)
            overlap = max(width, 0) * max(height, 0)
            if overlap / ((x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - overlap) > 0.5:
                break
        else:
            kept.append(index)
    assert nms(boxes.cuda(), scores.cuda(), 0.5)[1].tolist() == kept


def test_roi_align_of_a_plane_is_its_value_at_the_centers_of_the_bins():
    """A linear map makes bilinear samples exact, whatever their number."""
    from mmcv.ops import roi_align

    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(40.0), indexing="ij")
    plane = (2 * columns + 3 * rows)[None, None].cuda()
    roi = torch.tensor([[0, 16.0, 24.0, 72.0, 80.0]]).cuda()
    for layout in (torch.contiguous_format, torch.channels_last):
        maps = plane.expand(1, 8, -1, -1).contiguous(memory_format=layout)
        found = roi_align(maps, roi, 7, 0.25, 0, "avg", True)
        centers = 14 / 7 * (torch.arange(7) + 0.5)
        expected = 2 * (4 + centers - 0.5) + 3 * (6 + centers - 0.5)[:, None]
        torch.testing.assert_close(found[0, 0].cpu(), expected, rtol=1e-5, atol=1e-3)


def test_rotated_nms_equals_the_cpu():
    from mmcv.ops import nms_rotated

    torch.manual_seed(0)
    boxes = torch.cat([torch.rand(600, 2) * 200, torch.rand(600, 2) * 40 + 4], 1)
    boxes = torch.cat([boxes, torch.rand(600, 1) * 3 - 1.5], 1)
    scores = torch.rand(600)
    labels = torch.randint(0, 3, (600,))
    theirs = nms_rotated(boxes, scores, 0.3, labels)[1]
    ours = nms_rotated(boxes.cuda(), scores.cuda(), 0.3, labels.cuda())[1]
    assert ours.tolist() == theirs.tolist()


def test_a_bias_that_the_norm_removes_changes_nothing():
    torch.manual_seed(0)
    layer = trained_like(blocks.ConvNorm(8, 16, 3, act=torch.nn.GELU)).train().cuda()
    plain = copy.deepcopy(layer)
    x = torch.randn(2, 8, 24, 20, device="cuda").to(memory_format=torch.channels_last)
    found = layer(x)
    expected = plain.act(plain.bn(plain.conv(x)))
    assert relative(found, expected) < 1e-5
    found.square().sum().backward()
    expected.square().sum().backward()
    assert relative(layer.conv.weight.grad, plain.conv.weight.grad) < 1e-4
    assert layer.conv.bias.grad.count_nonzero() == 0
    for ours, theirs in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_maps_stay_in_half_precision(variant):
    backbone = tiny_backbone(variant).train().cuda()
    seen = set()
    for stage in backbone.stages:
        for block in stage.blocks:
            block.register_forward_hook(lambda _, inputs, out: seen.add(out.dtype))
    with torch.autocast("cuda", torch.bfloat16):
        backbone(torch.randn(2, 3, SIDE, SIDE, device="cuda"))
    assert seen == {torch.bfloat16}


def test_masks_are_unpacked_on_the_device():
    pixels = np.random.default_rng(0).integers(0, 2, (3, 20, 29), dtype=np.uint8)
    masks = PackedMasks.of(BitmapMasks(pixels, 20, 29)).pad((32, 32))
    on_device = masks.to_tensor(torch.bool, "cuda")
    assert on_device.is_cuda and torch.equal(on_device.cpu(), torch.from_numpy(masks.masks) > 0)


def test_losses_are_read_at_once():
    outputs = {f"loss_{number}": torch.rand(1, device="cuda") for number in range(5)}
    read = on_host(outputs)
    assert all(not value.is_cuda and value == outputs[name].item() for name, value in read.items())
