# SPDX-License-Identifier: Apache-2.0
"""Train the model of a config."""

import argparse

from mmeformer.commands import cli
from mmeformer.training import engine


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    cli.add_config(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="resume from a checkpoint; without a value from the latest in the work directory",
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision (on a GPU)")
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate to the batch size",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="on a GPU, use only kernels that give the same result each time; slower",
    )
    cli.add_run_options(parser)
    return cli.parse(parser, argv)


def work(args: argparse.Namespace) -> None:
    """Train."""
    runner = engine.build_train_runner(
        cli.prepare_run(args),
        amp=args.amp,
        auto_scale_lr=args.auto_scale_lr,
        resume=args.resume,
        deterministic=args.deterministic,
        launcher=args.launcher,
    )
    runner.train()


def main(argv=None) -> int:
    """Run the command; returns the exit status."""
    return cli.run(work, parse_args(argv))
