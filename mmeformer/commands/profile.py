# SPDX-License-Identifier: Apache-2.0
"""Measure parameters, multiply-adds, memory and latency of a model, in one table.

Examples:
    mmeformer profile efficientformerv2_s0
    mmeformer profile CONFIG --size 512 512 --modes eager folded onnxruntime
    mmeformer profile CONFIG --part backbone --size 800 1344 --rounds 5 --json profile.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mmeformer.backbones import EfficientFormer, EfficientFormerV2
from mmeformer.commands import cli
from mmeformer.deploy import models
from mmeformer.deploy.export import Request
from mmeformer.deploy.graphs import graph_class
from mmeformer.deploy.profile import MODES, Profile, profile
from mmeformer.files import write_text
from mmeformer.runtime.metadata import Metadata
from mmeformer.tasks import BACKBONE
from mmeformer.variants import VARIANTS
from mmeformer.version import __version__


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "config",
        help=f"config file, or a variant: {', '.join(VARIANTS)} (short: s0)",
    )
    parser.add_argument("--checkpoint", help="default: random weights")
    parser.add_argument("--part", choices=["model", "backbone"], default="model")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="default: 224 (variant) or 512"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--modes", nargs="*", choices=MODES, default=MODES, help="default: all")
    parser.add_argument("--rounds", type=int, default=10, help="runs of each mode")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file too")
    cli.add_config_options(parser)
    args = cli.parse(parser, argv)
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: quartiles need more than one run")
    return args


def run(args: argparse.Namespace) -> tuple[Profile, dict]:
    """Profile a model; returns the profile and the conditions of the measurement."""
    named = [item for item in VARIANTS.values() if args.config in (item.name, item.arch)]
    variant = named[0] if named else None
    size = tuple(args.size or ((224, 224) if variant else (512, 512)))
    request = Request("onnx", BACKBONE if variant else args.part, size, args.batch)
    if variant is not None:
        if size[0] != size[1]:
            raise ValueError(f"--size {size}: classifiers are counted on square images")
        cls = EfficientFormer if variant.family == "v1" else EfficientFormerV2
        task, model = BACKBONE, cls(variant.arch).eval()
    else:
        config = cli.load_config(args)
        task = request.task(config)
        model = models.build_model(config, args.checkpoint)
    # Only sizes count here, not how images are prepared.
    metadata = Metadata(
        task, __version__, args.config, (0.0,) * 3, (1.0,) * 3, True, size=size, batch=args.batch
    )
    if "compile" in args.modes:
        print(
            "measuring; torch.compile takes minutes first, without it: --modes "
            + " ".join(mode for mode in args.modes if mode != "compile"),
            file=sys.stderr,
            flush=True,
        )
    found = profile(
        model,
        metadata,
        graph_class(metadata.task, request.target, model),
        modes=args.modes,
        rounds=args.rounds,
        variant=variant,
    )
    conditions = {
        "model": args.config,
        "part": request.part,
        "size": list(size),
        "batch": args.batch,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "mmeformer": __version__,
    }
    return found, conditions


def as_table(found: Profile, conditions: dict) -> Table:
    """Format the profile as one table."""
    height, width = conditions["size"]
    table = Table(
        title=f"{Path(conditions['model']).stem}, {conditions['part']}, {height} x {width} px, "
        f"batch {conditions['batch']}, {conditions['threads']} threads"
    )
    table.add_column("")
    for heading in ("params M", "MACs G"):
        table.add_column(heading, justify="right")
    for part in found.parts:
        table.add_row(part.name, f"{part.params / 1e6:.3f}", f"{part.macs / 1e9:.3f}")
    total = found.total
    table.add_row("total", f"{total.params / 1e6:.2f}", f"{total.macs / 1e9:.2f}", style="bold")
    if (variant := VARIANTS.get(conditions["model"])) and conditions["size"] == [224, 224]:
        table.add_row("published", f"{variant.params:g}", f"{variant.macs:.2f}")
    table.add_section()
    table.add_row("activations MB, inference", "", f"{found.inference_bytes / 1e6:.1f}")
    table.add_row("activations MB, backbone in training", "", f"{found.training_bytes / 1e6:.1f}")
    table.add_section()
    for mode, times in found.latency.items():
        spread = f"{times.low:.1f} to {times.high:.1f}"
        table.add_row(f"{mode}: median ms, quartiles", f"{times.median:.1f}", spread)
    return table


def report(args: argparse.Namespace) -> None:
    """Profile, print the table and write the JSON file."""
    found, conditions = run(args)
    Console().print(as_table(found, conditions))
    if args.json:
        text = json.dumps({**conditions, "total": asdict(found.total), **asdict(found)}, indent=1)
        write_text(args.json, text + "\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return cli.run(report, parse_args(argv))
