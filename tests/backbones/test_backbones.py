# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from golden_weights import golden, image, published_state_dict, relative_error
from helpers import build_backbone
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from tiny import ARCH as TINY
from torch import nn

from mmeformer.backbones import EfficientFormer, EfficientFormerV2
from mmeformer.backbones.base import drop_path_rates
from mmeformer.checkpoints.reference import reference_name
from mmeformer.layers.blocks import LayerScale
from mmeformer.variants import STRIDES, VARIANTS

TOLERANCE = 1e-5


def load_reference(backbone, variant, form):
    """Fill a backbone with the golden weights of a published format."""
    published = published_state_dict(variant.name, form)
    state = {}
    for name, tensor in backbone.state_dict().items():
        key = reference_name(
            name, variant.family, backbone.architecture, downstream=form != "classification"
        )
        if form == "classification" and name.startswith("norms."):
            state[name] = tensor
        else:
            state[name] = published[key].reshape(tensor.shape)
    backbone.load_state_dict(state)


def golden_tolerance(variant):
    """Largest difference from the stored outputs, relative to the largest value.

    The tests compute in float64, because these random weights amplify rounding: float32 results of
    V2-S2 and V2-L move by more than 1e-5 with the number of threads alone. The stored outputs are
    float32 themselves, which puts those of V2-L 1.3e-5 away from the exact ones.
    """
    return 2e-5 if variant.name == "efficientformerv2_l" else TOLERANCE


@torch.no_grad()
def test_golden_classification_stages(variant):
    tolerance = golden_tolerance(variant)
    backbone = build_backbone(variant).eval()
    load_reference(backbone, variant, "classification")
    backbone.norms.clear()
    outputs = backbone.double()(image(224, 224).double())
    wanted = golden(variant.name)
    for stage, output in enumerate(outputs):
        flat = output.flatten(2)[0]
        for name, value in (("mean", flat.mean(1)), ("std", flat.std(1))):
            stored = wanted[f"classification/stage{stage}_{name}"].reshape(-1)
            assert relative_error(value, stored) < tolerance
    assert relative_error(outputs[3], wanted["classification/stage3"]) < tolerance


DOWNSTREAM = {"detection": (25, (128, 160)), "segmentation": (16, (96, 192))}


@pytest.mark.parametrize("form", DOWNSTREAM)
@torch.no_grad()
def test_golden_pyramids_in_matrix_mode(any_variant, form):
    grid, size = DOWNSTREAM[form]
    backbone = build_backbone(any_variant, bias_grid=grid, bias_resize="matrix").eval()
    load_reference(backbone, any_variant, form)
    wanted = golden(any_variant.name)
    for stage, output in enumerate(backbone.double()(image(*size).double())):
        error = relative_error(output, wanted[f"{form}/stage{stage}"])
        assert error < golden_tolerance(any_variant)


def check_pyramid(outputs, widths, size):
    for output, width, stride in zip(outputs, widths, STRIDES, strict=True):
        assert output.shape == (2, width, *(math.ceil(side / stride) for side in size))
        assert output.isfinite().all()


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 96), (95, 161), (224, 100), (319, 32)])
@pytest.mark.parametrize("resize", ["displacement", "matrix"])
@torch.no_grad()
def test_any_size(small_variant, size, resize):
    backbone = build_backbone(small_variant, bias_resize=resize)
    for training in (True, False):
        backbone.train(training)
        check_pyramid(backbone(torch.randn(2, 3, *size)), small_variant.architecture.widths, size)


@torch.no_grad()
def test_shapes_of_every_variant(variant):
    backbone = build_backbone(variant).eval()
    check_pyramid(backbone(torch.randn(2, 3, 70, 45)), variant.architecture.widths, (70, 45))


@pytest.mark.parametrize("scope", ["mmdet", "mmseg", "mmrotate"])
def test_built_by_name_alone(scope):
    registry = pytest.importorskip(f"{scope}.registry").MODELS
    assert isinstance(registry.build(dict(type="mmeformer.EfficientFormer")), EfficientFormer)
    v2 = registry.build(dict(type="mmeformer.EfficientFormerV2", arch="s1"))
    assert isinstance(v2, EfficientFormerV2) and v2.architecture.widths[3] == 224


def test_built_from_mmengine_root():
    assert isinstance(MODELS.build(dict(type="mmeformer.EfficientFormerV2")), EfficientFormerV2)


def test_custom_arch():
    for cls in (EfficientFormer, EfficientFormerV2):
        backbone = cls(TINY)
        check_pyramid(backbone(torch.randn(2, 3, 64, 96)), TINY["widths"], (64, 96))
        wider = cls({**TINY, "mlp_ratios": 2})
        assert count(wider) < count(backbone)


def count(module):
    return sum(p.numel() for p in module.parameters())


def check_gradients(variant, mode):
    backbone = build_backbone(variant, **({} if mode == "plain" else {mode: True})).train()
    # Layer scales start near zero, which would hide a missing path behind rounding.
    for module in backbone.modules():
        if isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, 0.5)
        if hasattr(module, "table"):
            nn.init.normal_(module.table)
    sum(output.square().mean() for output in backbone(torch.randn(2, 3, 64, 64))).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # The bias of a key or of a convolution before a batch norm has, by algebra, no effect.
        if not name.endswith(".bias") and "talking_head" not in name:
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("mode", ["plain", "with_cp", "norm_eval"])
def test_gradients_reach_every_parameter(any_variant, mode):
    check_gradients(any_variant, mode)


def test_checkpointing_changes_no_number(small_variant):
    gradients = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        backbone = build_backbone(small_variant, with_cp=with_cp).train()
        sum(output.mean() for output in backbone(torch.randn(2, 3, 64, 64))).backward()
        gradients.append([p.grad for p in backbone.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_with_cp_keeps_less(small_variant):
    kept = []
    for with_cp in (False, True):
        backbone = build_backbone(small_variant, with_cp=with_cp).train()
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            backbone(torch.randn(1, 3, 96, 96))
        kept.append(sum(sizes))
    assert kept[1] < 0.6 * kept[0]


def test_out_indices(small_variant):
    backbone = build_backbone(small_variant, out_indices=(1, 2)).eval()
    full = build_backbone(small_variant).eval()
    outputs = backbone(torch.randn(1, 3, 64, 64))
    assert [output.shape[1] for output in outputs] == list(small_variant.architecture.widths[1:3])
    assert len(backbone.stages) == 3 and count(backbone) < count(full)
    sum(output.sum() for output in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_have_the_memory_format_of_the_input(small_variant, memory_format, training):
    # mmcv's RoIAlign silently takes any map for a contiguous one.
    backbone = build_backbone(small_variant).train(training)
    image = torch.randn(2, 3, 128, 160).contiguous(memory_format=memory_format)
    for output in backbone(image):
        assert output.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("training", [True, False])
def test_maps_are_channels_last_inside(small_variant, training):
    """Through every block, norm and convolution: one other map and all after it are reordered."""
    backbone = build_backbone(small_variant).train(training)
    others = []

    def look(name):
        def hook(module, inputs, out):
            if isinstance(out, torch.Tensor) and out.dim() == 4:
                if not out.is_contiguous(memory_format=torch.channels_last):
                    others.append(name)

        return hook

    for name, module in backbone.named_modules():
        if name and not name.startswith("norms") and "talking_head" not in name:
            module.register_forward_hook(look(name))
    backbone(torch.randn(2, 3, 96, 160))
    assert not others


@pytest.mark.parametrize("frozen", range(-1, 5))
def test_frozen_stages(small_variant, frozen):
    backbone = build_backbone(small_variant, frozen_stages=frozen).train()
    parts = [("stem", backbone.stem)]
    parts += [(f"stage {i}", stage) for i, stage in enumerate(backbone.stages)]
    for index, (name, part) in enumerate(parts):
        is_frozen = index <= frozen
        assert all(p.requires_grad != is_frozen for p in part.parameters()), name
        assert all(m.training != is_frozen for m in part.modules()), name
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    trainable = [p for p in backbone.parameters() if p.requires_grad]
    if trainable:
        optimizer = torch.optim.SGD(trainable, lr=0.1)
        sum(output.square().mean() for output in backbone(torch.randn(2, 3, 64, 64))).backward()
        optimizer.step()
    for key, value in backbone.state_dict().items():
        if (
            frozen >= 0
            and key.startswith("stem.")
            or key.startswith("stages.")
            and int(key[7]) < frozen
        ):
            assert torch.equal(value, before[key]), key


def test_norm_eval(small_variant):
    images = torch.randn(2, 3, 64, 64)
    for norm_eval in (False, True):
        backbone = build_backbone(small_variant, norm_eval=norm_eval).train()
        mean = backbone.stem.conv1.bn.running_mean
        backbone(images)
        assert (mean.abs().sum() == 0) == norm_eval
        norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(m.training != norm_eval and m.weight.requires_grad for m in norms)
        assert backbone.training


def test_drop_path(small_variant):
    assert drop_path_rates(0.3, (1, 2, 1)) == [
        [0.0],
        [pytest.approx(0.1), pytest.approx(0.2)],
        [pytest.approx(0.3)],
    ]
    images = torch.randn(2, 3, 64, 64)
    backbone = build_backbone(small_variant, drop_path_rate=0.5, layer_scale_init_value=1.0)
    backbone.train()
    assert not torch.equal(backbone(images)[3], backbone(images)[3])
    backbone.eval()
    assert torch.equal(backbone(images)[3], backbone(images)[3])
    default = build_backbone(VARIANTS["efficientformerv2_l"])
    assert default.stages[3].blocks[-1].drop_path.drop_prob == pytest.approx(0.1)


def test_layer_scale_init_value(small_variant):
    gammas = [
        p
        for n, p in build_backbone(small_variant, layer_scale_init_value=0.3).named_parameters()
        if n.endswith("gamma")
    ]
    assert gammas and all((g == 0.3).all() for g in gammas)
    published = build_backbone(VARIANTS["efficientformer_l7"])
    assert published.stages[0].blocks[0].ls1.gamma[0] == 1e-6


def test_bias_grid_and_resize(small_variant):
    backbone = build_backbone(small_variant, bias_grid=(5, 9), bias_resize="matrix")
    tables = {n: tuple(p.shape[1:]) for n, p in backbone.named_parameters() if "table" in n}
    assert set(tables.values()) <= {(5, 9), (10, 18)} and (5, 9) in tables.values()
    assert ((10, 18) in tables.values()) == (small_variant.family == "v2")
    outputs = []
    for resize in ("displacement", "matrix"):
        torch.manual_seed(0)
        backbone = build_backbone(small_variant, bias_resize=resize, layer_scale_init_value=1.0)
        for name, parameter in backbone.named_parameters():
            if "table" in name:
                nn.init.normal_(parameter, std=3)
        outputs.append(backbone.eval()(image(96, 160))[3].detach())
    assert relative_error(*outputs) > 1e-3


def mean_attended_value(backbone, size):
    """What the last attention adds up, where every value is 1 and the softmax is left out."""
    mixer = backbone.stages[3].blocks[-1].token_mixer
    seen = []
    with torch.no_grad():
        for parameter in (*mixer.v.parameters(), *mixer.v_local.parameters()):
            parameter.zero_()
        mixer.v.bn.bias.fill_(1)
        mixer.talking_head2.weight.zero_()
        mixer.talking_head2.bias.fill_(0.01)
        hook = mixer.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        backbone(torch.zeros(1, 3, size, size))
        hook.remove()
    assert seen[0].std() < 1e-6
    return seen[0].mean()


def test_head_bias_keys():
    """The bias behind the softmax counts once per key, or as much as where it was trained."""
    plain, scaled = (
        EfficientFormerV2("s0", head_bias_keys=keys).eval().requires_grad_(False)
        for keys in (None, 49)
    )
    gelu = torch.nn.functional.gelu
    for size, keys in ((224, 49), (320, 100)):
        expected = gelu(torch.tensor(0.01 * keys))
        assert mean_attended_value(plain, size).isclose(expected, rtol=1e-4)
        assert mean_attended_value(scaled, size).isclose(gelu(torch.tensor(0.49)), rtol=1e-4)
    with pytest.raises(ValueError, match="head_bias_keys"):
        EfficientFormerV2("s0", head_bias_keys=0)


def test_init_weights(monkeypatch):
    def dump(self):
        pytest.fail("mmengine prints three lines for each parameter of a backbone alone")

    monkeypatch.setattr(BaseModule, "_dump_init_info", dump)
    backbone = EfficientFormer("l1")
    backbone.init_weights()
    weight = backbone.stages[3].blocks[-1].token_mixer.qkv.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(arch="s9"), "no arch 's9'"),
        (dict(out_indices=(0, 4)), "out_indices"),
        (dict(out_indices=()), "out_indices"),
        (dict(out_indices=(2, 1)), "out_indices"),
        (dict(frozen_stages=5), "frozen_stages"),
        (dict(drop_path_rate=1.0), "drop_path_rate"),
        (dict(bias_grid=0), "bias_grid"),
        (dict(bias_grid=25.0), "bias_grid"),
        (dict(bias_grid=(7, 7, 7)), "bias_grid"),
        (dict(bias_resize="nearest"), "bias_resize"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        EfficientFormerV2(**kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_dtypes(small_variant, dtype):
    backbone = build_backbone(small_variant).eval()
    images = image(64, 96)
    wanted = backbone(images)
    outputs = backbone.to(dtype)(images.to(dtype))
    for output, expected in zip(outputs, wanted, strict=True):
        assert output.dtype == dtype
        assert relative_error(output.float(), expected) < (1e-4 if dtype == torch.float64 else 0.1)


def test_autocast_trains(small_variant):
    backbone = build_backbone(small_variant).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sum(output.float().square().mean() for output in backbone(torch.randn(2, 3, 64, 64)))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in backbone.parameters())


@torch.no_grad()
def test_channels_last_gives_the_same(small_variant):
    backbone = build_backbone(small_variant).eval()
    images = image(96, 64)
    wanted = backbone(images)
    outputs = backbone.to(memory_format=torch.channels_last)(
        images.to(memory_format=torch.channels_last)
    )
    for output, expected in zip(outputs, wanted, strict=True):
        assert relative_error(output, expected) < 1e-4


# V1 compiles in tests/training/test_compile.py as well.
@pytest.mark.parametrize(
    "cls", [pytest.param(EfficientFormer, marks=pytest.mark.slow), EfficientFormerV2]
)
def test_compile_traces_whole(cls):
    # The graph must be one piece, which all kinds of blocks decide and not their number.
    check_graph_is_whole(cls(TINY).eval())


@pytest.mark.slow
def test_compile_traces_published_variants_whole(small_variant):
    check_graph_is_whole(build_backbone(small_variant).eval())


@torch.no_grad()
def check_graph_is_whole(backbone):
    # The compiler behind the trace is not ours to test here.
    torch._dynamo.reset()
    compiled = torch.compile(backbone, fullgraph=True, backend="eager")
    for size in ((64, 64), (64, 96)):
        images = image(*size)
        for output, expected in zip(compiled(images), backbone(images), strict=True):
            assert relative_error(output, expected) < TOLERANCE


@pytest.mark.slow
def test_compile_with_inductor(small_variant):
    backbone = build_backbone(small_variant).train()
    torch._dynamo.reset()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = build_like(backbone, small_variant)(images)
    outputs = torch.compile(backbone, fullgraph=True)(images)
    for output, expected in zip(outputs, wanted, strict=True):
        assert relative_error(output.detach(), expected) < 1e-4
    sum(output.mean() for output in outputs).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def build_like(backbone, variant):
    twin = build_backbone(variant).train()
    twin.load_state_dict(backbone.state_dict())
    return twin


def test_golden_weights_are_what_the_readme_says():
    # Guards the generator: a silent change would make every golden test compare garbage.
    assert np.isclose(float(image(4, 4)[0, 0, 0, 0]), 0.12573022)


@pytest.mark.parametrize("exported", [(64, 96), (80, 112)], ids=["even map", "odd map"])
def test_a_graph_of_torch_export_takes_any_size(exported):
    arch = dict(widths=(8, 16, 24, 32), depths=(1, 1, 2, 2), attention_blocks=(0, 0, 1, 1))
    model = EfficientFormerV2(arch).eval()
    sides = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    graph = torch.export.export(model, (torch.rand(1, 3, *exported),), dynamic_shapes=(sides,))
    for size in ((97, 131), (64, 96), (80, 112)):
        image = torch.rand(1, 3, *size)
        with torch.no_grad():
            for ours, theirs in zip(graph.module()(image), model(image), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
