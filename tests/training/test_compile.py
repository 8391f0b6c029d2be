# SPDX-License-Identifier: Apache-2.0
"""One line of a config compiles the backbone; many sizes of images need few graphs."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import BaseTTAModel
from torch import nn
from torch._dynamo.backends.registry import lookup_backend, register_backend
from torch._dynamo.testing import CompileCounter

from mmeformer.backbones import EfficientFormer, EfficientFormerV2
from mmeformer.registry import HOOKS
from mmeformer.training import engine

# As docs/finetuning.md says: the first size has a graph of its own, then one for sizes that differ
# in one side, then one for any. Training and evaluation each count for themselves.
GRAPHS_PER_MODE = 3

# PyTorch chooses other kernels for the smallest maps of a single image (and which maps count as
# small depends on the number of threads), so they would have a graph of their own: these are all
# larger.
SIZES = ((352, 384), (384, 352), (416, 352), (352, 448), (448, 384))

# Each next one is larger in both sides, and so is a batch of images of two of them, which spares
# the tests the graph for sizes that differ in one side.
TRAIN_SCALES = [(64, 96), (96, 128), (128, 160), (160, 192)]
TEST_SCALE = (160, 96)
"""Width and height, as pipelines have them."""

GRAPHS: list[SimpleNamespace] = []
"""Graphs that the backends below received, in order."""


def counting(inner):
    def compile_graph(module, inputs):
        names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
        GRAPHS.append(SimpleNamespace(inputs=names, training=torch.is_grad_enabled()))
        return lookup_backend(inner)(module, inputs)

    return compile_graph


# By name, for a config holds text.
for inner in ("eager", "aot_eager", "inductor"):
    register_backend(counting(inner), name=f"counting_{inner}")


@pytest.fixture(autouse=True)
def forgotten():
    """No graph is left over from another test."""
    torch._dynamo.reset()
    GRAPHS.clear()
    yield
    torch._dynamo.reset()


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return (x * self.weight,)


class Detector(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.neck = None

    def predict(self, data):
        return self.backbone(data)

    test_step = predict


class Augmented(BaseTTAModel):
    """The least of a model that averages over views of an image."""

    def merge_preds(self, data_samples_list):
        return data_samples_list


def runner_of(model):
    return SimpleNamespace(model=model, logger=MMLogger.get_instance("test of compile"))


@pytest.mark.parametrize(
    "kind, arch, training",
    [
        pytest.param(EfficientFormer, tiny.ARCH, False, id="EfficientFormer-tiny-False"),
        pytest.param(EfficientFormer, "l1", False, marks=pytest.mark.slow),
        pytest.param(EfficientFormerV2, "s0", True, marks=pytest.mark.slow),
        pytest.param(EfficientFormerV2, "s0", False, marks=pytest.mark.slow),
        pytest.param(EfficientFormer, "l1", True, marks=pytest.mark.slow),
    ],
)
def test_many_sizes_make_few_compilations(kind, arch, training):
    model = Detector(kind(arch, layer_scale_init_value=0.5, drop_path_rate=0.0)).train(training)
    # Not ones: where a map is constant, norms of training divide rounding errors by nearly nothing.
    torch.manual_seed(0)
    images = [torch.randn(1, 3, *size) for size in SIZES]
    plain = [[level.detach() for level in model.backbone(image)] for image in images[:2]]
    counter = CompileCounter()
    hook = HOOKS.build(dict(type="mmeformer.CompileHook", backend=counter))
    hook.before_run(runner_of(model))
    outputs = []
    for image in images:
        outputs.append(model.backbone(image))
        if training:
            sum(level.mean() for level in outputs[-1]).backward()
    # Both sides differ from the first size to the second.
    assert counter.frame_count == 2
    for found, expected in zip(outputs[:2], plain, strict=True):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


class Shapes:
    """Keeps the shapes of the batches of a run."""

    def __init__(self, monkeypatch):
        self.seen = []
        build = engine.Runner.build_model

        def build_and_watch(runner, model):
            built = build(runner, model)
            built.data_preprocessor.register_forward_hook(
                lambda module, args, output: self.seen.append(tuple(output["inputs"].shape))
            )
            return built

        monkeypatch.setattr(engine.Runner, "build_model", build_and_watch)


def varied(task: str, folder) -> Config:
    """The tiny config of a task, with images of many sizes and a validation every 3 iterations."""
    config = tiny.TASKS[task](folder, iterations=6)
    scope = "mmdet." if task == "rotated" else ""
    resize = dict(
        type=f"{scope}RandomChoiceResize",
        scales=TRAIN_SCALES,
        resize_type=f"{scope}Resize",
        keep_ratio=False,
    )
    config.train_dataloader.dataset.pipeline.insert(2, resize)
    test_pipeline = [
        step for step in config.test_dataloader.dataset.pipeline if not step.type.endswith("Resize")
    ]
    test_pipeline.insert(1, dict(type=f"{scope}Resize", scale=TEST_SCALE, keep_ratio=False))
    config.test_dataloader.dataset.pipeline = test_pipeline
    if task == "segmentation":
        # The shipped configs train on crops of one size.
        config.model.data_preprocessor.update(size=None, size_divisor=32)
    # Hardly trained, they shall still find something.
    if task == "detection":
        config.model.test_cfg.rcnn.score_thr = 0.0
    if task == "rotated":
        config.model.test_cfg.score_thr = 0.0
    config.train_cfg.val_interval = 3
    config.default_hooks.checkpoint.update(interval=3, max_keep_ckpts=2)
    return config


def compiled(config: Config, **options) -> Config:
    config = copy.deepcopy(config)
    config.custom_hooks = [*config.custom_hooks, dict(type="mmeformer.CompileHook", **options)]
    return config


def predictions(config: Config, checkpoint, work_dir) -> list[np.ndarray]:
    """Results that `tools/test.py --out` wrote: sorted scores of objects, or maps of labels."""
    config = Config(copy.deepcopy(config).to_dict())
    config.work_dir = str(work_dir)
    out = work_dir / "results.pkl"
    engine.build_test_runner(config, str(checkpoint), out=str(out)).test()
    results = pickle.loads(out.read_bytes())
    if "pred_sem_seg" in results[0]:
        return [result["pred_sem_seg"]["data"].numpy() for result in results]
    return [np.sort(result["pred_instances"]["scores"].numpy())[::-1] for result in results]


def state(checkpoint) -> dict:
    return torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]


def check_task(task, backend, config, folder, shapes):
    """Train, validate, resume and test with the hook and without; compare."""
    hooked = compiled(config, backend=f"counting_{backend}")
    eager = tiny.train(config, folder / "eager")
    shapes.seen.clear()
    losses = tiny.train(hooked, folder / "compiled")
    assert len(set(shapes.seen)) > GRAPHS_PER_MODE

    # Each holds the whole backbone: from the stem to the last stage.
    for graph in GRAPHS:
        assert any("stem" in name for name in graph.inputs)
        assert any("stages_modules_3" in name for name in graph.inputs)
        assert not any("neck" in name or "head_modules" in name for name in graph.inputs)

    assert np.isfinite(list(losses.values())).all()
    assert losses.keys() == eager.keys() == set(range(6))
    # Rounding decides which of two proposals goes first, and so which are sampled.
    np.testing.assert_allclose(losses[0], eager[0], rtol=1e-3 if task == "detection" else 1e-5)
    # Later ones grow apart: Adam's first steps are as large for a gradient that is all rounding.
    np.testing.assert_allclose(list(losses.values()), list(eager.values()), rtol=5e-2)

    last, other = folder / "compiled/iter_6.pth", folder / "eager/iter_6.pth"
    assert list(state(last)) == list(state(other))
    resumed = tiny.train(hooked, folder / "resumed", resume=str(folder / "compiled/iter_3.pth"))
    assert resumed.keys() == {3, 4, 5}
    np.testing.assert_allclose(
        list(resumed.values()), [losses[iteration] for iteration in resumed], rtol=5e-2
    )

    plain = predictions(config, last, folder / "plain test")
    found = predictions(hooked, last, folder / "compiled test")
    assert len(found) == len(plain) == 2 and all(len(one) for one in plain)
    for one, two in zip(found, plain, strict=True):
        if task == "segmentation":
            assert one.shape == two.shape and (one == two).mean() > 0.999
        else:
            np.testing.assert_allclose(one, two, atol=1e-3)
    trained = [graph for graph in GRAPHS if graph.training]
    assert len(trained) == 2
    assert 1 <= len(GRAPHS) - len(trained) <= GRAPHS_PER_MODE


# All tasks compile the same backbone, whose trace takes most of the time.
@pytest.mark.slow
@pytest.mark.parametrize(
    "task, backend",
    [
        ("segmentation", "eager"),
        ("detection", "eager"),
        ("segmentation", "aot_eager"),
        ("rotated", "eager"),
        ("detection", "inductor"),
        ("segmentation", "inductor"),
        ("rotated", "inductor"),
    ],
)
def test_tasks(task, backend, tmp_path, monkeypatch):
    config = varied(task, tmp_path)
    # One block of each kind: attention, attention on a halved map, convolution.
    arch = dict(widths=tiny.ARCH["widths"], depths=(1, 1, 1, 1), attention_blocks=(0, 0, 1, 0))
    config.model.backbone.arch = arch
    if backend == "inductor":
        # It draws random numbers in its own way.
        config.model.backbone.drop_path_rate = 0.0
    check_task(task, backend, config, tmp_path, Shapes(monkeypatch))


def test_model_below_test_time_augmentation_is_compiled():
    model = Augmented(module=Detector(Backbone()))
    HOOKS.build(dict(type="mmeformer.CompileHook", backend="counting_eager")).before_run(
        runner_of(model)
    )
    model.module.test_step(torch.ones(1, 3, 4, 4))
    assert len(GRAPHS) == 1


def test_a_model_without_parts_is_named():
    hook = HOOKS.build(dict(type="mmeformer.CompileHook", parts=["trunk"]))
    with pytest.raises(ValueError, match="trunk"):
        hook.before_run(runner_of(nn.Sequential(nn.Linear(1, 1))))


def test_what_has_no_weights_is_left_alone():
    # Such as an exported file in the place of the model.
    hook = HOOKS.build(dict(type="mmeformer.CompileHook", backend="counting_eager"))
    model = nn.Identity()
    hook.before_run(runner_of(model))
    assert model(torch.ones(1)) == 1 and not GRAPHS
