# SPDX-License-Identifier: Apache-2.0
"""Compare recipes at the same processor time: which is better on which data set?

    python benchmarks/recipes.py --minutes 20 --out work_dirs/recipes \
        --compare nuclei template_nuclei.py generated_nuclei.py \
        --compare streets template_streets.py generated_streets.py

Each config of a comparison is trained with every seed; the first is the one to compare with. First
a few iterations are timed; then the length of the training and the ends of its schedule are set so
that the training takes the given processor time, without validation. Data are loaded in the process
itself, so that their processor time counts too. The metric is that of the last validation, by the
weights that a checkpoint would have (with EMA the averages).

The folder gets results.json, and a second run continues where the first one stopped. The table is
in Markdown: mean and standard deviation over the seeds, and the difference of the means.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from mmengine.config import Config
from mmengine.hooks import Hook

from mmeformer import configs
from mmeformer.files import write_text
from mmeformer.training import engine

TIMED = 8
"""Iterations that are timed to choose the length of a training; the first ones are left out."""
WARM = 3


class Clock(Hook):
    """Sums the processor time of the training without its validations.

    Attributes:
        seconds: in all.
        marks: processor time at the end of every iteration.
    """

    priority = "LOWEST"

    def __init__(self) -> None:
        self.seconds = 0.0
        self.marks: list[float] = []
        self.begin = 0.0

    def before_train(self, runner) -> None:
        """Start."""
        self.begin = time.process_time()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Note the time."""
        self.marks.append(time.process_time())

    def before_val(self, runner) -> None:
        """Pause."""
        self.seconds += time.process_time() - self.begin

    def after_val(self, runner) -> None:
        """Go on."""
        self.begin = time.process_time()

    def after_train(self, runner) -> None:
        """Stop."""
        self.seconds += time.process_time() - self.begin


def prepare(path: str, folder: Path, seed: int, options: dict | None) -> Config:
    """The config of one run, without workers, pictures and checkpoints."""
    config = configs.load_config(path, options)
    config.work_dir = str(folder)
    config.experiment_name = folder.as_posix().replace("/", "_")
    config.visualizer.name = config.experiment_name
    config.randomness = dict(seed=seed)
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
    config.default_hooks.checkpoint.update(interval=10**9, save_last=False, save_best=None)
    config.default_hooks.visualization = None
    return config


def metric_of(path: str, options: dict | None) -> str:
    """The metric that chooses the best checkpoint of a config."""
    return configs.load_config(path, options).default_hooks.checkpoint.get("save_best") or "auto"


def set_length(config: Config, length: int, epoch: int = 1) -> None:
    """Train for this many epochs or iterations, with one validation at the end.

    What ended with the training before ends with it now. What began or ended earlier (warm-ups)
    keeps its share of the training, but not more than a tenth of it, and 10 iterations at least.

    Args:
        config: is changed.
        length: in the unit of the config.
        epoch: iterations of an epoch; of no matter to a training of iterations.
    """
    plan = config.train_cfg
    key = "max_epochs" if "max_epochs" in plan else "max_iters"
    before = plan[key]
    plan.update({key: length, "val_interval": length})
    per_unit = epoch if key == "max_epochs" else 1
    for scheduler in config.param_scheduler:
        by_epoch = scheduler.get("by_epoch", True)
        unit, least = (1, 1) if by_epoch else (per_unit, 10)
        for name in ("begin", "end", "T_max"):
            if scheduler.get(name) == before * unit:
                scheduler[name] = length * unit
            elif scheduler.get(name):
                share = min(round(scheduler[name] * length / before), length * unit // 10)
                scheduler[name] = max(least, share)
        if milestones := scheduler.get("milestones"):
            scheduler.milestones = [max(1, round(m * length / before)) for m in milestones]


def run(config: Config) -> tuple[Clock, dict[str, float], int]:
    """Train; returns the clock, the metrics of the last validation, and the epoch's length."""
    runner = engine.build_train_runner(config, trackers=["none"])
    clock, seen = Clock(), Last()
    runner.register_hook(clock)
    runner.register_hook(seen)
    runner.train()
    return clock, seen.metrics, len(runner.train_dataloader)


class Last(Hook):
    """Keeps the metrics of the last validation."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def after_val_epoch(self, runner, metrics=None) -> None:
        """Keep them."""
        self.metrics = {name: float(value) for name, value in (metrics or {}).items()}


def seconds_per_iteration(path: str, folder: Path, options: dict | None) -> tuple[float, int]:
    """Processor time of an iteration, and iterations per epoch, from a few iterations."""
    config = prepare(path, folder, 0, options)
    config.train_cfg = dict(type="IterBasedTrainLoop", max_iters=TIMED, val_interval=10**9)
    config.param_scheduler = []
    config.default_hooks.early_stopping = None
    config.val_cfg = config.val_dataloader = config.val_evaluator = None
    clock, _, length = run(config)
    return (clock.marks[-1] - clock.marks[WARM - 1]) / (TIMED - WARM), length


def train(path: str, folder: Path, seed: int, minutes: float, options: dict | None) -> dict:
    """Train one config with one seed for a processor time; returns what is kept of it."""
    step, epoch = seconds_per_iteration(path, folder / "timed", options)
    config = prepare(path, folder, seed, options)
    by_epoch = "max_epochs" in config.train_cfg
    length = max(1, round(60 * minutes / step / (epoch if by_epoch else 1)))
    set_length(config, length, epoch)
    clock, metrics, _ = run(config)
    return dict(
        metrics=metrics,
        minutes=clock.seconds / 60,
        length=length,
        unit="epochs" if by_epoch else "iterations",
    )


def table(results: dict, comparisons, metrics: dict[str, str]) -> str:
    """The results as a Markdown table."""
    lines = ["| data | metric | recipe | length | CPU min | mean ± sd | difference |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, *paths in comparisons:
        means = []
        for path in paths:
            runs = [item for key, item in results.items() if key.startswith(f"{name}|{path}|")]
            if not runs:
                continue
            metric = metrics[name]
            if metric not in runs[0]["metrics"]:
                metric = next(iter(runs[0]["metrics"]))
            values = [item["metrics"][metric] for item in runs]
            means.append(statistics.mean(values))
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            used = statistics.mean(item["minutes"] for item in runs)
            change = f"{means[-1] - means[0]:+.4g}" if len(means) > 1 else ""
            lines.append(
                f"| {name} | {metric} | {Path(path).stem} | {runs[0]['length']} {runs[0]['unit']} "
                f"| {used:.1f} | {means[-1]:.4g} ± {spread:.2g} ({len(values)}) | {change} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        action="append",
        required=True,
        metavar=("NAME", "CONFIG"),
        help="name of a data set and two or more configs for it; may be repeated",
    )
    parser.add_argument("--minutes", type=float, default=20, help="processor time of a training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("work_dirs/recipes"))
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()

    options = dict(item.split("=", 1) for item in args.cfg_options)
    path = args.out / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    # Seeds outermost: what is there after an interruption is a fair comparison.
    for seed in range(args.seeds):
        for name, *pair in args.compare:
            for config in pair:
                key = f"{name}|{config}|{seed}|{args.minutes:g}"
                if key not in results:
                    folder = args.out / name / Path(config).stem / str(seed)
                    results[key] = train(config, folder, seed, args.minutes, options)
                    write_text(path, json.dumps(results, indent=1))
    metrics = {name: metric_of(first, options) for name, first, *_ in args.compare}
    chosen = {key: item for key, item in results.items() if key.endswith(f"|{args.minutes:g}")}
    print(table(chosen, args.compare, metrics))


if __name__ == "__main__":
    main()
