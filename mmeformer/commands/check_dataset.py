# SPDX-License-Identifier: Apache-2.0
"""Check the data sets of a config before training on them, and that the model is for their classes.

Prints a table of problems with the first places of each kind, and draws samples with their labels.
The exit status is 1 if there are errors.

Examples:
    mmeformer check my_config.py
    mmeformer check my_config.py --split test --full --out check/
"""

import argparse
import logging
import time
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmeformer.checks.dataset import (
    SPLITS,
    check_evaluator,
    check_flips,
    check_model,
    checked_datasets_of,
    draw_samples,
    location,
)
from mmeformer.checks.findings import ERROR, Finding
from mmeformer.commands import cli


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    cli.add_config(parser)
    parser.add_argument(
        "--split", nargs="+", choices=SPLITS, default=["train", "val"], help="default: train val"
    )
    parser.add_argument("--full", action="store_true", help="decode every image")
    parser.add_argument("--out", help="folder for pictures; default: work_dirs/check_<config>")
    parser.add_argument(
        "--first", type=int, default=3, metavar="N", help="places to list per kind (%(default)s)"
    )
    cli.add_config_options(parser)
    args = cli.parse(parser, argv)
    if args.first < 1:
        parser.error(f"--first {args.first} must be at least 1")
    return args


def as_table(findings: list[Finding], title: str, first: int) -> Table:
    """Table of problems by kind, with the first ``first`` places of each."""
    kinds = defaultdict(list)
    for finding in findings:
        kinds[finding.severity, finding.kind].append(finding)
    table = Table("", "what", "times", "first", title=title, show_lines=True)
    for (severity, kind), found in kinds.items():
        places = [f"{finding.path}: {finding.message}" for finding in found[:first]]
        if len(found) > first:
            places.append(f"and {len(found) - first} more")
        table.add_row(severity, kind, str(len(found)), "\n".join(places))
    return table


def work(args: argparse.Namespace) -> int:
    """Check; returns the exit status."""
    # Keep mmengine's messages about building out of the output.
    logging.getLogger("mmengine").setLevel(logging.ERROR)
    config = cli.load_config(args)
    if message := check_model(config, args.split):
        print(f"warning: {message}")
    out = Path(args.out or Path("work_dirs", f"check_{Path(args.config).stem}"))
    console = Console(soft_wrap=False)
    errors = 0
    for split in args.split:
        datasets = checked_datasets_of(config, split)
        for number, dataset in enumerate(datasets, start=1):
            started = time.monotonic()
            findings = dataset.findings(decode=args.full)
            findings += check_evaluator(config, split, dataset)
            findings += check_flips(config, split)
            seconds = time.monotonic() - started
            bad = sum(finding.severity == ERROR for finding in findings)
            errors += bad
            title = f"{split}: {location(dataset)}"
            if findings:
                console.print(as_table(findings, title, args.first), markup=False)
            console.print(
                f"{title}: {bad} errors, {len(findings) - bad} warnings in {seconds:.1f} s",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            name = split if len(datasets) == 1 else f"{split}_{number}"
            _draw(dataset, config, out / f"{name}.png", bool(bad), console)
    return 1 if errors else 0


def _draw(dataset, config, target: Path, faulty: bool, console: Console) -> None:
    try:
        drawn = draw_samples(dataset, config, target)
    except OSError:
        raise
    except Exception as error:
        if not faulty:
            raise
        # The table already says what is wrong with the annotations.
        console.print(f"no samples drawn: {cli.one_text(error)}", markup=False)
    else:
        console.print(
            f"{drawn} samples drawn: {target}" if drawn else "no sample can be drawn", markup=False
        )


def main(argv=None) -> int:
    """Run the command; returns the exit status."""
    return cli.run(work, parse_args(argv))
