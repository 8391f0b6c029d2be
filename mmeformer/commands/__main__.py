# SPDX-License-Identifier: Apache-2.0
"""EfficientFormer V1 and V2 for OpenMMLab: train, test, predict and export.

The command ``mmeformer``: one sub-command per module of this folder. This file imports only the
standard library, so that help and mistyped words are answered at once.
"""

from __future__ import annotations

import ast
import os
import sys
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from mmeformer import signals
from mmeformer.version import __version__

_FOLDER = Path(__file__).parent
_ORDER = {
    "init": "init",
    "train": "train",
    "test": "test",
    "report": "report",
    "predict": "predict",
    "export": "export",
    "check": "check_dataset",
    "convert": "convert_checkpoint",
    "profile": "profile",
    "doctor": "doctor",
    "quickstart": "quickstart",
}
_NOT_COMMANDS = ("__init__", "__main__", "cli")
COMMANDS = _ORDER | {
    path.stem.replace("_", "-"): path.stem
    for path in sorted(_FOLDER.glob("*.py"))
    if path.stem not in (*_NOT_COMMANDS, *_ORDER.values())
}
"""Module of each sub-command: those of a usual project in their order, then all others."""

_OTHER_WORDS = {
    "benchmark": "profile",
    "detect": "predict",
    "eval": "test",
    "evaluate": "test",
    "finetune": "train",
    "fit": "train",
    "info": "doctor",
    "new": "init",
    "track": "predict --track",
    "val": "test",
    "validate": "test",
}
"""What commands of other projects are called here."""


def overview() -> str:
    """Help of ``mmeformer`` itself: every sub-command with the first line of its module."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{summary(name)}" for name in COMMANDS]
    return "\n".join(
        [
            "usage: mmeformer COMMAND ...",
            "",
            "EfficientFormer V1 and V2 for OpenMMLab: train, test, predict and export.",
            "",
            *lines,
            "",
            "Example, on your own images and labels:",
            "  mmeformer init datasets/nuclei && mmeformer train nuclei.py",
            "",
            "mmeformer COMMAND --help explains a command; mmeformer --version prints the version.",
            "Completion of words in the shell (bash; also zsh and fish):",
            '  eval "$(mmeformer completion bash)"',
        ]
    )


def summary(command: str) -> str:
    """First line of what a sub-command says of itself, read without importing it."""
    source = (_FOLDER / f"{COMMANDS[command]}.py").read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source)) or ""
    return text.splitlines()[0].rstrip(".")


def leave_backend_of_notebook() -> None:
    """Take away the backend of matplotlib that a notebook in another environment has set.

    Without its module, matplotlib would not even be imported.
    """
    backend = os.environ.get("MPLBACKEND", "")
    module = backend.removeprefix("module://").partition(".")[0]
    if backend.startswith("module://") and find_spec(module) is None:
        del os.environ["MPLBACKEND"]


def main(argv: list[str] | None = None) -> int:
    """Run a sub-command; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    name = arguments[0] if arguments else "--help"
    if name == "help" and arguments[1:]:
        return main([arguments[1], "--help"])
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name in ("-V", "--version", "version"):
        print(f"mmeformer {__version__}")
        return 0
    if name not in COMMANDS:
        near = [*filter(None, [_OTHER_WORDS.get(name)]), *get_close_matches(name, COMMANDS, n=1)]
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        print(f"error: mmeformer has no command {name!r}; {hint}", file=sys.stderr)
        return 2
    if name == "train":
        signals.leave_on_signals()
    leave_backend_of_notebook()
    # Help and errors of argparse begin with this.
    sys.argv[0] = f"mmeformer {name}"
    try:
        command = import_module(f"mmeformer.commands.{COMMANDS[name]}")
    except Exception as error:
        if "--debug" in arguments:
            raise
        from mmeformer.doctor import known_fix

        text = f"{type(error).__name__}: {error}"
        missing = isinstance(error, ModuleNotFoundError)
        usual = "pip install 'mmeformer[all]'" if missing else "mmeformer doctor names the fix"
        fix = known_fix(text) or usual
        print(f"error: this installation does not work: {text}; {fix}", file=sys.stderr)
        return 1
    return command.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
