# SPDX-License-Identifier: Apache-2.0
"""Every task once, in about a minute: train two steps, predict, export to ONNX and compare.

``python tests/smoke.py`` needs what ``pip install "mmeformer[all]"`` installs. The mmeformer in use
is the installed one, not the checkout around this file.
"""

import sys
import tempfile
from pathlib import Path

# Before mmeformer, as users of mmdet do: the operators must be found all the same.
from mmdet.apis import init_detector  # isort: skip
import tiny  # isort: skip

from mmeformer import __file__ as installed
from mmeformer.commands import export, predict


def run_task(task: str, folder: Path) -> None:
    """Train, predict and export a tiny model of one task; an exception if anything fails."""
    config = tiny.ALL_TASKS[task](folder, iterations=2)
    losses = tiny.train(config, folder / "work")
    assert len(losses) == 2 and all(0 < loss < 1e4 for loss in losses.values()), losses
    file, checkpoint = str(folder / "config.py"), str(folder / "work" / "iter_2.pth")
    config.dump(file)
    if task in ("detection", "rotated"):
        init_detector(file, checkpoint, device="cpu")
    picture = str(
        next(path for path in sorted(folder.rglob("*")) if path.suffix in (".jpg", ".png"))
    )
    out = folder / "results"
    assert predict.main([file, checkpoint, picture, "--out", str(out)]) == 0
    assert any(out.rglob("*.*")), "predict wrote nothing"
    onnx = folder / "model.onnx"
    size = ["--size", "64", "64"]
    assert export.main([file, checkpoint, "--to", "onnx", *size, "--out", str(onnx)]) == 0
    assert onnx.stat().st_size > 10_000


def main() -> int:
    """Run all tasks; returns 0."""
    print(f"mmeformer of {Path(installed).parent}, Python {sys.version.split()[0]}", flush=True)
    for task in tiny.ALL_TASKS:
        with tempfile.TemporaryDirectory() as folder:
            run_task(task, Path(folder))
        print(f"{task}: trained, predicted and exported", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
