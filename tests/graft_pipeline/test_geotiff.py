import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.io import MemoryFile

from graft_pipeline import geotiff

SCALES = st.one_of(
    # North up, upside down, sheared.
    st.sampled_from([0.6, 1.0, 10.0]).map(lambda gsd: (gsd, 0.0, 0.0, -gsd)),
    st.sampled_from([(2.5, 0.0, 0.0, 2.5), (1.0, 0.5, -0.25, -2.0), (-3.0, 0.0, 0.0, -3.0)]),
)


@given(
    crs=st.sampled_from(
        ["EPSG:32619", "EPSG:26914", "EPSG:3857", "EPSG:4326", CRS.from_epsg(32601).to_wkt()]
    ),
    scales=SCALES,
    origin=st.tuples(st.floats(-9e6, 9e6), st.floats(-9e6, 9e6)),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5)),
    dtype=st.sampled_from(["uint8", "uint16", "int16", "float32"]),
    seed=st.integers(0, 99),
)
def test_any_file_is_read_as_it_was_meant(
    crs: str,
    scales: tuple[float, float, float, float],
    origin: tuple[float, float],
    shape: tuple[int, int, int],
    dtype: str,
    seed: int,
) -> None:
    values = np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)
    affine = Affine(scales[0], scales[1], origin[0], scales[2], scales[3], origin[1])
    content = geotiff.header(crs, tuple(affine)[:6], shape, dtype, values.nbytes) + values.tobytes()
    with MemoryFile(content) as memory, memory.open(driver="GTiff") as file:
        assert file.crs == CRS.from_user_input(crs)
        assert file.transform == affine
        assert (file.height, file.width, file.count) == shape
        assert set(file.dtypes) == {dtype}
        np.testing.assert_array_equal(np.moveaxis(file.read(), 0, -1), values)


def test_an_unknown_crs_is_refused() -> None:
    with pytest.raises(CRSError):
        geotiff.header("EPSG:999999", (1.0, 0.0, 0.0, 0.0, -1.0, 0.0), (2, 2, 1), "uint8", 4)
