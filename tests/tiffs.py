# SPDX-License-Identifier: Apache-2.0
"""A writer of TIFF files with any number of bands, for tests; follows TIFF 6.0."""

import struct
import zlib

import numpy as np

GRAY, RGB = 1, 2


def write_tiff(
    path,
    image,
    photometric=GRAY,
    extra=0,
    order="<",
    big=False,
    separate=False,
    tile=None,
    deflate=False,
    predictor=1,
    orientation=1,
):
    """Write (H, W, bands) of any number type; in tiles of (height, width) or strips of 7 rows.

    Args:
        photometric: 1 gray, 2 RGB; bands beyond that are extra samples.
        extra: their kind: 0 unspecified, 2 opacity.
        order: of bytes.
        big: BigTIFF.
        separate: one band after the other.
        predictor: 1 none, 2 differences, 3 differences of split floating point numbers.
        orientation: as in EXIF.
    """
    height, width, bands = image.shape
    size = image.dtype.itemsize
    rows, columns = tile or (7, width)
    chunks = []
    for plane in np.moveaxis(image, 2, 0)[..., None] if separate else [image]:
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                chunk = plane[top : top + rows, left : left + columns]
                if tile:
                    missing = [(0, n - m) for n, m in zip(tile, chunk.shape[:2], strict=True)]
                    chunk = np.pad(chunk, [*missing, (0, 0)], mode="edge")
                chunks.append(_encode(chunk, order, predictor, deflate))
    entries = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [8 * size] * bands),
        259: (3, [8 if deflate else 1]),
        262: (3, [photometric]),
        274: (3, [orientation]),
        277: (3, [bands]),
        284: (3, [2 if separate else 1]),
        317: (3, [predictor]),
        339: (3, [dict(u=1, i=2, f=3)[image.dtype.kind]] * bands),
    }
    if others := bands - (3 if photometric == RGB else 1):
        entries[338] = 3, [extra] * others
    places, place = [], 16
    for chunk in chunks:
        places.append(place)
        place += len(chunk)
    offsets, lengths = (16 if big else 4, places), (4, [len(chunk) for chunk in chunks])
    if tile:
        entries.update({322: (4, [columns]), 323: (4, [rows]), 324: offsets, 325: lengths})
    else:
        entries.update({273: offsets, 278: (4, [rows]), 279: lengths})
    place += -place % 8
    word, room = (order + "Q", 8) if big else (order + "I", 4)
    directory, values = b"", b""
    length = (8 + 20 * len(entries) + 8) if big else (2 + 12 * len(entries) + 4)
    for tag, (kind, numbers) in sorted(entries.items()):
        raw = struct.pack(f"{order}{len(numbers)}{ {3: 'H', 4: 'I', 16: 'Q'}[kind] }", *numbers)
        if len(raw) > room:
            raw, values = struct.pack(word, place + length + len(values)), values + raw
        directory += struct.pack(f"{order}HH", tag, kind) + struct.pack(word, len(numbers))
        directory += raw.ljust(room, b"\0")
    start = b"II" if order == "<" else b"MM"
    if big:
        start += struct.pack(order + "HHHQ", 43, 8, 0, place)
    else:
        start += struct.pack(order + "HI", 42, place)
    count = struct.pack(order + ("Q" if big else "H"), len(entries))
    body = (start.ljust(16, b"\0") + b"".join(chunks)).ljust(place, b"\0")
    path.write_bytes(body + count + directory + struct.pack(word, 0) + values)
    return path


def _encode(chunk, order, predictor, deflate):
    if predictor == 3:
        rows, columns, bands = chunk.shape
        split = np.ascontiguousarray(chunk.astype(chunk.dtype.newbyteorder(">"))).view(np.uint8)
        split = split.reshape(rows, columns, bands, -1).transpose(0, 3, 1, 2)
        split = split.reshape(rows, -1, bands)
        chunk = np.diff(split, axis=1, prepend=np.zeros_like(split[:, :1]))
    elif predictor == 2:
        chunk = np.diff(chunk, axis=1, prepend=np.zeros_like(chunk[:, :1]))
    data = chunk.astype(chunk.dtype.newbyteorder(order)).tobytes()
    return zlib.compress(data) if deflate else data
