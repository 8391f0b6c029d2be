# SPDX-License-Identifier: Apache-2.0
"""Print a script with which a shell completes commands, options and their values.

Examples:
    mmeformer completion bash > ~/.local/share/bash-completion/completions/mmeformer
    mmeformer completion zsh >> ~/.zshrc
    mmeformer completion fish > ~/.config/fish/completions/mmeformer.fish
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module

from mmeformer.commands import cli
from mmeformer.commands.__main__ import COMMANDS, summary


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("shell", choices=list(SCRIPTS))
    return cli.parse(parser, argv)


def parser_of(command: str) -> argparse.ArgumentParser | None:
    """The parser of a sub-command; None if it has no options."""
    try:
        module = import_module(f"mmeformer.commands.{COMMANDS[command]}")
        if hasattr(module, "parse_args"):
            module.parse_args(cli.PARSER_ONLY)
    except cli.ParserReady as ready:
        return ready.parser
    return None


def words(command: str) -> tuple[list[str], dict[str, list[str]]]:
    """Options of a sub-command, and the choices by option ("" for those without one)."""
    options, choices = ["--help"], {}
    parser = parser_of(command)
    for action in parser._actions if parser else ():
        if action.help == argparse.SUPPRESS:
            continue
        long = [text for text in action.option_strings if text.startswith("--")]
        options += [text for text in long if text not in options]
        if action.choices is not None:
            choices[long[0] if long else ""] = [str(choice) for choice in action.choices]
    return options, choices


def bash() -> str:
    """Script for bash; zsh reads it too."""
    cases = []
    for name in COMMANDS:
        options, choices = words(name)
        values = "".join(
            f'\n        {option}) values="{" ".join(values)}" ;;'
            for option, values in choices.items()
            if option
        )
        plain = " ".join(choices.get("", []))
        case = f'\n      case $last in{values}\n        *) values="{plain}" ;;\n      esac'
        cases.append(f'    {name})\n      options="{" ".join(options)}"{case} ;;')
    return BASH.format(commands=" ".join(COMMANDS), cases="\n".join(cases))


BASH = """\
_mmeformer() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} last=${{COMP_WORDS[COMP_CWORD-1]}} options="" values=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands} --help --version" -- "$word"))
    return
  fi
  case ${{COMP_WORDS[1]}} in
{cases}
  esac
  if [[ $word == -* ]]; then
    COMPREPLY=($(compgen -W "$options" -- "$word"))
  elif [ -n "$values" ]; then
    COMPREPLY=($(compgen -W "$values" -- "$word"))
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}}
complete -o filenames -F _mmeformer mmeformer
"""


def zsh() -> str:
    """Script for zsh."""
    return "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n" + (
        bash()
    )


def fish() -> str:
    """Script for fish."""
    lines = []
    for name in COMMANDS:
        text = summary(name).replace("'", "")
        lines.append(f"complete -c mmeformer -n __fish_use_subcommand -f -a {name} -d '{text}'")
        options, choices = words(name)
        where = f"complete -c mmeformer -n '__fish_seen_subcommand_from {name}'"
        for option in options:
            values = f" -x -a '{' '.join(choices[option])}'" if option in choices else ""
            lines.append(f"{where} -l {option.removeprefix('--')}{values}")
        if "" in choices:
            lines.append(f"{where} -f -a '{' '.join(choices[''])}'")
    return "\n".join(lines) + "\n"


SCRIPTS: dict[str, Callable[[], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def work(args: argparse.Namespace) -> None:
    """Print the script."""
    print(SCRIPTS[args.shell](), end="")


def main(argv=None) -> int:
    """Run the command; returns the exit status."""
    return cli.run(work, parse_args(argv))
