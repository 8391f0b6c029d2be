# SPDX-License-Identifier: Apache-2.0
"""Masks of objects as bits, on their way from the processes that load them to the device.

mmdet's masks have a byte per pixel: 43 MB for four images of 800 x 1344 px with ten objects each.
Workers of a data loader would send them through a pipe, and the data preprocessor would copy them
once more to pad them, both in the process that launches the kernels.
"""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.structures.mask import BitmapMasks
from torch import Tensor


class PackedMasks(BitmapMasks):
    """``mmdet.BitmapMasks`` of eight pixels per byte, unpacked where they are used.

    Args:
        bits: (N, h, ceil(w / 8)) uint8, the first pixel in the highest bit.
        width: w, of the masks in ``bits``.
        size: height and width of the masks; pixels right of ``bits`` or below are 0.
    """

    def __init__(self, bits: Tensor, width: int, size: tuple[int, int]) -> None:
        self.bits, self.packed_width = bits, width
        self.height, self.width = size

    @classmethod
    def of(cls, masks: BitmapMasks) -> PackedMasks:
        """The same masks, of zeros and ones."""
        bits = torch.from_numpy(np.packbits(masks.masks, axis=-1))
        return cls(bits, masks.width, (masks.height, masks.width))

    @property
    def masks(self) -> np.ndarray:
        """(N, height, width) uint8, as in the base class; a new array each time."""
        return self.to_tensor(torch.uint8, "cpu").numpy()

    def __len__(self) -> int:
        return len(self.bits)

    def to_tensor(self, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """The masks (N, height, width), unpacked on the device."""
        bits = self.bits.to(device, non_blocking=True)
        places = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
        pixels = (bits[..., None] >> places & 1).flatten(-2)[..., : self.packed_width]
        missing = self.width - self.packed_width, self.height - bits.shape[1]
        return F.pad(pixels, (0, missing[0], 0, missing[1])).to(dtype)

    def pad(self, out_shape: tuple[int, int], pad_val: int = 0) -> BitmapMasks:
        """The masks with ``pad_val`` at the right and bottom, up to (height, width)."""
        if pad_val:
            return super().pad(out_shape, pad_val)
        return PackedMasks(self.bits, self.packed_width, out_shape)


def _send(masks: BitmapMasks):
    """How a process sends masks to another: the bits are in shared memory."""
    pixels = masks.masks
    if pixels.dtype == np.uint8 and pixels.max(initial=0) <= 1:
        packed = PackedMasks.of(masks)
        return PackedMasks, (packed.bits, masks.width, (masks.height, masks.width))
    return BitmapMasks, (pixels, masks.height, masks.width)


ForkingPickler.register(BitmapMasks, _send)
