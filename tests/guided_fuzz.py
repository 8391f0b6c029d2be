# SPDX-License-Identifier: Apache-2.0
"""Fuzz the readers of tests/test_fuzz.py, guided by the lines that an input reaches (atheris).

    python tests/guided_fuzz.py --seconds 120

Needs ``pip install atheris``. The exit status is 1 if an input leads to an error that is not for
users; the input is kept, and its path printed. It then belongs into tests/test_fuzz.py.
"""

import argparse
import io
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mmeformer"]):
    import test_fuzz as cases

import torch

from mmeformer.rotated.dota import read_labels

GRACE = 120
"""Seconds to import, and to end."""


def read_dota(path, data):
    """Labels or None; asserts that errors are for users."""
    path.write_bytes(data)
    try:
        return read_labels(path)
    except ValueError as error:
        assert str(path) in str(error)
        return None


def read_metadata(path, data):
    """Metadata or None; asserts that errors are for users."""
    return cases.read_metadata(data.decode(errors="replace"))


def seeds(folder):
    """Functions of a path and bytes, each with files to start from."""
    weights = io.BytesIO()
    torch.save(dict(meta=dict(epoch=1), state_dict=dict(a=torch.ones(3))), weights)
    metadata = cases.json.dumps(cases.METADATA).encode()
    return {
        "annotations": (cases.read_annotations, [cases.COCO]),
        "dota labels": (read_dota, [b"imagesource:Map\ngsd:0.2\n1 1 9 1 9 5 1 5 ship 0\n"]),
        "metadata": (read_metadata, [metadata]),
        "checkpoints": (cases.read_weights, [cases.WEIGHTS, weights.getvalue()]),
        "pictures": (cases.read_picture, cases.pictures(folder)),
    }


def fuzz(reader, files, seconds, folder):
    """Read files for a time; ends the process."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for index, content in enumerate(files):
        (corpus / str(index)).write_bytes(content)
    options = [
        f"-max_total_time={seconds}",
        f"-artifact_prefix={folder}/",
        "-max_len=4096",
        "-timeout=60",
        "-rss_limit_mb=8192",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda data: reader(folder / "file", data))
    atheris.Fuzz()


def main():
    """Fuzz all readers, one after the other, or one; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=120, help="in all (%(default)s)")
    parser.add_argument("--reader", help="only this one")
    args = parser.parse_args()
    kept = Path(tempfile.mkdtemp(prefix="fuzz-"))
    readers = seeds(kept)
    if args.reader:
        fuzz(*readers[args.reader], args.seconds, kept)
    failed = []
    for name in readers:
        print(f"--- {name}", flush=True)
        seconds = max(1, args.seconds // len(readers))
        command = [sys.executable, __file__, "--reader", name, "--seconds", str(seconds)]
        try:
            code = subprocess.run(command, timeout=seconds + GRACE).returncode
        except subprocess.TimeoutExpired:
            failed.append(f"{name}: did not end {GRACE} s after its time")
        else:
            if code:
                failed.append(f"{name}: exit status {code}; its last lines name the input")
    print("\n".join(failed) or "nothing found")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
