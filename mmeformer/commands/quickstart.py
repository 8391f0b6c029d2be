# SPDX-License-Identifier: Apache-2.0
"""Generate data, train from scratch, evaluate and draw predictions; minutes on two CPU cores.

Examples:
    mmeformer quickstart {first}
"""

import argparse

from mmeformer import quickstart, tasks
from mmeformer.commands import cli


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__.format(first=next(iter(tasks.TASKS))))
    parser.add_argument("task", choices=list(tasks.TASKS))
    parser.add_argument(
        "--light", action="store_true", help="the light model of the task, for phones and CPUs"
    )
    parser.add_argument("--work-dir", help="default: work_dirs/quickstart-TASK")
    return cli.parse(parser, argv)


def main(argv=None) -> int:
    """Run one task's quickstart; returns the exit status."""

    def work(args: argparse.Namespace) -> None:
        quickstart.run(args.task, args.work_dir, light=args.light)

    return cli.run(work, parse_args(argv))
