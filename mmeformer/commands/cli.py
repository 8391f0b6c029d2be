# SPDX-License-Identifier: Apache-2.0
"""Arguments and errors of command lines: an error is one line, without a traceback."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from mmengine.config import Config, DictAction

from mmeformer import configs, settings
from mmeformer.errors import UserError

# Functions of mmengine's loops, PyTorch's data loader and prediction that do the work itself.
WORK = ("run_iter", "_next_data", "results_of_batch")
INTERRUPTED = 130


PARSER_ONLY = ("",)
"""A command line that only asks for the parser; see :class:`ParserReady`."""


class ParserReady(Exception):  # noqa: N818 (no error)
    """Raised by :func:`parse` for :data:`PARSER_ONLY`; ``parser`` is that of the command."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__(parser.prog)
        self.parser = parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Add ``--debug`` to a parser and parse the command line; suggests the nearest option."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    if argv is PARSER_ONLY:
        raise ParserReady(parser)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        options = list(parser._option_string_actions)
        near = get_close_matches(unknown[0].partition("=")[0], options, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return args


def run(work: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Run a command; returns the exit status: 1 after an error, else what ``work`` returns, or 0.

    An error is printed as one line that begins with ``error:``. Its traceback is printed before
    that line with ``--debug``, and also if the error is not a
    :class:`~mmeformer.errors.UserError` and was raised in the middle of training, testing or
    prediction: then the input is rarely the cause, and nobody should have to repeat a long run to
    see where it failed.
    """
    try:
        return work(args) or 0
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        text = settings.explain(error, getattr(args, "loaded", {}))
        known = text is not None or isinstance(error, UserError)
        if args.debug or not (known or _before_work(error)):
            traceback.print_exc()
        print(f"error: {text or one_text(error)}", file=sys.stderr)
        return 1


def one_text(error: Exception) -> str:
    """Text of an error, without tracebacks of data workers, and with its type if that helps."""
    text = str(error).strip()
    if isinstance(error, KeyError) and len(error.args) == 1:
        # str() of a KeyError adds quotes and escapes line breaks.
        text = str(error.args[0]).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].split(": ", 1)[-1]
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    if isinstance(error, SyntaxError) and error.filename:
        text = f"{error.filename}, line {error.lineno}: {error.msg}"
    if not text or isinstance(error, (AssertionError, AttributeError, KeyError, TypeError)):
        # Such texts are not written for users: add the type.
        return f"{type(error).__name__}: {text or 'no message'} (more with --debug)"
    return text


def _before_work(error: Exception) -> bool:
    return not any(frame.name in WORK for frame in traceback.extract_tb(error.__traceback__))


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names a config."""
    parser.add_argument("config", help="config file, or its path below mmeformer's configs/")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share; :func:`prepare_run` reads them."""
    parser.add_argument("--work-dir", help="folder for logs and checkpoints")
    add_config_options(parser)
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="how the processes were started (see tools/dist_train.sh, tools/slurm_train.sh)",
    )
    # torch.distributed.launch passes --local-rank; torchrun sets LOCAL_RANK instead.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def load_config(args: argparse.Namespace) -> Config:
    """Read the config of a command line, with its settings.

    :func:`run` looks in it, as ``args.loaded``, for what an error is about.
    """
    args.loaded = configs.load_config(args.config, args.cfg_options)
    return args.loaded


def prepare_run(args: argparse.Namespace) -> Config:
    """Read the config of a command line, with its settings, work directory and local rank."""
    if args.launcher == "none" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"this is one of {os.environ['WORLD_SIZE']} processes, which would all do the same: "
            "add --launcher pytorch"
        )
    if args.launcher == "pytorch" and "RANK" not in os.environ:
        raise UserError(
            "--launcher pytorch is for processes that torchrun starts: use tools/dist_train.sh or "
            "tools/dist_test.sh"
        )
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    config = load_config(args)
    configs.choose_work_dir(config, args.config, args.work_dir)
    return config


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add the option that changes settings of a config."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=_Settings,
        metavar="KEY=VALUE",
        help="override settings of the config, such as train_dataloader.batch_size=4",
    )


class _Settings(DictAction):
    """mmengine's ``KEY=VALUE``; invalid text is an error of the command line."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if wrong := [value for value in values if "=" not in value]:
            parser.error(f"argument {option_string}: {wrong[0]!r} is not KEY=VALUE")
        if dicts := [value for value in values if "dict(" in value or "{" in value]:
            parser.error(
                f"argument {option_string}: {dicts[0]!r}: values are numbers, words, lists and "
                "tuples; set the entries of a dict one by one, such as "
                "optim_wrapper.optimizer.type=AdamW"
            )
        try:
            super().__call__(parser, namespace, values, option_string)
        except (AssertionError, ValueError) as error:
            parser.error(f"argument {option_string}: {error}")
