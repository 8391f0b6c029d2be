# SPDX-License-Identifier: Apache-2.0
"""Compare the backbones with the reference's way of working and with timm: time and memory.

    python benchmarks/backbone_speed.py inference --variants efficientformerv2_s0 efficientformer_l1
    python benchmarks/backbone_speed.py training
    python benchmarks/backbone_speed.py growth

All ways of running a backbone have the same weights and take turns in one run, so that a slow
moment of the machine affects all of them; the shortest time of each counts. See reference_way.py
for the baseline. Tables are printed in Markdown; --out gets the results as JSON.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import timm
import torch
from mmengine.fileio import dump
from reference_way import ReferenceWay
from torch import nn

from mmeformer.backbones import EfficientFormer, EfficientFormerV2
from mmeformer.deploy import fold
from mmeformer.deploy.profile import inference_memory
from mmeformer.deploy.substitutes import substitute_for_graph
from mmeformer.training.memory import keep_freed_memory, return_freed_memory
from mmeformer.variants import VARIANTS

MIB = 2**20


def build(variant: str, image: torch.Tensor | None = None, **kwargs) -> nn.Module:
    """A backbone with the same random weights for the same variant and bias grid.

    With an image, its norms get the statistics of that image, as in a trained network. Otherwise
    maps would grow from block to block in evaluation, logits would reach a million, and nearly all
    attention weights would be denormal numbers, which take a processor many times longer.
    """
    torch.manual_seed(0)
    row = VARIANTS[variant]
    kind = EfficientFormerV2 if row.family == "v2" else EfficientFormer
    kwargs = dict(layer_scale_init_value=0.5, drop_path_rate=0.0, **kwargs)
    if row.family == "v2":
        kwargs["head_bias_keys"] = 49
    backbone = kind(row.arch, **kwargs).train()
    if image is None:
        return backbone
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        backbone(image)
    for norm in norms:
        norm.momentum = 0.1
    return backbone


def onnx_calls(
    backbone: nn.Module, image: torch.Tensor, folder: str, also: Sequence[str]
) -> dict[str, Callable[[], object]]:
    """Functions that run the folded backbone, exported for this size, in onnxruntime.

    In 8 bits: all layers but depthwise convolutions. What a trained model can have in 8 bits is
    measured by `mmeformer export --int8`.
    """
    import onnx
    import onnxruntime

    from mmeformer.deploy.quantize import OnnxWriter, layer_groups

    substitute_for_graph(backbone)
    plain = Path(folder, "backbone.onnx")
    torch.onnx.export(backbone, (image,), str(plain), input_names=["image"], dynamo=False)
    feed = {"image": image.numpy()}
    files = {"onnxruntime": plain}
    if "int8" in also:
        files["onnxruntime, int8"] = int8 = Path(folder, "backbone_int8.onnx")
        groups = layer_groups(onnx.load(str(plain))).items()
        layers = [name for group, names in groups if "depthwise" not in group for name in names]
        OnnxWriter()(plain, int8, layers, iter([feed]))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    sessions = {
        name: onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        for name, path in files.items()
    }
    return {name: partial(session.run, None, feed) for name, session in sessions.items()}


def shortest(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest run of each call.

    Before each timed run come a pause, because onnxruntime's threads keep spinning for a while, and
    an untimed run, because the cache is full of another call's weights.
    """
    best = dict.fromkeys(calls, float("inf"))
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for name, call in calls.items():
                time.sleep(0.1)
                call()
                started = time.perf_counter()
                call()
                best[name] = min(best[name], time.perf_counter() - started)
    return best


def inference(variant: str, size: tuple[int, int], args: argparse.Namespace) -> dict:
    """Seconds, MiB of tensors and ratios of the ways to run a forward pass."""
    image = torch.randn(1, 3, *size)
    last = image.to(memory_format=torch.channels_last)
    grid = [max(1, side // 32) for side in size]
    ours = build(variant, image, bias_grid=grid).eval()
    folded = fold(ours)
    folded_last = fold(ours).to(memory_format=torch.channels_last)
    reference = ReferenceWay(build(variant, image, bias_resize="matrix")).eval()
    calls = {
        "reference's way": lambda: reference(image),
        "eager": lambda: ours(image),
        "folded": lambda: folded(image),
        "folded, channels last": lambda: folded_last(last),
    }
    if size == (224, 224):
        model = timm.create_model(variant, pretrained=False).eval()
        calls["timm"] = lambda: model.forward_features(image)
    memory = {name: inference_memory(call) / MIB for name, call in calls.items()}
    with tempfile.TemporaryDirectory() as folder:
        if "onnxruntime" in args.also:
            calls.update(onnx_calls(fold(ours, size), image, folder, args.also))
        if "compile" in args.also:
            torch._dynamo.reset()
            compiled = torch.compile(fold(ours, size).to(memory_format=torch.channels_last))
            calls["compiled"] = lambda: compiled(last)
        seconds = shortest(calls, args.rounds)
    return dict(seconds=seconds, memory=memory)


def training(variant: str, size: tuple[int, int], args: argparse.Namespace) -> dict:
    """Seconds and peak resident memory of a training step, each way in a process of its own."""
    ways = ["reference's way", "ours", "ours, with_cp"]
    found = {}
    for way in ways:
        command = [sys.executable, __file__, "one-training", "--variants", variant, "--way", way]
        command += ["--sizes", f"{size[0]}x{size[1]}", "--rounds", str(args.rounds)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    return {key: {way: value[key] for way, value in found.items()} for key in ("seconds", "memory")}


def one_training(variant: str, size: tuple[int, int], args: argparse.Namespace) -> dict:
    """The shortest step, and the growth of peak memory over that of a small step.

    Ours uses the C library's memory settings of our command lines on a CPU.
    """
    image = torch.randn(1, 3, *size)
    if args.way == "reference's way":
        model = ReferenceWay(build(variant, bias_resize="matrix"))
    else:
        with_cp = args.way.endswith("with_cp")
        return_freed_memory() if with_cp else keep_freed_memory()
        grid = [max(1, side // 32) for side in size]
        model = build(variant, bias_grid=grid, with_cp=with_cp)
    model.train()
    # Loads the libraries' code.
    sum(level.mean() for level in model(image[..., :64, :64])).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    best = float("inf")
    for number in range(args.rounds + 1):
        model.zero_grad()
        started = time.perf_counter()
        sum(level.square().mean() for level in model(image)).backward()
        if number:
            best = min(best, time.perf_counter() - started)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return dict(seconds=best, memory=(after - before) / 1024)


def growth(variant: str, args: argparse.Namespace) -> list[dict]:
    """Time and memory of the folded backbone from 224 to 2048 px."""
    rows = []
    for side in (224, 512, 1024, 1536, 2048):
        image = torch.randn(1, 3, side, side).to(memory_format=torch.channels_last)
        backbone = build(variant, image, bias_grid=25).eval()
        call = partial(fold(backbone).to(memory_format=torch.channels_last), image)
        seconds = shortest({"folded": call}, args.rounds)["folded"]
        rows.append(dict(side=side, seconds=seconds, memory=inference_memory(call) / MIB))
    return rows


def table(title: str, found: dict) -> str:
    """Markdown with one line per way."""
    base = "reference's way"
    lines = [f"**{title}**", "", "| | ms | ratio | MiB | ratio |", "|---|---|---|---|---|"]
    for way, seconds in found["seconds"].items():
        memory = found["memory"].get(way)
        cells = [way, f"{1e3 * seconds:.0f}", f"{seconds / found['seconds'][base]:.2f}"]
        cells += (
            ["", ""]
            if memory is None
            else [f"{memory:.0f}", f"{memory / found['memory'][base]:.2f}"]
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["inference", "training", "growth", "one-training"])
    parser.add_argument("--variants", nargs="+", default=["efficientformerv2_s0"])
    parser.add_argument("--sizes", nargs="+", default=["800x1344"], metavar="HxW")
    parser.add_argument("--also", nargs="*", default=["onnxruntime", "int8"], metavar="WAY")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    if args.what == "one-training":
        print(json.dumps(one_training(args.variants[0], sizes[0], args)))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n")
    results = {}
    for variant in args.variants:
        if args.what == "growth":
            results[variant] = rows = growth(variant, args)
            print(f"**{variant}**\n\n| px | ms | us per px | MiB | bytes per px |")
            print("|---|---|---|---|---|")
            for row in rows:
                area = row["side"] ** 2
                cells = [
                    row["side"],
                    f"{1e3 * row['seconds']:.0f}",
                    f"{1e6 * row['seconds'] / area:.3f}",
                    f"{row['memory']:.0f}",
                    f"{row['memory'] * MIB / area:.0f}",
                ]
                print("| " + " | ".join(map(str, cells)) + " |")
            print(flush=True)
            continue
        for text, size in zip(args.sizes, sizes, strict=True):
            found = (inference if args.what == "inference" else training)(variant, size, args)
            results[f"{variant} {text}"] = found
            print(table(f"{variant}, {text} px, {args.what}", found), flush=True)
    if args.out:
        dump(results, str(args.out), indent=1)


if __name__ == "__main__":
    main()
