# SPDX-License-Identifier: Apache-2.0
"""Train the model of a config, or on a folder of labeled images.

For a folder, a config is made first, as ``mmeformer init`` does. In a terminal a progress bar shows
the time left, the loss and the best metric; elsewhere there are lines. At the end, or at Ctrl-C,
report.html in the work directory has curves and results.

Examples:
    mmeformer train my_config.py
    mmeformer train my_config.py --resume
    mmeformer train datasets/nuclei
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

from mmeformer import own_data, signals
from mmeformer.commands import cli
from mmeformer.errors import UserError
from mmeformer.training import engine
from mmeformer.training.trackers import DEFAULT, NONE, TRACKERS
from mmeformer.work_dirs import POINTER, find_config


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "config",
        help="config file, its path below mmeformer's configs/, or a folder of data; with --resume "
        "also a work directory",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        action="append",
        metavar="CHECKPOINT",
        help="resume from a checkpoint; without a value from the latest in the work directory "
        "(if there is none, from an earlier --resume CHECKPOINT of this command line)",
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision (on a GPU)")
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate to the batch size",
    )
    parser.add_argument(
        "--log",
        nargs="+",
        choices=[*TRACKERS, NONE],
        metavar="TRACKER",
        help=f"also record the training with {', '.join(TRACKERS)} "
        f"(default: {DEFAULT}, if it is installed), or {NONE}",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="on a GPU, use only kernels that give the same result each time; slower",
    )
    cli.add_run_options(parser)
    return cli.parse(parser, argv)


def work(args: argparse.Namespace) -> int | None:
    """Train; returns the exit status."""
    with signals.before_errors() if args.launcher != "none" else nullcontext():
        return _train(args)


def _train(args: argparse.Namespace) -> int | None:
    # Needs what prediction needs, which takes a moment to import.
    from mmeformer.report.build import after_training

    if Path(args.config, POINTER).is_file():
        earlier = find_config(args.config)
        if not args.resume:
            raise UserError(
                f"{args.config} is the work directory of a training: add --resume to go on with "
                f"it, or train {earlier} anew in another --work-dir"
            )
        args.work_dir = args.work_dir or args.config
        args.config = str(earlier)
    elif Path(args.config).is_dir():
        if args.launcher != "none":
            raise UserError(
                f"{args.config} is a folder; several processes need a config: run mmeformer init "
                f"{args.config} first"
            )
        request = own_data.Request(Path(args.config))
        if args.resume and (config := own_data.made_before(request)):
            args.config = str(config)
        else:
            made = own_data.make(request, report=print)
            if made.errors:
                return 1
            args.config = str(made.config)
    resume = args.resume or [None]
    runner = engine.build_train_runner(
        cli.prepare_run(args),
        amp=args.amp,
        auto_scale_lr=args.auto_scale_lr,
        resume=resume[-1],
        resume_else=next((file for file in reversed(resume) if file != "auto"), None),
        deterministic=args.deterministic,
        launcher=args.launcher,
        trackers=args.log,
    )
    with after_training(runner):
        runner.train()
    return None


def main(argv=None) -> int:
    """Run the command; returns the exit status."""
    return cli.run(work, parse_args(argv))
