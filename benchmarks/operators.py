# SPDX-License-Identifier: Apache-2.0
"""Compare CPU time of our operators and mmcv's compiled ones, on one core.

Run it where mmcv has compiled operators: ``python benchmarks/operators.py [--rounds 9]``. It prints
a Markdown table of medians; rounds of both kinds alternate. On a CPU nearly all compiled operators
use one thread. CPU time does not count other programs on the machine.
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from mmeformer.ops import status, substitute

MODULES = ("nms", "box_iou_rotated", "roi_align", "roi_align_rotated")


def use(extension) -> None:
    """Make ``mmcv.ops`` call ``extension``."""
    for name in MODULES:
        importlib.import_module(f"mmcv.ops.{name}").ext_module = extension


def rotated_boxes(count: int, side: int) -> Tensor:
    """Boxes (count, 5) of 8 to 64 px at random places of a square of ``side`` px."""
    return torch.cat(
        [torch.rand(count, 2) * side, 8 + 56 * torch.rand(count, 2), torch.rand(count, 1) * 3.14], 1
    )


def detections(objects: int, each: int, side: int) -> Tensor:
    """Rotated boxes as a head predicts them: ``each`` slightly different ones per object."""
    boxes = rotated_boxes(objects, side).repeat_interleave(each, 0)
    noise = torch.randn_like(boxes) * torch.tensor([3.0, 3, 3, 3, 0.1])
    return (boxes + noise)[torch.randperm(len(boxes))]


def upright(boxes: Tensor) -> Tensor:
    """Corners (N, 4) of rotated boxes as if their angle were zero."""
    return torch.cat([boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2], 1)


def cases() -> dict[str, Callable[[], object]]:
    """The calls to time, by name, with the sizes of the three tasks."""
    from mmcv.ops import box_iou_rotated, nms, nms_rotated, roi_align, roi_align_rotated

    torch.manual_seed(0)
    found = {}
    for name, boxes in (
        ("1,000 boxes of 50 objects, 1024 px", detections(50, 20, 1024)),
        ("2,000 boxes of 100 objects, 1024 px", detections(100, 20, 1024)),
        ("5,000 boxes of 500 objects, 4000 px", detections(500, 10, 4000)),
        ("2,000 boxes apart from each other, 12,000 px", rotated_boxes(2000, 12000)),
    ):
        scores = torch.rand(len(boxes))
        found[f"rotated NMS, {name}"] = lambda b=boxes, s=scores: nms_rotated(b, s, 0.1)
        corners = upright(boxes)
        found[f"NMS, {name}"] = lambda b=corners, s=scores: nms(b, s, 0.5)
    for count in (900, 9000):
        first, second = detections(1, count, 1024), detections(1, count, 1024)
        found[f"rotated IoU, {count:,} aligned pairs"] = lambda a=first, b=second: box_iou_rotated(
            a, b, aligned=True
        )
    first, second = detections(20, 15, 1024), rotated_boxes(100, 1024)
    found["rotated IoU, 300 x 100 boxes, 1024 px"] = lambda a=first, b=second: box_iou_rotated(a, b)
    for count, size in ((512, 7), (1000, 7), (100, 14)):
        maps = torch.rand(1, 256, 100, 168).requires_grad_()
        boxes = upright(rotated_boxes(count, 800) * torch.tensor([0.8, 0.8, 3, 3, 1])).clamp(0)
        rois = torch.cat([torch.zeros(count, 1), boxes], 1)

        def forward(maps=maps, rois=rois, size=size):
            return roi_align(maps.detach(), rois, size, 1 / 8, 0, "avg", True)

        def both(maps=maps, rois=rois, size=size):
            return torch.autograd.grad(
                roi_align(maps, rois, size, 1 / 8, 0, "avg", True).sum(), maps
            )

        name = f"{count:,} regions of {size} x {size}, 256 channels"
        found[f"RoIAlign, {name}"] = forward
        found[f"RoIAlign with gradient, {name}"] = both
    for count, size in ((512, 7), (2000, 7)):
        maps = torch.rand(1, 256, 100, 168).requires_grad_()
        boxes = rotated_boxes(count, 800) * torch.tensor([1, 1, 3, 3, 1])
        rois = torch.cat([torch.zeros(count, 1), boxes], 1)

        def forward(maps=maps, rois=rois, size=size):
            return roi_align_rotated(maps.detach(), rois, size, 1 / 8, 2, True, True)

        def both(maps=maps, rois=rois, size=size):
            output = roi_align_rotated(maps, rois, size, 1 / 8, 2, True, True)
            return torch.autograd.grad(output.sum(), maps)

        name = f"{count:,} rotated regions of {size} x {size}, 256 channels"
        found[f"RoIAlign, {name}"] = forward
        found[f"RoIAlign with gradient, {name}"] = both
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="repetitions of each (default: 9)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    in_use = status()
    if in_use.operators != "compiled":
        parser.error(f"this environment has no compiled operators to compare with: {in_use.reason}")
    compiled = importlib.import_module("mmcv._ext")
    print("| operator | compiled, ms | ours, ms | compiled / ours |")
    print("|---|---|---|---|")
    for name, call in cases().items():
        times: dict[object, list[float]] = {compiled: [], substitute: []}
        for extension in (compiled, substitute) * (args.rounds + 1):
            use(extension)
            start = time.process_time()
            call()
            times[extension].append(1000 * (time.process_time() - start))
        # The first round of each is a warm-up.
        theirs, ours = (statistics.median(values[1:]) for values in times.values())
        print(f"| {name} | {theirs:.1f} | {ours:.1f} | {theirs / ours:.1f} |", flush=True)


if __name__ == "__main__":
    main()
