# SPDX-License-Identifier: Apache-2.0
"""Train any config of the three tasks."""

import argparse

from mmeformer import configs
from mmeformer.commands import cli
from mmeformer.training import device, engine


def parse_args(argv=None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="config file, or its path below mmeformer's configs/")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from a checkpoint; without a value from the latest in the work directory",
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision (on a GPU)")
    parser.add_argument(
        "--auto-scale-lr", action="store_true", help="scale the rate to the real batch size"
    )
    cli.add_common_arguments(parser)
    return cli.parse(parser, argv)


def work(args: argparse.Namespace) -> None:
    """Train."""
    device.set_local_rank(args.local_rank)
    config = configs.load_config(args.config, args.cfg_options)
    configs.choose_work_dir(config, args.config, args.work_dir)
    runner = engine.build_train_runner(
        config,
        amp=args.amp,
        auto_scale_lr=args.auto_scale_lr,
        resume=args.resume,
        launcher=args.launcher,
    )
    runner.train()


def main(argv=None) -> int:
    """Run the command; returns the exit status."""
    return cli.run(work, parse_args(argv))
