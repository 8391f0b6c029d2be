# SPDX-License-Identifier: Apache-2.0
"""What the docs name exists: files, headings, paths, commands with their options, Python names."""

import ast
import importlib
import re

import pytest

from mmeformer.commands.__main__ import COMMANDS
from mmeformer.commands.completion import words
from mmeformer.paths import config_dir

ROOT = config_dir().parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "configs").glob("*/README.md")),
]
EACH = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
YOURS = ("my_config.py",)
"""Ends of paths of the reader's own files, and of names that are shortened."""


def anchors(page):
    """GitHub's names of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@EACH
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@EACH
def test_paths(page):
    text = page.read_text(encoding="utf-8")
    # Not names with a part left out, as in gfl-lite_..._quickstart.py or configs/*/README.md.
    for path in re.findall(r"(?<![\w/.])(?:tools|tests|benchmarks|configs)/[\w./*-]+", text):
        path = path.rstrip(".")
        if not path.endswith(YOURS) and ".." not in path:
            assert list(ROOT.glob(path.replace("...", "*"))), path


def command_lines(text):
    """Commands and their options, in blocks and in the text: ``mmeformer predict ... --track``."""
    modules = {module: name for name, module in COMMANDS.items()}
    text = re.sub(r"\\\n\s*", " ", text)
    for tool, name, line in re.findall(
        r"(?:tools/(\w+)\.py|(?<![\w'/.-])mmeformer ([a-z][a-z-]*))([^\n`]*)", text
    ):
        name = modules.get(tool, name)
        if name in COMMANDS:
            yield name, re.findall(r"(?<!\S)\[?(--[a-z][a-z0-9-]*)", line.partition("  #")[0])


@EACH
def test_options(page):
    for name, options in command_lines(page.read_text(encoding="utf-8")):
        assert set(options) <= set(words(name)[0]), (name, options)


@EACH
def test_python(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "mmeformer":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")
    for dotted in re.findall(r"`(mmeformer(?:\.[a-z_]+)+)`", page.read_text(encoding="utf-8")):
        module, _, name = dotted.rpartition(".")
        found = importlib.import_module(module)
        assert hasattr(found, name) or importlib.import_module(dotted)


def test_commands_are_found_in_the_text():
    text = "`tools/predict.py C W \\\n  --out x` and `mmeformer check CONFIG --full  # --no`"
    assert list(command_lines(text)) == [("predict", ["--out"]), ("check", ["--full"])]


def test_the_package_names_commands_and_not_scripts():
    """A wheel has no folder ``tools`` where its user would look."""
    for path in (ROOT / "mmeformer").rglob("*.py"):
        if path.parent.name != "commands":
            found = re.findall(
                r"\btools/\w+\.py|\b\w+_(?:dota|dataset)\.py", path.read_text("utf-8")
            )
            assert not found, path
