# SPDX-License-Identifier: Apache-2.0
"""Measure training and prediction on a GPU, as ratios to the usual ways within one run.

    python benchmarks/gpu.py                              # all parts, about 5 minutes on an H100
    python benchmarks/gpu.py --parts training detectors
    python benchmarks/gpu.py --parts detectors --archs s0 --tasks rotated

Prints Markdown and, with ``--out``, writes JSON. Each number is the median of ``--rounds`` timings
between two synchronizations; memory is what the call adds to the allocated memory at its peak. "GPU
ms" is the time of all kernels of one call: where it is far below the time, the GPU waits for the
host to launch them, and a faster processor would help.
Weights are random (norms fit the image), but the same for all ways of one table. Without a GPU all
parts run at small sizes, as a test of this program: such times mean nothing.

Baselines: the reference's way (``benchmarks/reference_way.py``), in the better of both memory
formats; timm's models; ResNet-50 (mmdet's, first stage frozen, norms in evaluation mode) in the
same detector. Goals are shares of the baseline's time.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import fcntl
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import timm
import torch
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import import_modules_from_strings
from random_batches import random_batch
from reference_way import ReferenceWay
from torch import nn
from torch.autograd import DeviceType
from torch.nn.modules.batchnorm import _BatchNorm
from torch.profiler import ProfilerActivity, profile

from mmeformer import configs
from mmeformer.backbones import EfficientFormer, EfficientFormerV2
from mmeformer.deploy import fold
from mmeformer.files import write_text
from mmeformer.synthetic.shapes import write_coco_dataset
from mmeformer.training import device as training_device
from mmeformer.training import engine
from mmeformer.training.cuda_graphs import Recorded
from mmeformer.training.optim import update_in_few_kernels

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BF16, F32 = torch.bfloat16, torch.float32
NAMES = {"s0": "V2-S0", "l1": "V1-L1"}
LAST = torch.channels_last
LAYOUTS = {"reference's way": torch.contiguous_format, "reference's way, channels last": LAST}
# Without a GPU, in place of the published sizes.
TINY = dict(widths=(8, 16, 24, 32), depths=(1, 1, 2, 2), attention_blocks=(0, 0, 1, 1))
RESNET = dict(
    type="mmdet.ResNet",
    depth=50,
    num_stages=4,
    frozen_stages=1,
    norm_eval=True,
    style="pytorch",
)
# Task: configs with S0 and L1, images (H, W), objects per image.
DETECTORS = {
    "detection": ("detection/mask-rcnn_{}_fpn_1x_coco.py", (800, 1344), 10),
    "segmentation": ("segmentation/semantic-fpn_{}_40k_ade20k-512x512.py", (512, 512), 0),
    "rotated": ("rotated/rotated-gfl-le135_{}_fpn_1x_dota.py", (1024, 1024), 30),
}


@dataclass
class Row:
    """One line of the result.

    Attributes:
        part, work: which table, and which baseline within it.
        way: what was measured.
        ms: median time in milliseconds.
        gpu_ms: sum of the times of the kernels of one call; None without a GPU.
        mib: peak memory beyond what was allocated before.
        ratio: of ``ms`` to the baseline of the same work; None for the baseline.
        goal: largest ratio to reach.
        memory_ratio: of ``mib`` likewise.
        compile_s: seconds of the first call of a compiled way.
    """

    part: str
    work: str
    way: str
    ms: float
    mib: float
    gpu_ms: float | None = None
    ratio: float | None = None
    goal: float | None = None
    memory_ratio: float | None = None
    compile_s: float | None = None


@dataclass
class Request:
    """A call to time; fields as in :class:`Row`."""

    part: str
    work: str
    way: str
    call: Callable[[], object]
    goal: float | None = None
    compiled: bool = False
    baseline: bool = False


class Bench:
    """Collects what is to be measured, compiles, then measures one after the other.

    Args:
        rounds: timings per call.
        archs, tasks: the backbones and tasks to measure.
    """

    def __init__(self, rounds: int, archs: list[str], tasks: list[str]) -> None:
        self.rounds = rounds
        self.archs = archs
        self.tasks = tasks
        self.requests: list[Request] = []
        self.others: list[Callable[[], None]] = []
        self.rows: list[Row] = []
        self.compile_s: dict[int, float] = {}

    def measure(self, *args, **kwargs) -> None:
        """Ask for a measurement; arguments are those of :class:`Request`."""
        self.requests.append(Request(*args, **kwargs))

    def compile(self) -> None:
        """Call what compiles once."""
        torch._dynamo.config.recompile_limit = 64
        for request in self.requests:
            if request.compiled:
                started = time.perf_counter()
                request.call()
                synchronize()
                seconds = time.perf_counter() - started
                self.compile_s[id(request)] = seconds
                name = f"{request.part}, {request.work}, {request.way}"
                print(f"{name}: compiled in {seconds:.1f} s", flush=True)
                free()

    def run(self) -> None:
        """Measure everything."""
        for request in self.requests:
            self._time(request)
            free()
        for other in self.others:
            other()

    def _time(self, request: Request) -> None:
        for _ in range(3 if GPU else 1):
            request.call()
        synchronize()
        before = torch.cuda.memory_allocated() if GPU else 0
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(self.rounds):
            synchronize()
            started = time.perf_counter()
            request.call()
            synchronize()
            times.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated() - before if GPU else 0
        self.add(
            Row(
                request.part,
                request.work,
                request.way,
                1e3 * statistics.median(times),
                peak / 2**20,
                kernel_time(request.call) if GPU else None,
                goal=request.goal,
                compile_s=self.compile_s.get(id(request)),
            ),
            request.baseline,
        )

    def add(self, row: Row, baseline: bool = False) -> None:
        """Compare with the fastest baseline of the same part and work."""
        bases = [
            other
            for other in self.rows
            if (other.part, other.work, other.ratio) == (row.part, row.work, None)
        ]
        if not baseline and bases:
            best = min(bases, key=lambda other: other.ms)
            row.ratio = row.ms / best.ms
            row.memory_ratio = row.mib / best.mib if best.mib else None
        self.rows.append(row)
        print(f"{row.part}, {row.work}, {row.way}: {row.ms:.2f} ms, {row.mib:.0f} MiB", flush=True)


def synchronize() -> None:
    """Wait for the GPU."""
    if GPU:
        torch.cuda.synchronize()


def kernel_time(call: Callable[[], object]) -> float:
    """Milliseconds of all kernels of a call."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize()
    events = profiler.events() or []
    kernels = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return sum(event.device_time_total for event in kernels) / 1e3


def autocast(dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision, or nothing for float32."""
    return contextlib.nullcontext() if dtype is F32 else torch.autocast(DEVICE, dtype)


def compiled(model: nn.Module, **options) -> nn.Module:
    """Compile a module in place, for fixed sizes; without a GPU with a backend without compiler."""
    model.compile(dynamic=False, **(options if GPU else dict(backend="aot_eager")))
    return model


def build(arch: str, image: torch.Tensor | None = None, **kwargs) -> nn.Module:
    """A backbone on the device, with the same random weights for the same arch and bias grid.

    With an image, its norms get the statistics of that image, as in a trained network.
    """
    torch.manual_seed(0)
    kwargs = dict(layer_scale_init_value=0.5, drop_path_rate=0.0, **kwargs)
    size = arch if GPU else TINY
    if arch == "s0":
        backbone = EfficientFormerV2(size, head_bias_keys=49, **kwargs)
    else:
        backbone = EfficientFormer(size, **kwargs)
    backbone = backbone.to(DEVICE).train()
    if image is not None:
        fit_norms(backbone, image)
    return backbone


def fit_norms(backbone: nn.Module, image: torch.Tensor) -> None:
    """Give batch norms the statistics of an image: with others, random maps would grow."""
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    modes = {module: module.training for module in backbone.modules()}
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        backbone(image)
    for module, mode in modes.items():
        module.training = mode
    for norm in norms:
        norm.momentum = 0.1


def grid(size: tuple[int, int]) -> tuple[int, int]:
    """Cells at stride 32: no bias is resized, as in our configs."""
    return (max(1, size[0] // 32), max(1, size[1] // 32))


def step_of(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward pass of a backbone, with gradients such as a neck's."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(dtype):
            levels = model(images)
        torch.autograd.backward(levels, [torch.full_like(level, 1e-3) for level in levels])

    return step


def prediction_of(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> Callable:
    """Forward pass without gradients."""

    def predict():
        with torch.inference_mode(), autocast(dtype):
            return model(images)

    return predict


def training(bench: Bench) -> None:
    """Training steps of the backbones, 4 x 800 x 1344."""
    shape = (4, 3, 800, 1344) if GPU else (1, 3, 64, 96)
    images = torch.randn(*shape, device=DEVICE)
    goals = {BF16: (0.8, 0.5), F32: (0.9, 0.7)}
    for arch in bench.archs:
        for dtype in (BF16, F32):
            work = f"{NAMES[arch]}, {'bf16' if dtype is BF16 else 'float32'}"
            run = partial(bench.measure, "backbone training step, 4 x 800 x 1344", work)
            # Ours keeps its weights in channels last, the reference in PyTorch's default.
            for way, layout in LAYOUTS.items():
                reference = ReferenceWay(build(arch, bias_resize="matrix")).train()
                step = step_of(reference.to(memory_format=layout), images, dtype)
                run(way, step, baseline=True)
            eager_goal, compiled_goal = goals[dtype]
            ours = build(arch, bias_grid=grid(shape[2:]))
            run("as it comes", step_of(ours, images, dtype), eager_goal)
            if GPU:
                ours = build(arch, bias_grid=grid(shape[2:]))
                run("CUDA graphs", with_graphs(ours, step_of(ours, images, dtype)))
            ours = compiled(build(arch, bias_grid=grid(shape[2:])))
            run("compiled", step_of(ours, images, dtype), compiled_goal, compiled=True)


def with_graphs(backbone: nn.Module, step: Callable[[], object]) -> Callable[[], object]:
    """A training step whose backbone replays CUDA graphs."""
    backbone.forward = recorded = Recorded(backbone)

    def call() -> object:
        recorded.start_step()
        return step()

    return call


def inference(bench: Bench) -> None:
    """Predictions of the backbones at 800 x 1344."""
    size = (800, 1344) if GPU else (64, 96)
    for batch in (8, 1) if GPU else (1,):
        images = torch.randn(batch, 3, *size, device=DEVICE)
        last = images.to(memory_format=LAST)
        for arch in bench.archs:
            part = f"backbone inference, batch {batch}, 800 x 1344, bf16"
            run = partial(bench.measure, part, NAMES[arch])
            for way, layout in LAYOUTS.items():
                reference = ReferenceWay(build(arch, images, bias_resize="matrix")).eval()
                reference.to(memory_format=layout)
                call = prediction_of(reference, images.to(memory_format=layout), BF16)
                run(way, call, baseline=True)
            ours = build(arch, images, bias_grid=grid(size)).eval()
            call = prediction_of(ours, images, BF16)
            run("as it comes", call, 0.65 if batch == 8 else 0.9)
            call = prediction_of(fold(ours), images, BF16)
            run("folded", call, 0.45 if batch == 8 else None)
            if batch == 8:
                fast = compiled(fold(ours, size))
                run("folded, compiled", prediction_of(fast, last, BF16), 0.35, compiled=True)
            else:
                options = dict(mode="reduce-overhead")
                fast = compiled(fold(ours, size), **options)
                call = prediction_of(fast, last, BF16)
                run("folded, compiled with CUDA graphs", call, 0.3, compiled=True)


def throughput(bench: Bench) -> None:
    """224 px: against timm, whose models are those of classification without the classifier."""
    batch, side = (128, 224) if GPU else (2, 64)
    images = torch.randn(batch, 3, side, side, device=DEVICE).to(memory_format=LAST)
    run = partial(bench.measure, "224 px, batch 128, bf16", "V2-S0")
    ours = build("s0", images, bias_grid=grid((side, side))).eval()
    run("folded", prediction_of(fold(ours), images, BF16), baseline=True)
    run("as it comes", prediction_of(ours, images, BF16), 1.5)
    run = partial(bench.measure, "224 px, batch 128, bf16, against timm", "V2-S0")
    torch.manual_seed(0)
    options = {} if GPU else dict(depths=TINY["depths"])
    theirs = timm.create_model("efficientformerv2_s0", img_size=side, num_classes=0, **options)
    theirs = theirs.to(DEVICE).eval().to(memory_format=LAST)
    run("timm", prediction_of(copy.deepcopy(theirs), images, BF16), baseline=True)
    theirs = compiled(theirs)
    run("timm, compiled", prediction_of(theirs, images, BF16), compiled=True, baseline=True)
    fast = compiled(fold(ours, (side, side)))
    run("folded, compiled", prediction_of(fast, images, BF16), 1 / 1.2, compiled=True)


def channels(config, widths: tuple[int, ...]) -> list[int]:
    """Channels of the levels that the neck takes."""
    return [widths[level] for level in config.model.backbone.get("out_indices", range(4))]


def build_detector(task: str, backbone: str, **optimizer: object) -> tuple[nn.Module, object, dict]:
    """A detector or segmentor on the device, its optimizer and a batch of 4 images.

    ``optimizer`` overrides settings of the config's optimizer.
    """
    template, size, objects = DETECTORS[task]
    if not GPU:
        size, objects = (64, 96), 3
    name = "efficientformer-l1" if backbone == "l1" else "efficientformerv2-s0"
    config = configs.load_config(template.format(name))
    init_default_scope(config.default_scope)
    import_modules_from_strings(**config.custom_imports)
    configs.drop_pretrained(config.model)
    config.optim_wrapper.type = "AmpOptimWrapper"
    config.model.data_preprocessor.pop("size", None)
    if task == "segmentation":
        config.model.data_preprocessor.size = size
        config.model.decode_head.norm_cfg.type = "BN"
    # A rate that leaves the weights, and so the number of regions, as they are.
    config.optim_wrapper.optimizer.update(optimizer, lr=1e-8)
    if not GPU:
        config.model.backbone.arch = TINY
        config.model.neck.in_channels = channels(config, TINY["widths"])
        if task == "detection":
            config.model.train_cfg.rpn_proposal.max_per_img = 20
            config.model.train_cfg.rcnn.sampler.num = 16
    training_device.prepare_device(config, "none")
    if backbone == "resnet50":
        levels = config.model.backbone.get("out_indices", range(4))
        config.model.neck.in_channels = channels(config, (256, 512, 1024, 2048))
        config.model.backbone = dict(RESNET, out_indices=tuple(levels))
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    model = model.to(DEVICE).train()
    fit_norms(model.backbone, torch.randn(2, 3, *size, device=DEVICE))
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    update_in_few_kernels(wrapper.optimizer)
    classes = 150 if task == "segmentation" else 15 if task == "rotated" else 80
    batch = random_batch(task, 4 if GPU else 2, size, objects, classes)
    return model, wrapper, batch


def train_step_of(model: nn.Module, wrapper, batch: dict) -> Callable[[], None]:
    """A whole training step from images on the host to new weights."""

    def step() -> None:
        data = dict(batch, data_samples=copy.deepcopy(batch["data_samples"]))
        losses = model.train_step(data, wrapper)
        if not losses["loss"].isfinite():
            raise RuntimeError(f"a loss is not finite: {losses}")

    return step


def detectors(bench: Bench) -> None:
    """Whole training steps: preprocessing on the device, losses, gradients, fused optimizer."""
    for task in bench.tasks:
        size = DETECTORS[task][1]
        part = f"training step of a whole model, 4 x {size[0]} x {size[1]}, AMP"
        run = partial(bench.measure, part, task)
        run("ResNet-50", train_step_of(*build_detector(task, "resnet50")), baseline=True)
        for arch in bench.archs:
            run(NAMES[arch], train_step_of(*build_detector(task, arch)), 0.9)
            if GPU:
                model, wrapper, batch = build_detector(task, arch)
                step = with_graphs(model.backbone, train_step_of(model, wrapper, batch))
                run(f"{NAMES[arch]}, CUDA graphs", step, 0.9)
            model, wrapper, batch = build_detector(task, arch)
            compiled(model.backbone)
            step = train_step_of(model, wrapper, batch)
            run(f"{NAMES[arch]}, compiled", step, 0.9, compiled=True)


def settings(bench: Bench) -> None:
    """Settings of the training loop, each on and off, with V2-S0."""
    for task in bench.tasks:
        run = partial(bench.measure, "settings of the loop, V2-S0", task)
        step = train_step_of(*build_detector(task, "s0"))

        def with_setting(owner, name: str, step: Callable[[], None] = step) -> Callable[[], None]:
            def changed() -> None:
                before = getattr(owner, name)
                setattr(owner, name, not before)
                try:
                    step()
                finally:
                    setattr(owner, name, before)

            return changed

        run("as our configs set it", step, baseline=True)
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        run("TF32 in matrix products too", with_setting(matmul, "allow_tf32"))
        run("no TF32 in convolutions", with_setting(cudnn, "allow_tf32"))
        if task == "segmentation":  # never where the number of regions varies
            run("cudnn_benchmark", with_setting(cudnn, "benchmark"))
        plain = build_detector(task, "s0", foreach=True)
        run("optimizer not fused", train_step_of(*plain))
        model, wrapper, batch = build_detector(task, "s0")
        del wrapper.optimizer.step  # that of `update_in_few_kernels`
        run("optimizer updates each parameter by itself", train_step_of(model, wrapper, batch))


class Clock(Hook):
    """Times of the iterations, and the last batch."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.ends: list[float] = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Note the time."""
        synchronize()
        self.ends.append(time.perf_counter())
        self.batch = data_batch


def loop(bench: Bench) -> None:
    """Images per second of training with its data pipeline, against the bare step."""
    bench.others.append(partial(_loop, bench))


def _loop(bench: Bench) -> None:
    side, images, batch, iterations = (800, 128, 4, 60) if GPU else (128, 8, 2, 4)
    config = configs.load_config("detection/mask-rcnn_efficientformerv2-s0_fpn_1x_coco.py")
    small = configs.load_config("detection/mask-rcnn_efficientformerv2-s0_fpn_quickstart.py")
    configs.drop_pretrained(config.model)
    if not GPU:
        config.model.backbone.arch = TINY
        config.model.neck.in_channels = channels(config, TINY["widths"])
    with tempfile.TemporaryDirectory() as folder:
        root = write_coco_dataset(Path(folder, "data"), train=images, val=1, size=side)
        loader = config.train_dataloader
        loader.batch_size = batch
        loader.num_workers = os.cpu_count() or 1
        loader.sampler = dict(type="InfiniteSampler")
        loader.pop("batch_sampler")
        loader.dataset.update(data_root=f"{root}/", metainfo=small.metainfo)
        classes = len(small.metainfo.classes)
        config.model.roi_head.bbox_head.num_classes = classes
        config.model.roi_head.mask_head.num_classes = classes
        config.train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations)
        config.param_scheduler = None
        for key in ("val_dataloader", "val_cfg", "val_evaluator"):
            config[key] = None
        config.default_hooks.checkpoint = dict(
            type="CheckpointHook", by_epoch=False, interval=10**9, save_last=False
        )
        config.log_processor.by_epoch = False
        config.work_dir = str(Path(folder, "run"))
        runner = engine.build_train_runner(config, amp=True)
        clock = Clock()
        runner.register_hook(clock)
        runner.train()
        later = clock.ends[iterations // 3 :]
        each = 1e3 * (later[-1] - later[0]) / (len(later) - 1)

        part = f"tools/train.py, {loader.num_workers} workers, {side} px data"
        work = "V2-S0, Mask R-CNN"
        step = train_step_of(runner.model, runner.optim_wrapper, clock.batch)
        bench._time(Request(part, work, "bare step", step, baseline=True))
        bench.add(Row(part, work, "iteration with data and logging", each, 0.0, goal=1 / 0.9))
        print(f"{1e3 * batch / each:.1f} images/s", flush=True)


def free() -> None:
    """Give memory back between models."""
    if GPU:
        torch.cuda.empty_cache()


@contextlib.contextmanager
def exclusive(signal: Path | None) -> Iterator[None]:
    """Wait until a file exists, then until no other process holds it."""
    if signal is None:
        yield
        return
    print("compiled; waiting", flush=True)
    while not signal.exists():
        time.sleep(0.1)
    with signal.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


PARTS = {
    part.__name__: part for part in (training, inference, throughput, detectors, settings, loop)
}


def markdown(rows: list[Row]) -> Iterator[str]:
    """One table per part."""
    for part in dict.fromkeys(row.part for row in rows):
        yield f"**{part}**\n"
        yield "| | | ms | ratio | goal | GPU ms | MiB | ratio | compiled in |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for row in rows:
            if row.part == part:
                met = row.ratio is None or row.goal is None or row.ratio <= row.goal
                numbers = [
                    f"{row.ms:.1f}",
                    "" if row.ratio is None else f"{row.ratio:.2f}" + ("" if met else " (missed)"),
                    "" if row.goal is None else f"{row.goal:.2f}",
                    "" if row.gpu_ms is None else f"{row.gpu_ms:.1f}",
                    f"{row.mib:.0f}",
                    "" if row.memory_ratio is None else f"{row.memory_ratio:.2f}",
                    "" if row.compile_s is None else f"{row.compile_s:.0f} s",
                ]
                yield "| " + " | ".join([row.work, row.way, *numbers]) + " |"
        yield ""


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--archs", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--tasks", nargs="+", choices=DETECTORS, default=list(DETECTORS))
    parser.add_argument("--rounds", type=int, default=10 if GPU else 1)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument(
        "--wait-for",
        type=Path,
        metavar="FILE",
        help="compile, then wait for the file and measure while no other process does, so that "
        "several processes can compile at once",
    )
    args = parser.parse_args()
    MMLogger.get_instance("benchmark", log_level="ERROR")
    bench = Bench(args.rounds, args.archs, args.tasks)
    about = dict(
        gpu=torch.cuda.get_device_name() if GPU else "none: small sizes, times mean nothing",
        torch=torch.__version__,
        cuda=torch.version.cuda,
        timm=timm.__version__,
        date=datetime.date.today().isoformat(),
    )
    for name in args.parts:
        PARTS[name](bench)
    bench.compile()
    with exclusive(args.wait_for):
        bench.run()
    if args.out:
        rows = [asdict(row) for row in bench.rows]
        write_text(args.out, json.dumps(dict(about=about, rows=rows), indent=1) + "\n")
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()) + "\n")
    print("\n".join(markdown(bench.rows)))


if __name__ == "__main__":
    main()
