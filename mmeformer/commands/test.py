# SPDX-License-Identifier: Apache-2.0
"""Evaluate a checkpoint, or an ONNX file exported from one, of any config of the three tasks."""

import argparse

from mmeformer import configs
from mmeformer.commands import cli
from mmeformer.training import device, engine


def parse_args(argv=None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="config file, or its path below mmeformer's configs/")
    parser.add_argument("checkpoint", help="checkpoint, or exported .onnx file")
    parser.add_argument("--out", metavar="FILE.pkl", help="file for all predictions")
    parser.add_argument("--show-dir", metavar="FOLDER", help="folder for pictures of predictions")
    parser.add_argument("--tta", action="store_true", help="test-time augmentation")
    cli.add_common_arguments(parser)
    return cli.parse(parser, argv)


def work(args: argparse.Namespace) -> None:
    """Evaluate."""
    device.set_local_rank(args.local_rank)
    config = configs.load_config(args.config, args.cfg_options)
    configs.choose_work_dir(config, args.config, args.work_dir)
    runner = engine.build_test_runner(
        config,
        args.checkpoint,
        out=args.out,
        show_dir=args.show_dir,
        tta=args.tta,
        launcher=args.launcher,
    )
    runner.test()


def main(argv=None) -> int:
    """Run the command; returns the exit status."""
    return cli.run(work, parse_args(argv))
