"""Headers of GeoTIFFs of one strip: GDAL writes one of each kind, and size and place are filled in.

What pixels mean, and how they are compressed, is the caller's: chips.py and resources/planet/earth_engine_api.py.
"""

import struct
from functools import lru_cache

#: TIFF 6.0: width, height, rows a strip, bytes of the strip, where it begins.
_WIDTH, _HEIGHT, _ROWS_PER_STRIP, _STRIP_BYTES, _STRIP_OFFSET = 256, 257, 278, 279, 273
#: GeoTIFF 1.1, 7.1: a tie point (i, j, k, x, y, z) beside a pixel size; or a whole matrix, row by row.
_TIE_POINT, _MATRIX = 33922, 34264
_LONG = 4
_ENTRY_BYTES = 12


def header(
    crs: str,
    affine: tuple[float, float, float, float, float, float],
    shape: tuple[int, int, int],
    dtype: str,
    strip_bytes: int,
    *,
    is_deflated: bool = False,
) -> bytes:
    """What stands before the pixels of a GeoTIFF whose only strip follows at once.

    GDAL takes a millisecond for such a file, which is a tenth of what serving a chip costs.

    Args:
        crs: EPSG code, or WKT.
        affine: (a, b, c, d, e, f) from pixel corners (column, row) to the CRS: x = a column + b row + c,
            y = d column + e row + f.
        shape: (H, W, bands); bands lie pixel by pixel.
        dtype: numpy name of the bands' type, all alike.
        strip_bytes: length of what follows.
        is_deflated: whether that is deflated, each value as its difference from its left neighbour (predictor 2,
            for types of integers). Else it is the values as they are, little-endian.

    Returns:
        The header.

    Raises:
        rasterio.errors.CRSError: if the CRS cannot be parsed.
    """
    height, width, count = shape
    a, b, c, d, e, f = affine
    sample, entries = _sample(crs, (a, b, d, e), count, dtype, is_deflated)
    content = bytearray(sample)
    numbers = {_WIDTH: width, _HEIGHT: height, _ROWS_PER_STRIP: height, _STRIP_BYTES: strip_bytes}
    for tag, number in numbers.items():
        # Type and count as well: GDAL gave the sample's small sizes two bytes.
        struct.pack_into("<HII", content, entries[tag] + 2, _LONG, 1, number)
    place = _TIE_POINT if _TIE_POINT in entries else _MATRIX
    (values,) = struct.unpack_from("<I", content, entries[place] + 8)
    struct.pack_into("<d", content, values + 3 * 8, c)
    struct.pack_into("<d", content, values + (4 if place == _TIE_POINT else 7) * 8, f)
    return bytes(content)


@lru_cache(maxsize=256)
def _sample(
    crs: str, scales: tuple[float, float, float, float], count: int, dtype: str, is_deflated: bool
) -> tuple[bytes, dict[int, int]]:
    """Header of a file of 2 x 2 pixels, as GDAL writes it, and where the entry of each tag lies in it."""
    import numpy as np
    import rasterio
    from rasterio.io import MemoryFile

    a, b, d, e = scales
    profile = {
        "driver": "GTiff",
        "height": 2,
        "width": 2,
        "count": count,
        "dtype": dtype,
        "crs": crs,
        # Not at 0: GDAL passes over an origin that is nowhere.
        "transform": rasterio.Affine(a, b, 1.0, d, e, 1.0),
        "interleave": "pixel",
        "blockysize": 2,
    }
    if is_deflated:
        profile |= {"compress": "deflate", "predictor": 2}
    with MemoryFile() as memory:
        with memory.open(**profile) as file:
            file.write(np.zeros((count, 2, 2), dtype))
        content = bytes(memory.getbuffer())
    (first,) = struct.unpack_from("<I", content, 4)
    (length,) = struct.unpack_from("<H", content, first)
    places = [first + 2 + number * _ENTRY_BYTES for number in range(length)]
    entries = {struct.unpack_from("<H", content, place)[0]: place for place in places}
    (begin,) = struct.unpack_from("<I", content, entries[_STRIP_OFFSET] + 8)
    return content[:begin], entries
