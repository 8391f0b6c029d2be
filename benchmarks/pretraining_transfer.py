# SPDX-License-Identifier: Apache-2.0
"""Measure how much pretraining helps a detector, on generated data and without downloads.

1. Pretrain V2-S0 as a classifier of single shapes (random color, size, rotation and background).
2. Train the quickstart detector from those weights (through ``init_cfg``, as users load ImageNet
   weights) and from scratch, with the same data, schedule and seeds.
3. Write box and mask AP50 over the iterations as JSON and as a plot.

    python benchmarks/pretraining_transfer.py --out work_dirs/transfer --seeds 0 1 2

A second run in the same folder continues where the first one stopped.
"""

import argparse
import json
import math
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.fileio import dump, load
from torch import nn

from mmeformer import configs
from mmeformer.backbones import EfficientFormerV2
from mmeformer.synthetic.shapes import CLASSES, outline, write_coco_dataset
from mmeformer.training import engine

CONFIG = "detection/mask-rcnn_efficientformerv2-s0_fpn_quickstart.py"
METRICS = {"box AP50": "coco/bbox_mAP_50", "mask AP50": "coco/segm_mAP_50"}
MEAN, STD = 118.0, 57.0


def shape_images(rng: np.random.Generator, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, size, size, 3) uint8 of one shape each, and its class (N,)."""
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    labels = rng.integers(len(CLASSES), size=count)
    for image, label in zip(images, labels, strict=True):
        background, color = rng.uniform(0, 255, (2, 3))
        image[:] = background
        radius = rng.uniform(0.2, 0.45) * size
        center = tuple(rng.uniform(radius, size - radius, 2))
        points = outline(int(label), center, radius, rng.uniform(0, 2 * math.pi))
        cv2.fillPoly(image, [np.round(points).astype(np.int32)], color.tolist())
        image[:] = (image + rng.normal(0, 8, image.shape)).clip(0, 255)
    return images, labels


def to_batch(images: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float, normalized."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() - MEAN) / STD


def pretrain(path: Path, iterations: int, size: int, batch: int, layer_scale: float) -> float:
    """Train a classifier, save its backbone, return its accuracy on new images."""
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    backbone = EfficientFormerV2("s0", layer_scale_init_value=layer_scale)
    head = nn.Linear(backbone.architecture.widths[-1], len(CLASSES))
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=iterations)

    def logits(images: np.ndarray) -> torch.Tensor:
        return head(backbone(to_batch(images))[-1].mean((2, 3)))

    for iteration in range(iterations):
        images, labels = shape_images(rng, batch, size)
        loss = nn.functional.cross_entropy(logits(images), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if iteration % 50 == 49:
            print(f"pretraining {iteration + 1}/{iterations}: loss {loss.item():.3f}", flush=True)
    backbone.eval()
    images, labels = shape_images(rng, 512, size)
    with torch.no_grad():
        accuracy = float((logits(images).argmax(1).numpy() == labels).mean())
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(dict(state_dict=backbone.state_dict()), partial)
    partial.replace(path)
    return accuracy


def train_detector(work_dir: Path, seed: int, checkpoint: Path | None, iterations: int) -> list:
    """Train the quickstart detector, unless that is done; return rows of step and AP50."""
    curve = work_dir / "curve.json"
    if curve.is_file():
        return load(str(curve))
    config = configs.load_config(
        CONFIG,
        {
            "train_cfg.max_iters": iterations,
            "train_cfg.val_interval": max(1, iterations // 5),
            "randomness.seed": seed,
            "default_hooks.checkpoint.interval": iterations,
        },
    )
    config.param_scheduler[-1].end = iterations
    config.work_dir = str(work_dir)
    # Otherwise mmengine reuses the visualizer of the previous run, and with it that run's log.
    config.visualizer.name = str(work_dir)
    if checkpoint is not None:
        config.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(checkpoint))
    write_coco_dataset(config.data_root)
    runner = engine.build_train_runner(config)
    runner.train()
    lines = Path(runner.log_dir, "vis_data", "scalars.json").read_text().splitlines()
    logged = [row for row in map(json.loads, lines) if METRICS["box AP50"] in row]
    rows = [
        {"step": number * config.train_cfg.val_interval}
        | {title: row[key] for title, key in METRICS.items()}
        for number, row in enumerate(logged, 1)
    ]
    dump(rows, str(curve))
    return rows


def draw(results: dict, picture: Path) -> None:
    """Plot the mean over seeds, and each seed as a thin line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axes, title in zip(panels, METRICS, strict=True):
        for color, (start, runs) in zip(("C0", "C1"), results["runs"].items(), strict=True):
            steps = [row["step"] for row in runs[0]]
            curves = np.array([[row[title] for row in run] for run in runs])
            axes.plot(steps, curves.T, color=color, alpha=0.3, linewidth=1)
            axes.plot(steps, curves.mean(0), color=color, marker="o", label=start)
        axes.set(title=title, xlabel="iteration")
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Pretrain, train the detectors and plot their AP50."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("work_dirs/transfer"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretrain-iterations", type=int, default=600)
    parser.add_argument("--iterations", type=int, default=300, help="of the detector")
    args = parser.parse_args()
    layer_scale = configs.load_config(CONFIG).model.backbone.layer_scale_init_value
    checkpoint = args.out / "pretrained.pth"
    if not checkpoint.is_file():
        accuracy = pretrain(checkpoint, args.pretrain_iterations, 64, 64, layer_scale)
        print(f"pretrained: accuracy {accuracy:.3f} on new images")
    results = dict(runs={"from scratch": [], "pretrained": []})
    for seed in args.seeds:
        for start, weights in (("from scratch", None), ("pretrained", checkpoint)):
            folder = args.out / f"{start.replace(' ', '-')}-{seed}"
            results["runs"][start].append(train_detector(folder, seed, weights, args.iterations))
        dump(results, str(args.out / "results.json"), indent=1)
        draw(results, args.out / "pretraining_transfer.png")


if __name__ == "__main__":
    main()
