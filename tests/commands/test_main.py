# SPDX-License-Identifier: Apache-2.0
"""The command ``mmeformer``: help, version, nearest words, completion."""

import re
import shutil
import subprocess
import sys

import pytest

from mmeformer.commands import completion
from mmeformer.commands.__main__ import COMMANDS, main, summary
from mmeformer.tasks import TASKS
from mmeformer.version import __version__


def test_help_and_version(capsys):
    assert main(["--help"]) == 0 and main([]) == 0 and main(["help"]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\S.*", text, re.MULTILINE) and summary(name)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mmeformer {__version__}\n"


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from mmeformer.commands.__main__ import main; main(['--help']); "
        "print([m for m in ('torch', 'mmengine', 'cv2', 'numpy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_package_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "mmeformer", "--version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == f"mmeformer {__version__}\n"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trian", "no command 'trian'; did you mean train?"),
        ("quick-start", "did you mean quickstart?"),
        ("dance", "choose one of init, train, test"),
    ],
)
def test_nearest_command(word, message, capsys):
    assert main([word]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_nearest_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["init", "data", "--tsak", "detection"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --tsak detection; did you mean --task?" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mmeformer"])
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: mmeformer {command} ") and f"    mmeformer {command}" in text


def test_completion_knows_options_and_choices():
    options, choices = completion.words("init")
    assert {"--task", "--arch", "--out", "--help"} <= set(options)
    assert choices["--task"] == list(TASKS)
    assert completion.words("quickstart")[1][""] == list(TASKS)
    assert "--local_rank" not in completion.words("train")[0]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["ini"], {"init"}),
        (["init", "--ta"], {"--task"}),
        (["init", "--task", "seg"], {"segmentation"}),
        (["quickstart", "ro"], {"rotated"}),
    ],
)
def test_bash_completes(line, expected):
    words = " ".join(["mmeformer", *line])
    script = completion.bash() + (
        f"COMP_WORDS=({words}); COMP_CWORD={len(line)}; _mmeformer; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert set(done.stdout.split()) == expected


def test_fish_script_names_every_command():
    text = completion.fish()
    assert all(f"-f -a {name} -d '" in text for name in COMMANDS)
