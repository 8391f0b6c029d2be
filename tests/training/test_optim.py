# SPDX-License-Identifier: Apache-2.0
import pytest
import tiny
import torch
from helpers import build_backbone
from mmengine.optim import build_optim_wrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from torch import nn

from mmeformer.training import engine
from mmeformer.training.optim import (
    join_groups,
    layer_index,
    unused_keys,
    update_in_few_kernels,
)


class Model(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Conv2d(4, 4, 1)


def build(model, **paramwise):
    return build_optim_wrapper(
        model,
        dict(
            type="OptimWrapper",
            optimizer=dict(type="AdamW", lr=0.01, weight_decay=0.05),
            constructor="mmeformer.LayerDecayConstructor",
            paramwise_cfg=paramwise,
        ),
    )


def rates(model, wrapper, key="lr"):
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: g[key] for g in wrapper.optimizer.param_groups for p in g["params"]}


def test_rates_fall_towards_the_input(small_variant):
    model = Model(build_backbone(small_variant))
    found = rates(model, build(model, layer_decay_rate=0.9, norm_decay_mult=0.0))
    assert set(found) == {n for n, _ in model.named_parameters()}
    depths = small_variant.architecture.depths
    total = sum(depths) + 1
    assert found["neck.weight"] == 0.01
    assert found["backbone.stem.conv1.conv.weight"] == pytest.approx(0.01 * 0.9**total)
    last = f"backbone.stages.3.blocks.{depths[3] - 1}.mlp.fc1.conv.weight"
    last = last if last in found else last.replace(".conv.weight", ".weight")
    assert found[last] == pytest.approx(0.01 * 0.9)
    second = "backbone.stages.1.blocks.0.mlp.fc1.conv.weight"
    assert found[second] == pytest.approx(0.01 * 0.9 ** (total - 1 - depths[0]))
    downsample = [n for n in found if n.startswith("backbone.stages.1.downsample")]
    assert downsample and all(found[n] == found[second] for n in downsample)
    # The other rules of mmengine still hold.
    decays = rates(model, build(model, layer_decay_rate=0.9, norm_decay_mult=0.0), "weight_decay")
    assert decays["backbone.stem.conv1.bn.weight"] == 0
    assert decays["backbone.stem.conv1.conv.weight"] == 0.05


def test_rate_one_changes_nothing(small_variant):
    model = Model(build_backbone(small_variant))
    assert set(rates(model, build(model, layer_decay_rate=1.0)).values()) == {0.01}


def test_multiplies_with_other_rules(small_variant):
    model = Model(build_backbone(small_variant))
    wrapper = build(model, layer_decay_rate=0.5, custom_keys={"stem": dict(lr_mult=0.1)})
    total = sum(small_variant.architecture.depths) + 1
    found = rates(model, wrapper)["backbone.stem.conv2.conv.weight"]
    assert found == pytest.approx(0.01 * 0.1 * 0.5**total)


def test_layer_index():
    names = {
        "stem.conv1.bn.bias": 0,
        "stages.0.blocks.1.ls1.gamma": 2,
        "stages.1.downsample.conv.weight": 3,
        "stages.1.blocks.0.ls1.gamma": 3,
        "norms.3.weight": 6,
    }
    for name, index in names.items():
        assert layer_index(name, [2, 3]) == index


@pytest.mark.parametrize("rate", [None, 0.0, 1.5])
def test_bad_rate(small_variant, rate):
    with pytest.raises(ValueError, match="layer_decay_rate"):
        build(Model(build_backbone(small_variant)), layer_decay_rate=rate)


def test_foreign_backbone():
    with pytest.raises(ValueError, match="mmeformer backbone"):
        build(Model(nn.Conv2d(3, 3, 1)), layer_decay_rate=0.5)


# --- adaptive gradient clipping ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["OptimWrapper", "AmpOptimWrapper"])
def test_gradients_are_clipped_by_the_norm_of_their_weights(kind, monkeypatch):
    monkeypatch.setattr(amp_optimizer_wrapper, "is_cuda_available", lambda: True)
    model = nn.Linear(4, 3, bias=False)
    wrapper = build_optim_wrapper(
        model,
        dict(
            type=kind,
            optimizer=dict(type="SGD", lr=1.0),
            constructor="mmeformer.AdaptiveClippingConstructor",
            clip_grad=dict(type="agc", clip_factor=0.1),
        ),
    )
    if kind == "AmpOptimWrapper":
        wrapper.loss_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = model.weight.detach().clone()
    gradient = torch.stack([torch.full((4,), value) for value in (100.0, -3.0, 1e-4)])
    wrapper.update_params((model.weight * gradient).sum())
    step = before - model.weight.detach()
    limit = 0.1 * before.norm(dim=1)
    for row in range(2):  # as long as allowed, in the direction of the gradient
        assert step[row].norm() == pytest.approx(limit[row].item(), rel=1e-4)
        assert torch.nn.functional.cosine_similarity(step[row], gradient[row], 0) > 0.9999
    assert torch.allclose(step[2], gradient[2], rtol=1e-2), "a small gradient stays as it is"


def test_other_clipping_stays_that_of_mmengine():
    settings = dict(
        optimizer=dict(type="SGD", lr=1.0), constructor="mmeformer.AdaptiveClippingConstructor"
    )
    model = nn.Linear(4, 3)
    assert not build_optim_wrapper(model, dict(settings)).clip_grad_kwargs
    wrapper = build_optim_wrapper(model, dict(**settings, clip_grad=dict(max_norm=2)))
    assert wrapper.clip_func is nn.utils.clip_grad_norm_
    with pytest.raises(ValueError, match="clip_factor must be positive"):
        build_optim_wrapper(model, dict(**settings, clip_grad=dict(type="agc", clip_factor=0)))


# --- few kernels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD"])
def test_steps_of_joined_groups_equal_those_of_mmengine(kind):
    """Weights, groups and states stay the same while rates change."""
    settings = dict(
        optimizer=dict(type=kind, lr=0.1, weight_decay=0.05),
        paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, bias_lr_mult=2.0),
    )
    states = []
    for few in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        optimizer = build_optim_wrapper(model, dict(settings)).optimizer
        assert len(optimizer.param_groups) == 6
        if few:
            update_in_few_kernels(optimizer)
            update_in_few_kernels(optimizer)
        for _ in range(4):
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            optimizer.zero_grad()
            model(torch.randn(2, 3, 5, 5)).square().mean().backward()
            optimizer.step()
            assert len(optimizer.param_groups) == 6
        states.append((model.state_dict(), optimizer.state_dict()))
    (weights, state), (others, other) = states
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value)
    assert state["param_groups"] == other["param_groups"]
    assert sorted(state["state"]) == sorted(other["state"])
    for key, values in state["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(other["state"][key][name], value)


def test_groups_join_where_their_settings_are_equal():
    tensors = [torch.zeros(1) for _ in range(4)]
    groups = [
        dict(params=[tensors[0]], lr=0.1, betas=(0.9, 0.99), decay_mult=0.0),
        dict(params=[tensors[1]], lr=0.2, betas=(0.9, 0.99)),
        dict(params=[tensors[2], tensors[3]], lr=0.1, betas=(0.9, 0.99)),
    ]
    joined = join_groups(groups, ["lr", "betas"])
    assert [[id(p) for p in group["params"]] for group in joined] == [
        [id(tensors[0]), id(tensors[2]), id(tensors[3])],
        [id(tensors[1])],
    ]
    assert len(groups[0]["params"]) == 1


def test_settings_may_be_lists():
    """Those of a checkpoint or a file of a config."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    optimizer = torch.optim.AdamW([dict(params=[p]) for p in model.parameters()], lr=0.1)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["betas"] = list(group["betas"])
    optimizer.load_state_dict(state)
    update_in_few_kernels(optimizer)
    model(torch.ones(1, 3, 2, 2)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 4


def test_schedulers_of_pytorch_still_find_a_method():
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    update_in_few_kernels(optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    parameter.sum().backward()
    optimizer.step()
    schedule.step()
    assert parameter.item() == 0 and optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_a_step_sees_joined_groups_and_puts_them_back_after_an_error(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    optimizer = torch.optim.SGD([dict(params=[p]) for p in model.parameters()], lr=0.1)
    seen = []

    def step(closure=None):
        seen.append(len(optimizer.param_groups))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, closure=None: step(closure))
    update_in_few_kernels(optimizer)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert seen == [1] and len(optimizer.param_groups) == 4


def test_unknown_optimizers_stay_as_they_are():
    class Own(torch.optim.AdamW):
        """Might write into its groups."""

    optimizer = Own(nn.Linear(1, 1).parameters())
    update_in_few_kernels(optimizer)
    assert "step" not in vars(optimizer)


def test_trainings_have_such_steps(tmp_path):
    config = tiny.segmentation(tmp_path, iterations=1)
    config.work_dir = str(tmp_path / "run")
    runner = engine.build_train_runner(config)
    runner.train()
    optimizer = runner.optim_wrapper.optimizer
    groups = optimizer.param_groups
    assert len(groups) > 50 and all(group["fused"] for group in groups)
    assert len(join_groups(groups, list(optimizer.defaults))) <= 4
    monitored = []
    optimizer.register_step_pre_hook(lambda own, *_: monitored.append(len(own.param_groups)))
    optimizer.step()
    assert monitored[0] <= 4 and len(optimizer.param_groups) == len(groups)


def test_custom_keys_that_no_parameter_has_are_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    keys = {"0.weight": dict(lr_mult=0.1), "bakbone": dict(lr_mult=0.1)}
    assert unused_keys(model, dict(custom_keys=keys)) == ["bakbone"]
