# SPDX-License-Identifier: Apache-2.0
"""Compare ATSS for rotated boxes, ours (candidates only) and mmrotate's (all pairs).

    python benchmarks/rotated_assigner.py
    python benchmarks/rotated_assigner.py --boxes 100 5000 --reference-up-to 5000
    python benchmarks/rotated_assigner.py --gpu    # ours in the chunks of a GPU, on the CPU

Prints time, memory, operators (views left out) and whether the assignments agree. Boxes are random,
10 to 100 px in one 1024 px image; anchors are those of the head (strides 8 to 128). Each run has
its own process, so that peak memory can be measured.
"""

import argparse
import math
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import torch
from mmengine.structures import InstanceData


def run(
    name: str, num_boxes: int, size: int, threads: int, gpu: bool
) -> tuple[float, float, int, int]:
    """Assign once.

    Args:
        name: registered assigner, with scope.
        num_boxes: boxes in the image.
        size: side of the image in pixels.
        threads: threads of PyTorch.
        gpu: take as many boxes at once as on a GPU.

    Returns:
        Seconds, increase of peak memory in MiB, number of operators, hash of the assignment.
    """
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from launches import Launches
    from mmrotate.structures.bbox import RotatedBoxes

    from mmeformer.ops import rotated
    from mmeformer.registry import TASK_UTILS
    from mmeformer.rotated import assigner as module

    if gpu:
        module._MAX_PAIRS, rotated._IOU_PAIRS = module._GPU_MAX_PAIRS, {}

    torch.set_num_threads(threads)
    strides = [8, 16, 32, 64, 128]
    generator = TASK_UTILS.build(
        dict(type="mmrotate.FakeRotatedAnchorGenerator", scales=[4], ratios=[1.0], strides=strides)
    )
    levels = generator.grid_priors([(size // s, size // s) for s in strides], device="cpu")
    priors = RotatedBoxes(torch.cat([level.tensor for level in levels]))
    unit = torch.rand(num_boxes, 5, generator=torch.Generator().manual_seed(0))
    boxes = torch.cat([unit[:, :2] * size, 10 * 10 ** unit[:, 2:4], unit[:, 4:] * math.pi], 1)
    gts = InstanceData(bboxes=RotatedBoxes(boxes), labels=torch.zeros(num_boxes, dtype=torch.long))
    assigner = TASK_UTILS.build(
        dict(type=name, topk=9, iou_calculator=dict(type="mmrotate.RBboxOverlaps2D"))
    )

    def assign():
        counts = [len(level) for level in levels]
        return assigner.assign(InstanceData(priors=priors), counts, gts)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    result = assign()
    seconds = time.perf_counter() - start
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    with Launches() as launches:
        assign()
    operators = launches.operators.total()
    return seconds, memory, operators, hash(tuple(result.gt_inds.tolist()))


def main() -> None:
    """Print one line per number of boxes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--boxes", type=int, nargs="+", default=[20, 120, 500, 5000])
    parser.add_argument("--size", type=int, default=1024, help="side of the image in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--reference-up-to",
        type=int,
        default=500,
        help="most boxes to give to mmrotate, which takes minutes and gigabytes for thousands",
    )
    parser.add_argument("--gpu", action="store_true", help="take the chunks of a GPU")
    args = parser.parse_args()

    print(
        f"{'boxes':>6} {'seconds':>18} {'MiB':>16} {'operators':>16}   "
        "time ratio, memory ratio, same assignment"
    )
    for count in args.boxes:
        names = ["mmeformer.RotatedATSSAssigner"]
        if count <= args.reference_up_to:
            names.append("mmrotate.RotatedATSSAssigner")
        runs = []
        for name in names:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                runs.append(pool.apply(run, (name, count, args.size, args.threads, args.gpu)))
        (seconds, memory, operators, assignment), *rest = runs
        if not rest:
            print(
                f"{count:>6} {seconds:>8.2f} {'-':>9} {memory:>7.0f} {'-':>8} "
                f"{operators:>7} {'-':>8}"
            )
            continue
        ((other_seconds, other_memory, other_operators, other_assignment),) = rest
        print(
            f"{count:>6} {seconds:>8.2f} {other_seconds:>9.2f} {memory:>7.0f} {other_memory:>8.0f}"
            f" {operators:>7} {other_operators:>8}"
            f"   x{other_seconds / seconds:.1f}, x{other_memory / max(memory, 1):.1f}, "
            f"{'yes' if assignment == other_assignment else 'NO'}"
        )


if __name__ == "__main__":
    main()
