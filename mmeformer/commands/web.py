# SPDX-License-Identifier: Apache-2.0
"""Write a web page that runs an exported ONNX file in the browser; pictures stay on the device.

Examples:
    mmeformer web model.onnx --out site/     # for any static host
    mmeformer web model.onnx --serve         # only on this machine
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from mmeformer.commands import cli
from mmeformer.deploy import website


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("model", metavar="MODEL.onnx", help="exported file")
    parser.add_argument("--out", metavar="FOLDER", help="folder to write")
    parser.add_argument("--serve", action="store_true", help="serve the page on this machine")
    parser.add_argument("--port", type=int, default=8000, help="for --serve (default: 8000)")
    parser.add_argument("--example", metavar="PICTURE", help="picture that the page shows first")
    parser.add_argument(
        "--library",
        metavar="FOLDER",
        help=f"{website.PACKAGE} {website.VERSION}, folder or archive; default: fetched by npm",
    )
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")
    args = cli.parse(parser, argv)
    if not (args.out or args.serve):
        parser.error("give --out FOLDER, --serve or both")
    return args


def work(args: argparse.Namespace) -> None:
    """Write the page, and serve it."""
    with TemporaryDirectory() as folder:
        site = website.build(
            args.model,
            args.out or Path(folder) / "site",
            example=args.example,
            library=args.library,
            force=args.force,
        )
        if args.out:
            print(f"wrote {site}")
        if args.serve:
            website.serve(site, args.port)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return cli.run(work, parse_args(argv))
