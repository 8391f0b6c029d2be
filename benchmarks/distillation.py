# SPDX-License-Identifier: Apache-2.0
"""Train V2-S0 on the photographs of the quickstart, alone and with a teacher, once per seed.

The teacher is a V2-S1 that is trained here, on the same crops. Prints the table of
docs/classification.md: top-1 on the validation crops in percent.

Use: ``python benchmarks/distillation.py FOLDER``. About 5 minutes of processor time.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmeformer import configs
from mmeformer.synthetic.photographs import write_photograph_dataset
from mmeformer.training import engine

QUICKSTART = "classification/efficientformerv2-s0_quickstart.py"
SEEDS = (0, 1, 2)
SIDE = 32
"""Of the crops in pixels; half of the quickstart's, which saves time."""
STUDENT_EPOCHS, TEACHER_EPOCHS = 4, 8
"""Students stop before their score is at its ceiling."""


def recipe(data: Path, epochs: int, seed: int, model: dict[str, Any]) -> Config:
    """The quickstart's config with two classifiers and other settings."""
    config = configs.load_config(QUICKSTART)
    config.model.head.distillation = True
    config.merge_from_dict(dict(model=model))
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.data_root = str(data)
    resize, crop = config.test_dataloader.dataset.pipeline[1:3]
    resize.scale = crop.crop_size = SIDE
    config.val_dataloader.dataset.pipeline = config.test_dataloader.dataset.pipeline
    config.train_cfg.update(max_epochs=epochs, val_interval=epochs)
    config.param_scheduler[1].end = epochs
    config.default_hooks.checkpoint.interval = epochs
    config.randomness.seed = seed
    config.log_level = "WARNING"
    return config


def train(config: Config, folder: Path) -> float:
    """Train and test; top-1 in percent. The config and the checkpoint stay in ``folder``."""
    config.work_dir = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.dump(folder / "config.py")
    engine.build_train_runner(config.copy()).train()
    checkpoint = (folder / "last_checkpoint").read_text().strip()
    return engine.build_test_runner(config, checkpoint).test()["accuracy/top1"]


def main(folder: Path) -> None:
    """Train everything and print the table."""
    data = write_photograph_dataset(folder / "data", size=SIDE)
    larger = dict(backbone=dict(arch="s1"), head=dict(in_channels=224))
    teacher = folder / "teacher"
    print(f"teacher: {train(recipe(data, TEACHER_EPOCHS, 0, larger), teacher):.1f}")
    checkpoint = (teacher / "last_checkpoint").read_text().strip()
    taught = dict(teacher=dict(config=str(teacher / "config.py"), checkpoint=checkpoint))
    print("| S0 | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | mean |")
    print("|---|" + "---|" * (len(SEEDS) + 1))
    kinds: dict[str, dict[str, Any]] = {
        "alone": {},
        "with the teacher (hard)": {**taught, "head": dict(kind="hard")},
    }
    for name, model in kinds.items():
        scores = [
            train(recipe(data, STUDENT_EPOCHS, seed, model), folder / f"{name}-{seed}")
            for seed in SEEDS
        ]
        row = " | ".join(f"{score:.1f}" for score in (*scores, statistics.mean(scores)))
        print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for data and trainings")
    main(parser.parse_args().folder)
