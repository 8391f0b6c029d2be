# SPDX-License-Identifier: Apache-2.0
"""What every command line does with errors: one readable line, no traceback unless asked for."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence

from mmengine.config import DictAction

from mmeformer.checkpoints.safe_load import CheckpointError
from mmeformer.errors import TrainingError

DELIBERATE = (CheckpointError, TrainingError)
"""Errors that say all there is to say, whenever they come."""
# Functions of mmengine's loops, PyTorch's loader and prediction in which the work itself is done.
WORK = ("run_iter", "_next_data", "_forward_batch")
INTERRUPTED = 130


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read a command line, to which ``--debug`` is added."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser.parse_args(argv)


def run(work: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Do a command's work and return its exit status: 0, or what ``work`` returns; 1 for errors.

    An error becomes one line that begins with ``error:``. Its traceback is printed with ``--debug``
    and, before that line, if steps of training or testing were under way: that is no mistake in the
    input, and after days nobody should have to run it again.
    """
    try:
        return work(args) or 0
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if args.debug or not (isinstance(error, DELIBERATE) or _before_work(error)):
            traceback.print_exc()
        print(f"error: {one_text(error)}", file=sys.stderr)
        return 1


def one_text(error: Exception) -> str:
    """What an error says, without the tracebacks of workers; its type where that is needed."""
    text = str(error).strip()
    if isinstance(error, KeyError) and len(error.args) == 1:
        # The text of a KeyError has quotes around it and its line breaks escaped.
        text = str(error.args[0]).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].split(": ", 1)[-1]
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    if isinstance(error, SyntaxError) and error.filename:
        text = f"{error.filename}, line {error.lineno}: {error.msg}"
    if not text or isinstance(error, (AssertionError, AttributeError, KeyError, TypeError)):
        # Not written for people: say at least what kind of mistake it is.
        return f"{type(error).__name__}: {text or 'no message'} (more with --debug)"
    return text


def _before_work(error: Exception) -> bool:
    return not any(frame.name in WORK for frame in traceback.extract_tb(error.__traceback__))


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``tools/train.py`` and ``tools/test.py`` share."""
    parser.add_argument("--work-dir", help="folder for logs and checkpoints")
    add_config_options(parser)
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="how the processes were started (see tools/dist_train.sh, tools/slurm_train.sh)",
    )
    # torch.distributed.launch of PyTorch 2 gives --local-rank; torchrun sets the variable itself.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """The argument that changes settings of a config."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=_Settings,
        metavar="KEY=VALUE",
        help="settings laid over the config, such as train_dataloader.batch_size=4",
    )


class _Settings(DictAction):
    """mmengine's ``KEY=VALUE``, with its exceptions made errors of the command line."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if wrong := [value for value in values if "=" not in value]:
            parser.error(f"argument {option_string}: {wrong[0]!r} is not KEY=VALUE")
        try:
            super().__call__(parser, namespace, values, option_string)
        except (AssertionError, ValueError) as error:
            parser.error(f"argument {option_string}: {error}")
