# SPDX-License-Identifier: Apache-2.0
"""Predict on images, folders, globs and videos with a trained model.

The output folder gets pictures/ and videos/ with the results drawn in, and the task's own files:
{outputs}

Images that cannot be read are named and skipped; the exit status is then 1.

Of a work directory, the best checkpoint is taken, else the last.

Examples:
    mmeformer predict work_dirs/my_config photo.jpg
    mmeformer predict my_config.py epoch_12.pth images/ "more/*/*.png" clip.mp4 --out results
    mmeformer predict work_dirs/my_config clip.mp4 --track --batch-size 4
    mmeformer predict work_dirs/my_config scene.tif --window 1024 --overlap 200 --device cuda:0
"""

import argparse
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmeformer import configs
from mmeformer.bars import Bars, output
from mmeformer.commands import cli
from mmeformer.errors import UserError
from mmeformer.model import EXPORTED
from mmeformer.tasks import TASKS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    outputs = "\n".join(f"  {task.name:<15}{task.outputs}" for task in TASKS.values())
    parser = cli.Parser(__doc__.format(outputs=outputs))
    cli.add_config(parser, or_work_dir=True)
    parser.add_argument("checkpoint", help="checkpoint of a model of this config")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder or glob")
    parser.add_argument(
        "--out", default="predictions", metavar="DIR", help="output folder (%(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, help="images, frames or windows at once (%(default)s)"
    )
    parser.add_argument("--score-thr", type=float, help="smallest score of a detection (0.3)")
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="report only these classes of a detector"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU, if any)")
    parser.add_argument(
        "--window",
        type=int,
        metavar="PX",
        help="cut every image into windows of this side; 0: none (default: cut large ones, see "
        "docs/inference.md)",
    )
    parser.add_argument(
        "--overlap", type=int, metavar="PX", help="of the windows (default: a quarter of them)"
    )
    parser.add_argument(
        "--mask-format",
        choices=["palette", "ids"],
        help="of segmentation: labels with colors (default), or as gray values",
    )
    parser.add_argument(
        "--track",
        action="store_true",
        help="give objects in videos track ids (pip install trackers)",
    )
    parser.add_argument("--no-pictures", action="store_true", help="results only, which is faster")
    cli.add_config_options(parser)
    return cli.parse(parser, argv, model=True)


def work(args: argparse.Namespace) -> int:
    """Predict; returns the exit status."""
    from mmeformer import inference
    from mmeformer.inference.outputs import FOLDERS, is_marked, prepare_folder
    from mmeformer.inference.tracking import require_video

    # Report invalid arguments before the model is loaded, which takes seconds.
    settings = inference.Settings(
        batch_size=args.batch_size,
        window=args.window,
        overlap=args.overlap,
        pictures=not args.no_pictures,
        track=args.track,
    )
    if args.checkpoint.lower().endswith(EXPORTED):
        raise UserError(
            f"{args.checkpoint} is an exported file; this command takes the checkpoint, and Python "
            f'both: mmeformer.load("{args.checkpoint}")("photo.jpg").save("out.png")'
        )
    config = cli.load_config(args)
    configs.existing_checkpoint(args.checkpoint)
    # Outputs of an earlier run are no inputs, but pictures/ of a data set are.
    earlier = [Path(args.out, folder) for folder in FOLDERS] if is_marked(args.out) else []
    sources = inference.find_sources(args.inputs, exclude=earlier)
    if args.track:
        require_video(sources)
    out = prepare_folder(args.out)
    # The visualizers warn of boxes that end at the border.
    warnings.filterwarnings("ignore", module="mmengine.visualization")
    predictor = inference.load_predictor(
        config,
        args.checkpoint,
        device=args.device,
        score_thr=args.score_thr,
        mask_format=args.mask_format,
        classes=args.classes,
    )
    for remark in predictor.remarks:
        print(f"note: {remark}", file=sys.stderr)
    finished, failed, doubtful = _predict_all(predictor, sources, out, settings)
    print(f"predicted on {finished} images; results in {out}")
    if doubtful > 1:
        print(f"warning: of {doubtful} images, objects appear at another scale than in training")
    if failed:
        print(f"error: {failed} inputs were skipped or incomplete", file=sys.stderr)
        return 1
    return 0


def _predict_all(
    predictor: Any, sources: Sequence[Any], out: Path, settings: Any
) -> tuple[int, int, int]:
    """Predict and show how far it is; arguments as of :func:`mmeformer.inference.run`.

    Returns:
        Numbers of images that are finished, that failed, and whose scale is doubtful.
    """
    from mmeformer import inference

    finished = failed = doubtful = 0
    bars = Bars(output())
    images = bars.add_task("images", total=len(sources))
    windows = bars.add_task("windows", visible=False)

    def say(text: str) -> None:
        bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def on_window(name: str, done: int, total: int) -> None:
        if done == 1:
            bars.reset(windows, total=total, visible=True)
        bars.update(windows, completed=done, visible=done < total)
        bars.line(f"{name}: {done} of {total} windows", windows)

    with bars:
        for status in inference.run(predictor, sources, out, settings, on_window):
            bars.update(images, completed=status.done, total=status.total)
            if status.error is not None:
                failed += 1
                say(f"skipped: {status.error}")
            else:
                finished += 1
            if status.warning is not None:
                doubtful += 1
                if doubtful == 1:
                    say(f"warning: {status.name}: {status.warning}")
            bars.line(f"{status.done} of {status.total} images", images)
    return finished, failed, doubtful


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_args(argv)
    # Like Ctrl-C, so that incomplete files are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return cli.run(work, args)
