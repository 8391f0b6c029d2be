# SPDX-License-Identifier: Apache-2.0
"""Starter of a task: writes labeled data for it, and a config with settings that fit.

Each task has one (``starter`` in :mod:`mmeformer.tasks`); :mod:`mmeformer.own_data` calls it. A
setting is one line of the config with its reason. Rules are common practice with their source, not
measurements of this project.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmeformer.checks.classes import mirrored
from mmeformer.labeled import LabeledData, LabeledImage
from mmeformer.variants import Variant

OFTEN = 100
"""Epochs from which training images are varied in size and direction (docs/recipes.md).

Networks that see an image less often learn more from it as it is.
"""
COMPILE_FROM = 20_000
"""Iterations from which compiling the backbone, which takes minutes, pays on a GPU."""
USUAL_SIDE = 512
"""Side of the samples that the default batch is meant for, in pixels."""


class Setting(NamedTuple):
    """One line of a config: name, value as Python writes it, and why."""

    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        # Names of classes may have line breaks.
        return f"{self.name} = {self.value}  # {' '.join(self.reason.split())}"


class Rates(NamedTuple):
    """Learning rates.

    Args:
        pretrained: for the base batch, from pretrained weights.
        scratch: for the base batch, from scratch.
        largest: for any batch: that of the task's quickstart, which trains from scratch in few
            iterations.
    """

    pretrained: float
    scratch: float
    largest: float = 2e-3


@dataclass(frozen=True)
class Plan:
    """What the settings depend on beside the data.

    Args:
        variant: of the backbone.
        checkpoint: its weights; None trains from scratch.
        labels: folder for the labels that are written.
        gpu: name of the GPU; None trains on a CPU.
        cores: of the machine.
        batch_size: measured on the GPU; None takes the default of the task.
    """

    variant: Variant
    checkpoint: str | None
    labels: Path
    gpu: str | None
    cores: int
    batch_size: int | None = None


class Starter:
    """Base class of the starters.

    Attributes:
        kinds: kinds of labels on which the task can be trained beside its own (``labels`` of its
            row), if the user asks for it.
        base_batch: batch size of the published or default learning rate on a CPU.
        rates: learning rates for that batch.
        full_rate: share of the training at the full rate, before it falls by a cosine. If it fell
            from the start it would be low for most of a short training (docs/recipes.md). RTMDet's
            recipe has 0.5 (mmdet, configs/rtmdet).
    """

    kinds: tuple[str, ...] = ()
    base_batch: int = 2
    rates = Rates(1e-4, 1e-3)
    full_rate = 0.7

    def template(self, data: LabeledData) -> str:
        """The shipped config to inherit, below ``configs/``."""
        raise NotImplementedError

    def prepare(self, data: LabeledData, folder: Path) -> LabeledData:
        """Write labels below ``folder``; returns the data that are trained on, maybe tiles."""
        raise NotImplementedError

    def settings(self, data: LabeledData, plan: Plan) -> list[Setting]:
        """The settings of this task alone."""
        raise NotImplementedError

    def body(self, data: LabeledData, plan: Plan) -> str:
        """The rest of the config, which follows from the settings."""
        raise NotImplementedError

    def sample_size(self, data: LabeledData) -> tuple[int, int]:
        """Width and height of a training sample, in pixels."""
        raise NotImplementedError

    def default_batch(self, data: LabeledData) -> int:
        """Images per step where no GPU has measured them: up to four times as many small ones.

        A step of them takes no longer, and batch norms see as many pixels.
        """
        width, height = self.sample_size(data)
        return self.base_batch * max(1, min(4, USUAL_SIDE**2 // (width * height)))

    def rates_for(self, data: LabeledData) -> Rates:
        """The learning rates; those of a task whose models differ by the data override it."""
        return self.rates

    # --- what the tasks share ---------------------------------------------------------------------

    def steps(self, data: LabeledData, plan: Plan) -> int:
        """Iterations of the training."""
        samples = self.samples(data)
        return epochs_for(samples) * math.ceil(samples / self._batch(data, plan))

    def _batch(self, data: LabeledData, plan: Plan) -> int:
        """Images per step of a data set that has at least as many."""
        return plan.batch_size or self.default_batch(data)

    def samples(self, data: LabeledData) -> int:
        """Number of training samples."""
        return len(data.of_split("train"))

    def common(self, data: LabeledData, plan: Plan) -> list[Setting]:
        """Batch, workers, learning rate, weights, precision and averaging."""
        batch = min(self._batch(data, plan), self.samples(data))
        if plan.batch_size is not None:
            why = f"per GPU; measured on {plan.gpu}: the largest that fits, up to 32"
        else:
            why = "images per step; a default that suits a CPU and their size"
        workers = min(8, plan.cores) if plan.gpu else min(2, max(1, plan.cores - 1))
        rates = self.rates_for(data)
        rate = rates.scratch if plan.checkpoint is None else rates.pretrained
        start = "from scratch" if plan.checkpoint is None else "from pretrained weights"
        steps = self.steps(data, plan)
        return [
            Setting("batch_size", str(batch), why),
            Setting("num_workers", str(workers), f"processes that load images; {plan.cores} cores"),
            Setting(
                "learning_rate",
                f"min({rates.largest:g}, {rate:g} * (batch_size / {self.base_batch}) ** 0.5)",
                f"{start}; root of the batch (AdamW: arXiv 2205.10287)",
            ),
            Setting(
                "full_rate",
                str(self.full_rate),
                "share of the training at the full learning rate, before it falls by a cosine",
            ),
            Setting(
                "warmup_iters",
                str(max(10, min(500, steps // 20))),
                f"a twentieth of the {steps} iterations, 10 to 500",
            ),
            Setting(
                "optimizer_type",
                '"AmpOptimWrapper"' if plan.gpu else '"OptimWrapper"',
                "AMP, which is faster on a GPU"
                if plan.gpu
                else "AMP (AmpOptimWrapper) needs a GPU",
            ),
            Setting(
                "averaging",
                "10",
                "weights are averaged (EMA) over the last tenth of the training so far; 20: a "
                "twentieth",
            ),
        ]

    def hooks(self, data: LabeledData, plan: Plan) -> str:
        """Config of the hooks: averaged weights, and compilation where it pays."""
        averaged = (
            'dict(type="EMAHook", ema_type="MomentumAnnealingEMA", gamma=averaging, '
            "momentum=0.0005, update_buffers=True)"
        )
        hooks, why = "*_base_.custom_hooks, averaged", ""
        if plan.gpu and (steps := self.steps(data, plan)) >= COMPILE_FROM:
            hooks += ', dict(type="mmeformer.CompileHook")'
            why = f"  # compiling pays: {steps} iterations"
        return f"averaged = {averaged}\ncustom_hooks = [{hooks}]{why}"


def backbone(plan: Plan, keys: str, **settings: str) -> str:
    """Settings of the backbone that differ from the template, as text inside ``dict(...)``.

    Args:
        plan: with variant and weights; the templates have V2-S0 with pretrained weights.
        keys: cells at stride 32 of an input, as an expression of the config.
        **settings: further settings of the backbone, as expressions.
    """
    variant = plan.variant
    parts: dict[str, str] = dict(settings)
    if variant.family == "v1":
        parts = {
            "_delete_": "True",
            "type": '"mmeformer.EfficientFormer"',
            "arch": repr_text(variant.arch),
            **parts,
        }
    elif variant.arch != "s0":
        parts["arch"] = repr_text(variant.arch)
    if plan.checkpoint is None:
        parts["norm_eval"] = "False"
        parts["layer_scale_init_value"] = "0.5"
        if variant.family == "v2":
            parts["head_bias_keys"] = keys
    parts["init_cfg"] = 'checkpoint and dict(type="Pretrained", checkpoint=checkpoint)'
    return ", ".join(f"{key}={value}" for key, value in parts.items())


def neck(plan: Plan, first: int = 0) -> str:
    """Settings of the FPN that differ from the template, as text inside ``dict(...)``.

    Args:
        plan: see :func:`backbone`.
        first: index of the finest level that the neck takes.
    """
    parts = []
    if plan.variant.name != "efficientformerv2_s0":
        parts.append(f"in_channels={list(plan.variant.architecture.widths[first:])}")
    if plan.checkpoint is None:
        parts.append('norm_cfg=dict(_delete_=True, type="BN")')
    return ", ".join(parts)


def default_checkpoint(variant: Variant) -> str:
    """ImageNet weights of a variant."""
    return f"timm://{variant.name}.snap_dist_in1k"


def repr_text(text: str) -> str:
    """A text as the configs write it: in double quotes, if that needs no escape."""
    plain = repr(text)
    return f'"{plain[1:-1]}"' if '"' not in text and plain.startswith("'") else plain


def repr_names(names: Iterable[str]) -> str:
    """A tuple of texts."""
    texts = [repr_text(name) for name in names]
    return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"


def epochs_for(images: int) -> int:
    """Epochs for a number of training images: 100 for 100, 32 for 1,000, 12 from 7,000 on.

    Between the ranges of docs/finetuning.md, by the square root; at most 200.
    """
    return max(12, min(200, round(1000 / math.sqrt(max(images, 1)))))


def epochs_setting(samples: int, unit: str = "images") -> Setting:
    """The length of a training by epochs."""
    text = f"for {samples} {unit}; see docs/finetuning.md"
    return Setting("epochs", str(epochs_for(samples)), text)


def varied(name: str, often: Any, seldom: Any, what: str, images: int) -> Setting:
    """A setting of how training images are varied, by how often each is seen.

    Args:
        name: of the setting.
        often: its value from :data:`OFTEN` epochs on.
        seldom: its value in fewer.
        what: the setting does, for people.
        images: for training.
    """
    epochs = epochs_for(images)
    if epochs >= OFTEN:
        return Setting(name, str(often), f"{what}; each is seen {epochs} times")
    return Setting(name, str(seldom), f"{what}; not in fewer than {OFTEN} epochs")


def flips(data: LabeledData, upright: bool = True) -> Setting:
    """How often training images are flipped.

    Args:
        data: if two classes are each other's mirror image by their names, images are not mirrored.
        upright: whether images have an upper side; those from above have not.
    """
    if pair := mirrored(data.classes):
        value = "[0.0, 0.0, 0.0]" if upright else "[0.0, 0.0, 0.5]"
        why = f"a mirrored {pair[0]} looks like a {pair[1]}"
    else:
        value = "[0.5, 0.0, 0.0]" if upright else "[0.25, 0.25, 0.25]"
        why = "[0.25, 0.25, 0.25] if images have no upper side" if upright else "seen from above"
    return Setting("flips", value, f"shares flipped left to right, upside down, both; {why}")


def sides_of(images: Sequence[LabeledImage]) -> tuple[int, int]:
    """Median of the longer and of the shorter sides of images, in pixels."""
    long = np.median([max(image.width, image.height) for image in images])
    short = np.median([min(image.width, image.height) for image in images])
    return int(long), int(short)


def object_sizes(data: LabeledData) -> np.ndarray:
    """Square root of the area of every training object's box or rotated box, in pixels.

    Without objects, one size of 32.
    """
    sizes = []
    for image in data.of_split("train"):
        for item in image.objects:
            if item.corners is not None:
                a, b, c, _ = np.reshape(item.corners, (4, 2))
                area = float(np.hypot(*(b - a)) * np.hypot(*(c - b)))
            else:
                area = item.box[2] * item.box[3]
            sizes.append(math.sqrt(max(area, 0.0)))
    return np.array(sizes or [32.0])


def smallest(data: LabeledData) -> float:
    """Size below which a tenth of the training objects are, in pixels."""
    return float(np.percentile(object_sizes(data), 10))


def enlarged(factor: float) -> str:
    """How images are resized, for people."""
    if abs(factor - 1) < 0.05:
        return "as they are"
    return f"enlarged {factor:.2g} times" if factor > 1 else f"reduced to {factor:.0%}"


def round_up(value: float) -> int:
    """The next multiple of 32, the coarsest stride; up to rounding errors."""
    return max(32, math.ceil(value / 32 - 1e-6) * 32)


def nearest(value: float, choices: Sequence[Any]) -> Any:
    """The choice with the nearest ratio."""
    return min(choices, key=lambda choice: abs(math.log(max(value, 1e-6) / choice)))


def file_names(images: Iterable[LabeledImage], root: Path) -> dict[Path, str]:
    """A name of its own for the files that are written for each image, without suffix.

    It is that of the image. Where several images have the same, their folders come before it.

    Args:
        images: of the data set.
        root: its folder.

    Returns:
        Names by the path of the image.
    """
    # An only image is there twice, for training and validation.
    paths = dict.fromkeys(image.path for image in images)
    counts = Counter(path.stem for path in paths)
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        name = path.stem
        if counts[name] > 1:
            name = Path(relative_to(path, root)).with_suffix("").as_posix().replace("/", "_")
        # As a/1.jpg and a/1.png, or a/b_1.jpg and a_b/1.jpg.
        while name in taken:
            name += "_"
        taken.add(name)
        names[path] = name
    return names


def relative_to(path: Path, root: Path) -> str:
    """A path with ``/``, relative to the root if it is below it."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
