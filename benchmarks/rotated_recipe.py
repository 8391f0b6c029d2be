# SPDX-License-Identifier: Apache-2.0
"""Train every variant with the rotated recipe and plot losses and gradient norms side by side.

    python benchmarks/rotated_recipe.py --out work_dirs/recipe
    python benchmarks/rotated_recipe.py --out work_dirs/recipe-dota --data data/patches --side 256

Shows whether training is stable. Each variant is trained from scratch with the quickstart's recipe
(AdamW without decay for norms, biases and layer scales, warm-up, gradient clipping, cosine, trained
batch norms) on generated scenes, or on patches in DOTA's format from tools/split_dota.py. The
folder gets losses and gradient norms as JSON and as a plot. A second run continues where the first
one stopped.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from mmengine.fileio import dump, load

from mmeformer import configs
from mmeformer.rotated import read_labels
from mmeformer.synthetic.aerial import CLASSES, write_dota_dataset
from mmeformer.training import engine
from mmeformer.variants import VARIANTS

QUICKSTART = "rotated/rotated-gfl-le135_efficientformerv2-s0_fpn_quickstart.py"


def build_config(variant: str, folder: Path, side: int, args: argparse.Namespace):
    """The quickstart's recipe with another backbone and data set."""
    config = configs.load_config(QUICKSTART)
    other = configs.load_config(
        f"rotated/rotated-gfl-le135_{variant.replace('_', '-')}_fpn_1x_dota.py"
    ).model
    scratch = dict(layer_scale_init_value=1.0, bias_grid=max(1, side // 32), init_cfg=None)
    if VARIANTS[variant].family == "v2":
        scratch |= dict(norm_eval=False, head_bias_keys=max(1, side // 32) ** 2)
    config.model.backbone = {**other.backbone, **scratch}
    config.model.neck.in_channels = other.neck.in_channels
    config.model.bbox_head.num_classes = len(args.classes)
    config.work_dir = str(folder)
    config.visualizer.name = str(folder)
    config.optim_wrapper.optimizer.lr = args.lr
    dataset = config.train_dataloader.dataset
    dataset.data_root, dataset.metainfo = str(args.data), dict(classes=args.classes)
    config.train_dataloader.batch_size = args.batch
    config.train_cfg.max_iters = config.default_hooks.checkpoint.interval = args.iterations
    config.param_scheduler[-1].end = args.iterations
    config.default_hooks.logger.interval = 1
    config.log_processor.window_size = 1
    for key in ("val_dataloader", "val_cfg", "val_evaluator"):
        config[key] = None
    config.train_cfg.pop("val_interval")
    return config


def train(variant: str, args: argparse.Namespace) -> list[dict]:
    """Train a variant, unless that is done; return step, loss and gradient norm per iteration."""
    folder = args.out / variant
    curve = folder / "curve.json"
    if curve.is_file():
        return load(str(curve))
    runner = engine.build_train_runner(build_config(variant, folder, args.side, args))
    runner.train()
    lines = Path(runner.log_dir, "vis_data", "scalars.json").read_text().splitlines()
    keys = ("step", "loss", "grad_norm")
    rows = [{key: row[key] for key in keys} for row in map(json.loads, lines) if "loss" in row]
    dump(rows, str(curve))
    return rows


def draw(curves: dict[str, list[dict]], picture: Path) -> None:
    """Plot loss and gradient norm before clipping, as means over ten iterations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, rows in curves.items():
        for axes, key in zip(panels, ("loss", "grad_norm"), strict=True):
            values = np.array([row[key] for row in rows])
            count = len(values) // 10
            means = values[: count * 10].reshape(count, 10).mean(1)
            axes.plot(np.arange(1, count + 1) * 10, means, label=name)
            axes.set(title=key, xlabel="iteration", yscale="log")
            axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Train all variants, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("work_dirs/recipe"))
    parser.add_argument("--data", type=Path, help="folder with train/images and train/annfiles")
    parser.add_argument("--side", type=int, default=128, help="of the patches, in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    args = parser.parse_args()
    if args.data is None:
        args.data, args.classes = Path("data/quickstart-aerial"), CLASSES
        write_dota_dataset(args.data)
    else:
        files = sorted(args.data.glob("train/annfiles/*.txt"))
        args.classes = tuple(sorted({item.name for file in files for item in read_labels(file)}))
    curves = {}
    for variant in args.variants:
        curves[variant] = train(variant, args)
        draw(curves, args.out / "loss_curves.png")
        losses = np.array([row["loss"] for row in curves[variant]])
        print(
            f"{variant}: mean loss of the first ten iterations {losses[:10].mean():.3f}, of the "
            f"last ten {losses[-10:].mean():.3f}, highest {losses.max():.3f}, all finite: "
            f"{np.isfinite(losses).all()}",
            flush=True,
        )


if __name__ == "__main__":
    main()
