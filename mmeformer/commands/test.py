# SPDX-License-Identifier: Apache-2.0
"""Evaluate a checkpoint, or a file exported from one, with its config.

Of a work directory, the best checkpoint is taken, else the last.

Examples:
    mmeformer test work_dirs/my_config
    mmeformer test my_config.py work_dirs/my_config/epoch_24.pth --gpus 4
    mmeformer test my_config.py model.onnx --show-dir pictures/
"""

import argparse

from mmeformer.commands import cli
from mmeformer.configs import existing_checkpoint
from mmeformer.model import EXPORTED
from mmeformer.training import engine, launch


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    cli.add_config(parser, or_work_dir=True)
    parser.add_argument("checkpoint", help="checkpoint, or exported .onnx, .tflite or .pte file")
    parser.add_argument("--out", metavar="FILE.pkl", help="file for all predictions")
    parser.add_argument("--show-dir", metavar="FOLDER", help="folder for pictures of predictions")
    parser.add_argument("--tta", action="store_true", help="test-time augmentation")
    cli.add_run_options(parser)
    return cli.parse(parser, argv, model=True)


def work(args: argparse.Namespace) -> int | None:
    """Evaluate; returns the exit status."""
    if launch.needed(args.gpus, args.launcher):
        return cli.start_processes("test", args)
    config = cli.prepare_run(args)
    checkpoint = existing_checkpoint(args.checkpoint)
    exported = checkpoint.endswith(EXPORTED)
    if exported:
        # Needs a runtime, which evaluating checkpoints does not.
        from mmeformer.deploy.evaluate import use_exported

        if args.tta:
            raise ValueError(
                f"test-time augmentation needs a checkpoint, not the exported file {checkpoint}"
            )
        use_exported(config, checkpoint)
    runner = engine.build_test_runner(
        config,
        None if exported else checkpoint,
        out=args.out,
        show_dir=args.show_dir,
        tta=args.tta,
        launcher=args.launcher,
    )
    runner.test()
    return None


def main(argv=None) -> int:
    """Run the command; returns the exit status."""
    return cli.run(work, parse_args(argv))
