# SPDX-License-Identifier: Apache-2.0
"""Compare Mask R-CNN with our backbones to Mask R-CNN with ResNet-50: time and memory as ratios.

    python benchmarks/detector_speed.py --variants efficientformerv2_s0 efficientformer_l1

Necks, heads, images and objects are the same. Weights are random, so proposals are noise, but their
number is realistic. Ours run in channels last, and folded for inference. Each model runs in its own
process, to measure its peak resident memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.registry import init_default_scope

from mmeformer import configs
from mmeformer.deploy import fold
from mmeformer.training.memory import keep_freed_memory

RESNET = dict(
    type="ResNet",
    depth=50,
    num_stages=4,
    out_indices=(0, 1, 2, 3),
    frozen_stages=1,
    norm_eval=True,
    style="pytorch",
)


def build(name: str):
    """Build Mask R-CNN with the backbone ``name``."""
    variant = "efficientformerv2-s0" if name == "resnet50" else name.replace("_", "-")
    config = configs.load_config(f"detection/mask-rcnn_{variant}_fpn_1x_coco.py").model
    configs.drop_pretrained(config)
    if name == "resnet50":
        config.backbone = RESNET
        config.neck.in_channels = [256, 512, 1024, 2048]
    init_default_scope("mmdet")
    torch.manual_seed(0)
    model = MODELS.build(config)
    model.init_weights()
    return model


def measure(name: str, size: tuple[int, int], rounds: int) -> dict:
    """Measure the shortest training step and prediction in seconds, and a step's MiB of memory."""
    keep_freed_memory()
    model = build(name)
    if name != "resnet50":
        model = model.to(memory_format=torch.channels_last)
    batch = demo_mm_inputs(1, [[3, *size]], num_items=[10], num_classes=80, with_mask=True)
    best = dict(train=float("inf"), predict=float("inf"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.train()
    for _ in range(rounds + 1):
        model.zero_grad()
        started = time.perf_counter()
        losses = model.parse_losses(model(**model.data_preprocessor(batch, True), mode="loss"))[0]
        losses.backward()
        best["train"] = min(best["train"], time.perf_counter() - started)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    model = model.eval() if name == "resnet50" else fold(model)
    with torch.inference_mode():
        for _ in range(rounds + 1):
            started = time.perf_counter()
            model.test_step(batch)
            best["predict"] = min(best["predict"], time.perf_counter() - started)
    return dict(best, memory=memory)


def main() -> None:
    """Run one process per model, in turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["efficientformerv2_s0"])
    parser.add_argument("--size", default="800x1344", metavar="HxW")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = tuple(map(int, args.size.split("x")))
    if args.one:
        print(json.dumps(measure(args.one, size, args.rounds)))
        return
    found = {}
    for name in ["resnet50", *args.variants]:
        command = [sys.executable, __file__, "--one", name, "--size", args.size]
        command += ["--rounds", str(args.rounds)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    base = found["resnet50"]
    print(f"Mask R-CNN, {args.size} px, {torch.get_num_threads()} threads\n")
    print("| backbone | predict s | ratio | train step s | ratio | step MiB | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, row in found.items():
        cells = [name]
        for key, digits in (("predict", 2), ("train", 2), ("memory", 0)):
            cells += [f"{row[key]:.{digits}f}", f"{row[key] / base[key]:.2f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
