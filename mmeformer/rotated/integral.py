# SPDX-License-Identifier: Apache-2.0
"""Box deltas as expectations of discrete distributions."""

import math

import torch
from torch import Tensor, nn

__all__ = ["RotatedIntegral"]


class RotatedIntegral(nn.Module):
    """Converts logits of the head into the five deltas of a rotated box.

    Each delta is the expectation of a softmax over ``reg_max + 1`` points, evenly spaced over its
    range. mmdet's ``Integral`` does this for four distances, with the points 0, 1, ... ``reg_max``.

    Source: Li et al., "Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes
    for Dense Object Detection", NeurIPS 2020, section 3.2.

    Args:
        reg_max: number of intervals between the points.
        delta_range: first and last point of dx, dy (in anchor sides) and of dw, dh (logarithms of
            ratios).
        angle_range: first and last point of the angle in radians.

    Raises:
        ValueError: ``reg_max`` is not positive, or a range does not increase.
    """

    points: Tensor

    def __init__(
        self,
        reg_max: int = 8,
        delta_range: tuple[float, float] = (-2, 2),
        angle_range: tuple[float, float] = (-5, 2),
    ) -> None:
        super().__init__()
        if reg_max < 1:
            raise ValueError(f"reg_max must be at least 1, got {reg_max}")
        for name, (low, high) in (("delta_range", delta_range), ("angle_range", angle_range)):
            if low >= high:
                raise ValueError(f"{name} must increase, got {low} to {high}")
        self.reg_max = reg_max
        ranges = [delta_range] * 4 + [angle_range]
        points = torch.stack([torch.linspace(*ends, reg_max + 1) for ends in ranges])
        # Not in checkpoints: the values follow from the config.
        self.register_buffer("points", points, persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        """Compute the expected deltas.

        Args:
            logits: (N, 5 * (reg_max + 1)): points of dx, then of dy, dw, dh and the angle.

        Returns:
            (N, 5), within the ranges.
        """
        # Not a matrix product, which autocast would compute in half precision.
        probabilities = logits.reshape(-1, *self.points.shape).softmax(-1)
        return (probabilities * self.points).sum(-1)

    def to_bins(self, deltas: Tensor) -> Tensor:
        """Positions of target deltas on the scale of the points, for the distribution focal loss.

        Args:
            deltas: (N, 5). An angle outside its range is shifted by pi, which is the same box;
                deltas that are still outside are clamped to the range.

        Returns:
            (N, 5) from 0 to just below ``reg_max``, as the loss reads the next point as well.
        """
        low, high = self.points[:, 0], self.points[:, -1]
        angle = deltas[:, 4]
        angle = torch.where(angle > high[4], angle - math.pi, angle)
        angle = torch.where(angle < low[4], angle + math.pi, angle)
        deltas = torch.cat([deltas[:, :4], angle[:, None]], 1)
        bins = (deltas - low) / (high - low) * self.reg_max
        return bins.clamp(0, self.reg_max - 0.01)
