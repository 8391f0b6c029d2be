# SPDX-License-Identifier: Apache-2.0
"""Cut DOTA images and labels into patches. After an interruption the same command continues.

SRC is a folder of the unpacked DOTA data set: images/ and labelTxt/ (the original label files).
Writes images/ and annfiles/ to DST.

Examples:
    mmeformer split-dota data/DOTA/train data/split_ss_dota/train
    mmeformer split-dota data/DOTA/train data/DOTA/val data/split_ss_dota/trainval --workers 8
    mmeformer split-dota data/DOTA/test data/split_ss_dota/test --no-labels
    mmeformer split-dota data/DOTA/train data/split_ms_dota/train --rates 0.5 1 1.5
"""

import argparse
import os
import signal
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from mmeformer.bars import Bars, output
from mmeformer.commands import cli
from mmeformer.errors import UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("sources", metavar="SRC", type=Path, nargs="+")
    parser.add_argument("target", metavar="DST", type=Path)
    parser.add_argument("--images", default="images", help="folder below SRC (%(default)s)")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--labels", default="labelTxt", help="folder below SRC (%(default)s)")
    labels.add_argument("--no-labels", action="store_true", help="cut images only (a test set)")
    parser.add_argument("--size", type=int, default=1024, help="side in pixels (%(default)s)")
    parser.add_argument("--overlap", type=int, default=512, help="in pixels (%(default)s)")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="RATE",
        help="cut windows of SIZE / RATE pixels for each rate; training resizes them (1)",
    )
    parser.add_argument(
        "--iof",
        type=float,
        default=0.7,
        help="smallest share of an object's area inside a patch (%(default)s)",
    )
    parser.add_argument(
        "--truncated",
        choices=["drop", "difficult"],
        default="drop",
        help="objects with a smaller share: drop, or keep as difficult 2 (%(default)s)",
    )
    parser.add_argument("--drop-empty", action="store_true", help="skip patches without objects")
    parser.add_argument("--no-pad", action="store_true", help="do not pad small images")
    parser.add_argument("--suffix", default="png", help="format of the patches (%(default)s)")
    parser.add_argument(
        "--bands",
        type=int,
        nargs="+",
        metavar="N",
        help="of imagery: the bands for red, green and blue, from 1; or one for gray",
    )
    parser.add_argument(
        "--stretch",
        nargs="+",
        metavar=("LOW", "HIGH"),
        help="of imagery of more than 8 bits: values that become black and white; or percentile",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes; each holds one image in memory (%(default)s)",
    )
    args = cli.parse(parser, argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers} must be at least 1")
    return args


def _stretch(values: list[str] | None) -> tuple[float, ...] | str | None:
    """The setting of :class:`mmeformer.images.Reading` that the words of ``--stretch`` mean."""
    if values is None or len(values) == 1:
        return None if values is None else values[0]
    try:
        return tuple(map(float, values))
    except ValueError:
        return " ".join(values)


def work(args: argparse.Namespace) -> int:
    """Cut; returns the exit status."""
    # Imported here so that --help and errors in arguments do not wait for OpenMMLab.
    from mmeformer.rotated.patches import CutSettings, Split

    console = output()
    settings = CutSettings(
        size=args.size,
        overlap=args.overlap,
        rates=tuple(args.rates),
        iof=args.iof,
        truncated=args.truncated,
        keep_empty=not args.drop_empty,
        pad=not args.no_pad,
        suffix=args.suffix,
        bands=None if args.bands is None else tuple(args.bands),
        stretch=_stretch(args.stretch),
    )
    sources = [
        (source / args.images, None if args.no_labels else source / args.labels)
        for source in args.sources
    ]
    try:
        split = Split(sources, args.target, settings)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} (see --images, --labels, --no-labels)") from error
    total = len(split.pending)
    if split.finished:
        console.print(f"{split.finished} images were cut before, {total} remain")
    if split.unused_labels:
        console.print(
            f"warning: {len(split.unused_labels)} label files have no image, such as "
            f"{split.unused_labels[0]}",
            markup=False,
            soft_wrap=True,
        )
    patches, lost, failed = 0, split.lost, []
    outcomes = split.run(args.workers)
    try:
        with Bars(console) as bars:
            task = bars.add_task("images", total=total)
            for done, outcome in enumerate(outcomes, start=1):
                bars.advance(task)
                patches += len(outcome.patches)
                lost += outcome.lost
                if outcome.error is not None:
                    failed.append(outcome)
                    console.print(
                        f"{outcome.job.name}: {outcome.error}", markup=False, soft_wrap=True
                    )
                bars.line(f"{done} of {total} images", task)
    except KeyboardInterrupt:
        outcomes.close()
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return cli.INTERRUPTED
    except BrokenProcessPool as error:
        raise UserError(
            "a process was killed, probably because memory ran out; run the same command with "
            "fewer --workers to continue"
        ) from error
    console.print(f"{patches} patches of {total - len(failed)} images in {args.target}")
    if lost:
        console.print(
            f"warning: {lost} objects belong to no patch: they lie outside their image, or less "
            f"than {settings.iof:.0%} of them is in any window. For large ones use a larger "
            "--overlap or --size, a smaller --iof, or lower --rates",
            markup=False,
            soft_wrap=True,
        )
    if failed:
        names = ", ".join(outcome.job.name for outcome in failed)
        print(f"error: {len(failed)} images were not cut: {names}", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_args(argv)
    # Treat SIGTERM like Ctrl-C, so that the worker processes end too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return cli.run(work, args)
