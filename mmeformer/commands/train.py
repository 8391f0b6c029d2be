# SPDX-License-Identifier: Apache-2.0
"""Train the model of a config, or on a folder of labeled images.

For a folder, a config is made first, as ``mmeformer init`` does. In a terminal a progress bar shows
the time left, the loss and the best metric; elsewhere there are lines. At the end, or at Ctrl-C,
report.html in the work directory has curves and results.

Several nodes: run the same line on each, with NNODES, NODE_RANK and MASTER_ADDR set.

Examples:
    mmeformer train my_config.py
    mmeformer train my_config.py --resume
    mmeformer train my_config.py --gpus 4
    mmeformer train datasets/nuclei
"""

import argparse
import multiprocessing
import sys
from contextlib import nullcontext
from pathlib import Path

from mmeformer import own_data, signals
from mmeformer.commands import cli, init
from mmeformer.errors import UserError
from mmeformer.training import engine, launch
from mmeformer.training.trackers import DEFAULT, NONE, TRACKERS
from mmeformer.work_dirs import find_config


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "config",
        help="config file, its path below mmeformer's configs/, a folder of data or its data.yaml; "
        "with --resume also a work directory",
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
    init.add_choices(parser.add_argument_group("for a folder of data, as for mmeformer init"))
    return cli.parse(parser, argv)


def work(args: argparse.Namespace) -> int | None:
    """Train; returns the exit status."""
    if launch.needed(args.gpus, args.launcher):
        return _prepare_alone(args) or cli.start_processes("train", args)
    with signals.before_errors() if args.launcher != "none" else nullcontext():
        return _train(args)


def _train(args: argparse.Namespace) -> int | None:
    # Needs what prediction needs, which takes a moment to import.
    from mmeformer.report.build import after_training

    if code := _find_config(args):
        return code
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


def _find_config(args: argparse.Namespace) -> int:
    """Put a config in place of a work directory or a folder of data; returns the exit status."""
    given = Path(args.config)
    if init.is_data(given):
        return _make_config(args)
    if choices := [name for name in init.CHOICES if getattr(args, name) is not None]:
        option = f"--{choices[0].replace('_', '-')}"
        raise UserError(f"{option} is for a folder of data, and {given} is none: leave it out")
    if given.is_dir():
        earlier = find_config(given)
        if not args.resume:
            raise UserError(
                f"{given} is the work directory of a training: add --resume to go on with it, or "
                f"train {earlier} anew in another --work-dir"
            )
        args.work_dir = args.work_dir or args.config
        args.config = str(earlier)
    return 0


def _make_config(args: argparse.Namespace) -> int:
    request = init.request_of(args, Path(args.config))
    if args.resume or args.launcher != "none":
        config = own_data.made_before(request)
        if config is not None:
            args.config = str(config)
            return 0
        if args.launcher != "none":
            raise UserError(
                f"{args.config} is data, and several processes need a config: run mmeformer init "
                f"{args.config} first"
            )
    made = own_data.make(request, report=print)
    args.config = str(made.config)
    return 1 if made.errors else 0


def _prepare_alone(args: argparse.Namespace) -> int:
    """Do once what comes before several processes; returns the exit status."""
    if not init.is_data(Path(args.config)):
        return _find_config(args)
    # What measures the batch leaves memory of the first GPU to its process.
    process = multiprocessing.get_context("spawn").Process(target=_exit_prepared, args=(args,))
    process.start()
    process.join()
    return process.exitcode or 0


def _exit_prepared(args: argparse.Namespace) -> None:
    sys.exit(cli.run(_find_config, args))


def main(argv=None) -> int:
    """Run the command; returns the exit status."""
    return cli.run(work, parse_args(argv))
