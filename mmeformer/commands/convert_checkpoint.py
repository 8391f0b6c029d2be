# SPDX-License-Identifier: Apache-2.0
"""Convert a checkpoint between the published formats and ours.

Reads files of the reference implementation (classifiers, detectors, segmentors), timm, mmpretrain,
Hugging Face transformers and mmeformer, recognized by their content.

Examples:
    mmeformer convert eformer_s0_450.pth efficientformerv2_s0.pth
    mmeformer convert timm://efficientformer_l1.snap_dist_in1k l1.safetensors
    mmeformer convert training.pth l1.pth --ema
    mmeformer convert distilled.pth l1.pth --key model_state_dict --prefix student.backbone
    mmeformer convert work_dirs/my_detector/epoch_12.pth backbone_for_timm.pth --to timm
"""

import argparse

from rich.console import Console
from rich.table import Table

from mmeformer.checkpoints.convert import TARGETS, convert
from mmeformer.checkpoints.report import Report
from mmeformer.commands import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("source", metavar="SRC", help="file, URL or timm://<model>.<tag>")
    parser.add_argument("target", metavar="DST", help="file: .pth, .pt, .bin or .safetensors")
    parser.add_argument("--to", choices=TARGETS, default="native", help="default: %(default)s")
    parser.add_argument("--prefix", help="start of the backbone's names in SRC, if it is not found")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--key", help="entry of SRC that holds the tensors, if it is not found")
    weights.add_argument(
        "--ema", action="store_true", help="take the moving averages, where SRC has both"
    )
    parser.add_argument("--force", action="store_true", help="overwrite DST if it exists")
    return cli.parse(parser, argv)


def as_table(report: Report) -> Table:
    """The report as a table to print."""
    table = Table("", "tensors", "details", title=f"Checkpoint {report.title}")
    for heading, count, details in report.rows():
        table.add_row(heading, "" if count is None else str(count), details)
    return table


def work(args: argparse.Namespace) -> None:
    """Convert and print the report."""
    try:
        report = convert(
            args.source, args.target, args.to, args.force, args.prefix, args.key, args.ema
        )
    except FileExistsError as error:
        raise FileExistsError(f"{error} (--force)") from error
    Console().print(as_table(report))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return cli.run(work, parse_args(argv))
