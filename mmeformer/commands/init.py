# SPDX-License-Identifier: Apache-2.0
"""Make a config from a folder of labeled images.

Reads COCO JSON, YOLO (boxes, outlines, rotated boxes), Pascal VOC XML, LabelMe, DOTA, masks, and
folders of images named by class; chooses the settings from the data and this machine, each with its
reason in the config; and checks the data. The folder is only read. Written are the config and,
beside it, a folder of labels; nothing is written over.

Examples:
    mmeformer init datasets/nuclei
    mmeformer init datasets/birds/data.yaml
    mmeformer init datasets/street --task segmentation --legend colors.csv --out street.py
    mmeformer init datasets/ships --arch s1 --weights none
"""

import argparse
from pathlib import Path

from mmeformer import own_data
from mmeformer.commands import cli
from mmeformer.errors import UserError
from mmeformer.formats import yolo
from mmeformer.formats.find import FORMATS
from mmeformer.formats.tree import Options
from mmeformer.tasks import TASKS
from mmeformer.variants import VARIANTS
from mmeformer.work_dirs import is_work_dir

ARCH = own_data.Request.arch


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "data", metavar="DATA", type=Path, help="folder of images and labels, or YOLO's data.yaml"
    )
    add_choices(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the split, if the data have none (%(default)s)"
    )
    return cli.parse(parser, argv)


CHOICES = ("task", "arch", "out", "weights", "format", "classes", "legend", "skip_bad")
"""What :func:`add_choices` adds."""


def add_choices(parser: argparse._ActionsContainer) -> None:
    """Add the options that messages about a folder of data ask for; ``train`` takes them too."""
    parser.add_argument("--task", choices=list(TASKS), help="default: the one the labels are for")
    parser.add_argument(
        "--arch", help=f"{', '.join(v.arch for v in VARIANTS.values())} (default: {ARCH})"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.py", help="the config; default: the folder's name, here"
    )
    parser.add_argument(
        "--weights", help="of the backbone: file, URL, or none (default: ImageNet's, downloaded)"
    )
    parser.add_argument("--format", choices=list(FORMATS), help="if the folder has several")
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="names of classes that are only numbers"
    )
    parser.add_argument(
        "--legend", type=Path, metavar="FILE", help="of color masks: lines name,red,green,blue"
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        default=None,
        help="leave out files and objects with errors",
    )


def is_data(path: Path) -> bool:
    """Whether a path is that of labeled images, and not of a config or a training."""
    return yolo.is_settings(path) or (path.is_dir() and not is_work_dir(path))


def request_of(args: argparse.Namespace, data: Path, seed: int = 0) -> own_data.Request:
    """What a command line with :func:`add_choices` asks for.

    Args:
        args: the command line.
        data: folder of images and labels, or YOLO's ``data.yaml``.
        seed: of the split.
    """
    settings = data if yolo.is_settings(data) else None
    if settings and args.format not in (None, "yolo"):
        raise UserError(f"{data} is read as YOLO's settings; leave out --format {args.format}")
    return own_data.Request(
        folder=yolo.folder_of(settings) if settings else data,
        out=args.out,
        task=args.task,
        arch=args.arch or ARCH,
        weights=args.weights,
        options=Options(
            format="yolo" if settings else args.format,
            classes=None if args.classes is None else tuple(args.classes),
            legend=args.legend,
            settings=settings,
        ),
        skip_bad=bool(args.skip_bad),
        seed=seed,
    )


def work(args: argparse.Namespace) -> int:
    """Make the config; returns the exit status."""
    made = own_data.make(request_of(args, args.data, args.seed), report=print)
    if made.errors:
        return 1
    print(f"next: look at {made.config}, then: mmeformer train {made.config}")
    return 0


def main(argv=None) -> int:
    """Run the command; returns the exit status."""
    return cli.run(work, parse_args(argv))
