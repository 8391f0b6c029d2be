# SPDX-License-Identifier: Apache-2.0
"""Export a trained model to ONNX, CoreML, TensorFlow Lite or ExecuTorch, checked against PyTorch.

A work directory stands for its config and its best checkpoint, else the last.

Examples:
    mmeformer export work_dirs/my_config --to onnx --size 512 512 --out model.onnx
    mmeformer export CONFIG CHECKPOINT --to onnx --dynamic --with-preprocessing --out model.onnx
    mmeformer export CONFIG CHECKPOINT --to onnx --size 512 512 --int8 images/ --out model.onnx
    mmeformer export CONFIG CHECKPOINT --to onnx --part backbone --size 224 224 --out s0.onnx
    mmeformer export CONFIG CHECKPOINT --to coreml --size 512 512 --fp16 --out model.mlpackage
    mmeformer export CONFIG CHECKPOINT --to tflite --size 512 512 --out model.tflite
    mmeformer export CONFIG CHECKPOINT --to executorch --size 512 512 --out model.pte
"""

import argparse
from pathlib import Path

from mmeformer.commands import cli
from mmeformer.deploy.export import SUFFIXES, Request, export
from mmeformer.errors import UserError
from mmeformer.inference.inputs import find_sources


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    cli.add_config(parser, or_work_dir=True)
    parser.add_argument("checkpoint", help="checkpoint of a model of this config")
    parser.add_argument("--to", choices=list(SUFFIXES), required=True)
    parser.add_argument(
        "--out", required=True, help=f"file to write: {', '.join(SUFFIXES.values())}"
    )
    parser.add_argument("--part", choices=["model", "backbone"], default="model")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="one input size, in px")
    size.add_argument("--dynamic", action="store_true", help="any input size and batch")
    parser.add_argument("--batch", type=int, default=1, help="images per run, with --size")
    parser.add_argument(
        "--with-preprocessing",
        action="store_true",
        help="the graph takes BGR images as OpenCV reads them, and normalizes them",
    )
    parser.add_argument(
        "--fp16", action="store_true", help="CoreML, or the weights of TensorFlow Lite, in float16"
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        help="images or folders for the check; default: of the config's test data",
    )
    parser.add_argument(
        "--int8",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="8 bits, calibrated on these images or folders: 50 to 200 pictures like the test data",
    )
    parser.add_argument(
        "--int8-dynamic",
        action="store_true",
        help="TensorFlow Lite with weights in 8 bits; ranges are measured in every run",
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="for 8 bits: largest drop of the test data's metric (default: 1 of 100 points)",
    )
    parser.add_argument(
        "--nms",
        choices=["inside", "outside"],
        default="inside",
        help="of detectors in ONNX: outside gives every box, and mmeformer.runtime does the NMS",
    )
    parser.add_argument(
        "--opset",
        type=int,
        choices=(17, 20),
        default=17,
        help="version of ONNX's operators; 20 has GELU as one, and needs onnxruntime 1.18 or later",
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    cli.add_config_options(parser)
    args = cli.parse(parser, argv, model=True)
    if args.dynamic and args.batch != 1:
        parser.error("--batch is for --size: with --dynamic any batch is possible")
    if args.max_drop is not None and not args.int8 and not args.int8_dynamic:
        parser.error("--max-drop is for 8 bits: add --int8 or --int8-dynamic")
    return args


def _images(option: str, inputs: list[str]) -> tuple[Path, ...]:
    """Image files of files and folders.

    Raises:
        UserError: there are inputs, but no images.
    """
    sources = find_sources(inputs) if inputs else []
    found = tuple(source.path for source in sources if not source.is_video)
    if inputs and not found:
        raise UserError(f"{option} {' '.join(inputs)}: no images there; videos are not used")
    return found


def run(args: argparse.Namespace) -> None:
    """Export, check and write."""
    request = Request(
        target=args.to,
        part=args.part,
        size=None if args.dynamic else tuple(args.size),
        batch=args.batch,
        preprocessing=args.with_preprocessing,
        half=args.fp16,
        int8=_images("--int8", args.int8),
        int8_dynamic=args.int8_dynamic,
        max_drop=1.0 if args.max_drop is None else args.max_drop,
        nms=args.nms == "inside",
        opset=args.opset,
    )
    config = cli.load_config(args)
    images = _images("--images", args.images)
    path = export(config, args.checkpoint, args.out, request, images=images, force=args.force)
    print(f"wrote {path} and {path.with_suffix('.json')}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return cli.run(run, parse_args(argv))
