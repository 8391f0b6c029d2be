# SPDX-License-Identifier: Apache-2.0
"""Write report.html into the work directory of a training, finished or not.

Examples:
    mmeformer report work_dirs/my_config
    mmeformer report work_dirs/my_config --images 1000 --device cpu
"""

import argparse

from mmeformer import configs
from mmeformer.commands import cli


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("work_dir", help="folder that training wrote")
    parser.add_argument("--config", help="of the training (default: that of the work directory)")
    parser.add_argument("--checkpoint", help="to predict with (default: the best, else the last)")
    parser.add_argument(
        "--images",
        type=int,
        default=200,
        metavar="N",
        help="validation images to predict, evenly spread (default: 200); 0 for none",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the first GPU, if any)")
    return cli.parse(parser, argv)


def work(args: argparse.Namespace) -> None:
    """Write the report."""
    # Needs what prediction needs, which takes a moment to import.
    from mmeformer.report import build

    path = build.write(
        args.work_dir,
        config=None if args.config is None else configs.load_config(args.config),
        checkpoint=args.checkpoint and configs.existing_checkpoint(args.checkpoint),
        images=args.images,
        device=args.device,
    )
    print(path)


def main(argv=None) -> int:
    """Run the command; returns the exit status."""
    return cli.run(work, parse_args(argv))
