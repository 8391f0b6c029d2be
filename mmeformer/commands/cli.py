# SPDX-License-Identifier: Apache-2.0
"""Arguments and errors of command lines: an error is one line, without a traceback."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from mmengine.config import Config, DictAction

from mmeformer import configs, settings
from mmeformer.errors import UserError
from mmeformer.model import CHECKPOINTS, EXPORTED
from mmeformer.training import launch
from mmeformer.work_dirs import choose_checkpoint, find_config

# Functions of mmengine's loops, PyTorch's data loader and prediction that do the work itself.
WORK = ("run_iter", "_next_data", "results_of_batch")
INTERRUPTED = 130
_PACKAGE = Path(__file__).parents[1]
_usual_format = warnings.formatwarning


PARSER_ONLY = ("",)
"""A command line that only asks for the parser; see :class:`ParserReady`."""


class ParserReady(Exception):  # noqa: N818 (no error)
    """Raised by :func:`parse` for :data:`PARSER_ONLY`; ``parser`` is that of the command."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__(parser.prog)
        self.parser = parser


_OTHER_NAMES = {
    "--batch": ("--batch-size", "batch_size"),
    "--batch-size": ("--batch", "batch_size"),
    "--conf": ("--score-thr",),
    "--device": ("--gpus",),
    "--devices": ("--gpus",),
    "--epochs": ("epochs",),
    "--format": ("--to",),
    "--half": ("--fp16",),
    "--imgsz": ("--size", "scale"),
    "--learning-rate": ("learning_rate",),
    "--lr": ("learning_rate",),
    "--lr0": ("learning_rate",),
    "--model": ("--arch",),
    "--nproc-per-node": ("--gpus",),
    "--output": ("--work-dir", "--out"),
    "--output-dir": ("--work-dir", "--out"),
    "--project": ("--work-dir", "--out"),
    "--threshold": ("--score-thr",),
    "--workers": ("num_workers",),
}
"""What options of other projects are called here: options, or lines of a config."""
_WITHOUT_OPTION = ("--data", "--source", "--input", "--config", "--checkpoint", "--weights")
"""What other projects give by an option and these commands by its place."""


class Parser(argparse.ArgumentParser):
    """A parser whose help is the text of a command's module, and whose errors are one line."""

    def __init__(self, text: str) -> None:
        super().__init__(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """End the process with exit status 2."""
        if "are required" in message:
            message = f"{message}; example: {self.example()}"
        self.exit(2, f"error: {message} ({self.prog} --help explains all)\n")

    def example(self) -> str:
        """The first of the examples in the help."""
        lines = [line.strip() for line in (self.description or "").splitlines()]
        return next((line for line in lines if line.startswith("mmeformer ")), f"{self.prog} ...")


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, model: bool = False
) -> argparse.Namespace:
    """Add ``--debug`` to a parser and parse the command line; suggests the nearest option.

    The command line itself is ``argv`` of what is returned.

    Args:
        parser: of the command.
        argv: the command line; None takes that of the process.
        model: the command begins with a config and a checkpoint. A work directory or a checkpoint
            with its config beside it stands for both.
    """
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    if argv is PARSER_ONLY:
        raise ParserReady(parser)
    argv = list(sys.argv[1:] if argv is None else argv)
    options = list(parser._option_string_actions)
    for word in argv:
        name = word.partition("=")[0]
        # Before what is missing, which may be what the unknown option was meant for.
        if name.startswith("--") and not any(option.startswith(name) for option in options):
            parser.error(f"unrecognized arguments: {word}{_meant(parser, name)}")
    if model:
        try:
            argv = _with_config(argv)
        except UserError as error:
            parser.exit(2, f"error: {error}\n")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = "; KEY=VALUE follows --cfg-options" if "=" in unknown[0] else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    args.argv = argv
    return args


def _meant(parser: argparse.ArgumentParser, name: str) -> str:
    """What an unknown option may be meant for."""
    options = list(parser._option_string_actions)
    others = _OTHER_NAMES.get(name, ())
    if near := [other for other in others if other in options]:
        return f"; did you mean {near[0]}?"
    if others and not others[-1].startswith("-"):
        return f"; {others[-1]} is a line of the config that mmeformer init writes: change it there"
    if name in _WITHOUT_OPTION and isinstance(parser, Parser):
        return f"; give its value without it: {parser.example()}"
    near = get_close_matches(name, [option for option in options if option != "--help"], 1)
    return f"; did you mean {near[0]}?" if near else ""


def _with_config(argv: list[str]) -> list[str]:
    """A command line that begins with a config and a checkpoint.

    Raises:
        UserError: a folder has no config or no checkpoint, or an exported file has none before it.
    """
    if not argv:
        return argv
    first, rest = Path(argv[0]), argv[1:]
    suffix = first.suffix.lower()
    if suffix in EXPORTED:
        raise UserError(
            f"{first} is an exported file, whose config comes before it; Python needs the file "
            f'alone: mmeformer.load("{first}")("photo.jpg").save("out.png")'
        )
    if suffix in CHECKPOINTS and first.is_file():
        return [str(find_config(first.parent)), *argv]
    if first.is_dir():
        config = str(find_config(first))
        if rest and Path(rest[0]).suffix.lower() in (*CHECKPOINTS, *EXPORTED):
            return [config, *rest]
        return [config, str(choose_checkpoint(first)), *rest]
    if suffix == ".py" and rest and Path(rest[0]).is_dir():
        return [argv[0], str(choose_checkpoint(rest[0])), *rest[1:]]
    if not first.name.startswith("-") and suffix not in configs.SUFFIXES:
        raise UserError(f"there is no work directory {first}")
    return argv


def run(work: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Run a command; returns the exit status: 1 after an error, else what ``work`` returns, or 0.

    An error is printed as one line that begins with ``error:``. Its traceback is printed before
    that line with ``--debug``, and also if the error is not a
    :class:`~mmeformer.errors.UserError` and was raised in the middle of training, testing or
    prediction: then the input is rarely the cause, and nobody should have to repeat a long run to
    see where it failed. Of the processes that ``--gpus`` starts, the first prints its error line.
    Warnings of this project are one line each, too.
    """
    warnings.formatwarning = _format_warning
    try:
        return work(args) or 0
    except KeyboardInterrupt:
        if launch.shows_error():
            print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        text = settings.explain(error, getattr(args, "loaded", {}))
        known = text is not None or isinstance(error, UserError)
        shown = args.debug or not (known or _before_work(error))
        if shown:
            traceback.print_exc()
        if launch.shows_error() or shown:
            print(f"error: {text or one_text(error)}", file=sys.stderr)
        return 1


def _format_warning(message, category, filename, lineno, line=None) -> str:
    """Without the place in our code; the place of others' warnings tells whose they are."""
    if Path(filename).is_relative_to(_PACKAGE):
        return f"warning: {message}\n"
    return _usual_format(message, category, filename, lineno, line)


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


def add_config(parser: argparse.ArgumentParser, or_work_dir: bool = False) -> None:
    """Add the argument that names a config, with a checkpoint behind it, or a work directory."""
    text = "config file, or its path below mmeformer's configs/"
    if or_work_dir:
        text += "; or, in place of config and checkpoint, a work directory"
    parser.add_argument("config", help=text)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share; :func:`prepare_run` reads them."""
    parser.add_argument("--work-dir", help="folder for logs and checkpoints")
    add_config_options(parser)
    parser.add_argument(
        "--gpus",
        type=_count,
        metavar="N",
        help="start one process on each of N GPUs, or N on the CPU if there is none",
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="how the processes were started, if not by --gpus: torchrun, srun or mpirun",
    )
    # torch.distributed.launch passes --local-rank; torchrun sets LOCAL_RANK instead.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number from 1 on")
    return int(text)


def start_processes(command: str, args: argparse.Namespace) -> int:
    """Run the same command line in the processes of ``--gpus``; returns the exit status."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--gpus")
    _, others = own.parse_known_args(args.argv)
    return launch.start([command, "--launcher", "pytorch", *others], args.gpus)


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
            "--launcher pytorch is for processes that torchrun starts: use --gpus N in place of it"
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
