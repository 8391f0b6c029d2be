# SPDX-License-Identifier: Apache-2.0
"""The published variants, one frozen row each.

No other file repeats these numbers, except the ``in_channels`` literals of the configs, which a
test compares with this table.

Sources: V1 is arXiv 2206.01191 (table 1 and appendix), V2 is arXiv 2212.08059 (tables 1 and 2), and
the reference implementation (repository snap-research/EfficientFormer, ``models/``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STRIDES = (4, 8, 16, 32)
"""Stride of each pyramid level, in pixels; the same for every variant."""


@dataclass(frozen=True)
class Architecture:
    """The sizes of a backbone of either family.

    Args:
        widths: channels of the four stages.
        depths: number of blocks of the four stages.
        attention_blocks: number of blocks with attention in each stage; they are the last ones.
        mlp_ratios: expansion ratio of the MLP of every block, one tuple per stage.
        drop_path_rate: stochastic depth rate of the last block.
        layer_scale_init_value: initial value of every layer scale.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    attention_blocks: tuple[int, ...]
    mlp_ratios: tuple[tuple[float, ...], ...]
    drop_path_rate: float = 0.0
    layer_scale_init_value: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("widths", "depths", "attention_blocks", "mlp_ratios"):
            if len(getattr(self, name)) != len(STRIDES):
                raise ValueError(
                    f"{name} must have {len(STRIDES)} entries, one per stage, "
                    f"but is {getattr(self, name)!r}"
                )
        for stage, (depth, count, ratios) in enumerate(
            zip(self.depths, self.attention_blocks, self.mlp_ratios, strict=True)
        ):
            if depth < 1 or not 0 <= count <= depth:
                raise ValueError(
                    f"stage {stage}: {depth} blocks of which {count} with attention is invalid"
                )
            if len(ratios) != depth:
                raise ValueError(
                    f"stage {stage} has {depth} blocks but mlp_ratios gives {len(ratios)} ratios"
                )
        if any(width < 2 or width % 2 for width in self.widths):
            raise ValueError(f"widths must be positive and even, but are {self.widths!r}")

    @classmethod
    def from_mapping(cls, arch: Mapping[str, Any]) -> Architecture:
        """Build from a config's dict.

        Args:
            arch: field -> value. ``mlp_ratios`` may also be one number, or one per stage; without
                it every ratio is 4.

        Raises:
            ValueError: unknown or missing keys, or invalid values.
        """
        known = set(cls.__dataclass_fields__)
        required = {"widths", "depths", "attention_blocks"}
        if unknown := set(arch) - known:
            raise ValueError(f"arch: unknown keys {sorted(unknown)}; known are {sorted(known)}")
        if missing := required - set(arch):
            raise ValueError(f"arch: missing keys {sorted(missing)}; known are {sorted(known)}")
        values = dict(arch)
        depths = tuple(values["depths"])
        ratios = values.get("mlp_ratios", 4.0)
        if isinstance(ratios, (int, float)):
            ratios = (ratios,) * len(depths)
        values["mlp_ratios"] = tuple(
            (float(ratio),) * depth
            if isinstance(ratio, (int, float))
            else tuple(float(r) for r in ratio)
            for ratio, depth in zip(ratios, depths, strict=False)
        )
        for name in required:
            values[name] = tuple(int(v) for v in values[name])
        return cls(**values)


@dataclass(frozen=True)
class Variant:
    """A published variant.

    Args:
        name: name used in files and model cards, such as ``efficientformerv2_s0``.
        family: ``"v1"`` or ``"v2"``.
        arch: short name within the family, such as ``s0``.
        architecture: the sizes to build.
        params: published parameters of the classifier with both heads, in millions.
        macs: published multiply-adds of the classifier at 224 x 224 px, in billions.
        top1: published ImageNet-1k top-1 accuracy, in percent (longest schedule).
    """

    name: str
    family: str
    arch: str
    architecture: Architecture
    params: float
    macs: float
    top1: float


def _v1(
    arch: str,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    attention: int,
    params: float,
    macs: float,
    top1: float,
    layer_scale: float = 1e-5,
) -> Variant:
    return Variant(
        name=f"efficientformer_{arch}",
        family="v1",
        arch=arch,
        architecture=Architecture(
            widths=widths,
            depths=depths,
            attention_blocks=(0, 0, 0, attention),
            mlp_ratios=tuple((4.0,) * depth for depth in depths),
            layer_scale_init_value=layer_scale,
        ),
        params=params,
        macs=macs,
        top1=top1,
    )


def _v2(
    arch: str,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    attention: int,
    ratios: tuple[str, str],
    drop_path: float,
    params: float,
    macs: float,
    top1: float,
) -> Variant:
    mlp_ratios = tuple((4.0,) * depth for depth in depths[:2]) + tuple(
        tuple(float(digit) for digit in stage) for stage in ratios
    )
    return Variant(
        name=f"efficientformerv2_{arch}",
        family="v2",
        arch=arch,
        architecture=Architecture(
            widths=widths,
            depths=depths,
            attention_blocks=(0, 0, attention, attention),
            mlp_ratios=mlp_ratios,
            drop_path_rate=drop_path,
        ),
        params=params,
        macs=macs,
        top1=top1,
    )


# The digit strings of V2 are the MLP ratios of the blocks of stages 3 and 4.
_S2_RATIOS = ("443333334444", "44333344")
_L_RATIOS = ("444433333334444", "4443333444")
_ROWS = (
    _v1("l1", (48, 96, 224, 448), (3, 2, 6, 4), 1, 12.29, 1.30, 80.2),
    _v1("l3", (64, 128, 320, 512), (4, 4, 12, 6), 4, 31.41, 3.93, 82.4),
    _v1("l7", (96, 192, 384, 768), (6, 6, 18, 8), 8, 82.23, 10.17, 83.3, layer_scale=1e-6),
    _v2("s0", (32, 48, 96, 176), (2, 2, 6, 4), 2, ("433344", "4334"), 0.0, 3.5, 0.40, 76.2),
    _v2("s1", (32, 48, 120, 224), (3, 3, 9, 6), 2, ("443333444", "443344"), 0.0, 6.1, 0.65, 79.7),
    _v2("s2", (32, 64, 144, 288), (4, 4, 12, 8), 4, _S2_RATIOS, 0.02, 12.6, 1.25, 82.0),
    _v2("l", (40, 80, 192, 384), (5, 5, 15, 10), 6, _L_RATIOS, 0.1, 26.1, 2.56, 83.5),
)

VARIANTS: dict[str, Variant] = {row.name: row for row in _ROWS}
"""Every published variant by name."""


def find_variant(family: str, arch: str) -> Variant:
    """Return the variant ``arch`` of ``family`` (``"v1"`` or ``"v2"``).

    Raises:
        ValueError: there is no such variant; the message names those that exist.
    """
    rows = {row.arch: row for row in _ROWS if row.family == family}
    key = str(arch).lower()
    if key not in rows:
        raise ValueError(
            f"EfficientFormer {family.upper()} has no arch {arch!r}; choose one of "
            f"{sorted(rows)} or give a dict with the fields of mmeformer.variants.Architecture"
        )
    return rows[key]
