"""What docs/explanation/security.md promises beyond what the clients' own tests hold."""

import io
import socket
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tenacity
from PIL import Image
from rasterio.io import MemoryFile

from graft_pipeline.errors import DataError, ItemError, ServiceError, SettingsError
from graft_pipeline.geometry import Grid
from graft_pipeline.imagery import NAIP
from graft_pipeline.settings import Settings, load_settings
from graft_pipeline.shards import BLANK_NAME, blank_members
from resources.earth_engine import decode_chip
from resources.http import Retries, TransientError, is_private_host
from resources.images import MAX_SCANS, ImageFetcher, encode

PHOTO = "https://live.staticflickr.com/65535/123_abc_n.jpg"
PRODUCTION = {"flickr_key": "k", "flickr_secret": "s", "ee_project": "p"}
ONCE = Retries(1, tenacity.wait_none())


def jpeg(scans: int = 0) -> bytes:
    """A progressive JPEG, its last scan repeated."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "green").save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + scan * scans + content[-2:]


# --- addresses ---


def test_the_planet_listens_on_loopback_only(planet: Any) -> None:
    listening = {
        connection.laddr.ip
        for connection in psutil.Process(planet.pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "100.64.0.1", "::1", "fe80::1"]
)
def test_flickrs_hosts_in_a_private_network_are_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever DNS says, when it is asked again: the address that was connected to is what counts."""

    class Connected(socket.socket):
        def connect(self, _address: Any) -> None:
            pass

        def getpeername(self) -> tuple[str, int]:
            return address, 443

        def sendall(self, *_: Any) -> None:
            raise AssertionError("nothing may be sent")

    public = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("151.101.1.1", 443))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: public)
    monkeypatch.setattr(socket, "socket", Connected)
    with pytest.raises(ServiceError, match="not a public address"):
        ImageFetcher(retries=ONCE).fetch(PHOTO)


def test_only_the_planet_may_be_at_a_private_address(planet: Any) -> None:
    static_url = f"{planet.url}/static"
    on_planet = ImageFetcher.from_settings(
        Settings(world="planet", flickr_static_url=static_url), retries=ONCE
    )
    with pytest.raises(ItemError) as missing:
        on_planet.fetch(PHOTO)
    assert missing.value.reason == "gone"
    production = Settings(**PRODUCTION, flickr_static_url=static_url)
    before = planet.stats()
    with pytest.raises(ServiceError, match="not a public address"):
        ImageFetcher.from_settings(production, retries=ONCE).fetch(PHOTO)
    assert planet.stats() == before


def test_image_hosts_are_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    photos = ImageFetcher.from_settings(
        Settings(**PRODUCTION, image_hosts=("photos.example.org",)), retries=ONCE
    )
    for url in (PHOTO, "https://example.org/1.jpg", "https://photos.example.org.evil.com/1.jpg"):
        with pytest.raises(ItemError) as refused:
            photos.fetch(url)
        assert refused.value.reason == "url_not_allowed"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: [])
    with pytest.raises(ServiceError, match=r"a\.photos\.example\.org cannot be reached"):
        photos.fetch("https://a.photos.example.org/1.jpg")
    for host in ("localhost", "*.example.org", "https://example.org", "10.0.0.1"):
        monkeypatch.setenv("GRAFT_IMAGE_HOSTS", f'["{host}"]')
        with pytest.raises(SettingsError, match="GRAFT_IMAGE_HOSTS"):
            load_settings()


@pytest.mark.parametrize(
    ("url", "is_private"),
    [
        ("http://127.0.0.1:8/", True),
        ("https://[::1]/", True),
        ("https://8.8.8.8/", False),
        ("nothing", False),
    ],
)
def test_private_hosts_are_told_from_public_ones(url: str, is_private: bool) -> None:
    assert is_private_host(url) is is_private


def test_a_public_catalogue_leads_into_no_private_network(planet: Any) -> None:
    """Only an API that is itself in a private network, as in tests/resources/test_stac.py, may name hosts there."""
    from resources.stac import Stac

    catalogue = Stac(url="https://8.8.8.8/stac", retries=ONCE)
    before = planet.stats()
    with pytest.raises(TransientError, match="not a public address"):
        catalogue._ask(f"{planet.url}/stats")
    assert planet.stats() == before


# --- content ---


def test_scans_of_a_jpeg_are_bounded() -> None:
    """Each of a few bytes costs a pass over all pixels: ten thousand of them, minutes."""
    encode(jpeg(scans=20))
    with pytest.raises(ItemError, match="scans") as refused:
        encode(jpeg(scans=MAX_SCANS))
    assert (refused.value.reason, refused.value.is_permanent) == ("too_large", True)


def test_blocks_of_a_geotiff_are_bounded() -> None:
    """A chip's size, but one tile of it that inflates to a gigabyte."""
    grid = Grid(epsg=32619, x0_m=300_000.0, y0_m=4_680_000.0, gsd_m=1.0, width_px=16, height_px=16)

    def tiff(**layout: Any) -> bytes:
        profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "width": 16, "height": 16}
        with MemoryFile() as memory:
            with memory.open(
                **profile, crs=grid.crs, transform=grid.affine, compress="deflate", **layout
            ) as file:
                file.write(np.zeros((3, 16, 16), np.uint8))
            return memory.read()

    assert decode_chip(tiff(), NAIP, grid).shape == (16, 16, 3)
    # The block is claimed in the header; to write it would take the memory that reading it must not.
    small = tiff(tiled=True, blockxsize=16, blockysize=16)
    claimed = small.replace(
        b"\x42\x01\x03\x00\x01\x00\x00\x00\x10\x00", b"\x42\x01\x03\x00\x01\x00\x00\x00\xf0\xff"
    )
    claimed = claimed.replace(
        b"\x43\x01\x03\x00\x01\x00\x00\x00\x10\x00", b"\x43\x01\x03\x00\x01\x00\x00\x00\xf0\xff"
    )
    assert claimed != small
    with pytest.raises(TransientError, match="blocks of"):
        decode_chip(claimed, NAIP, grid)


def test_a_hostile_shard_reaches_nothing_beside_it(tmp_path: Path) -> None:
    """Members are found by their headers and never extracted: links and .. mean nothing."""
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(b"precious")
    folder = tmp_path / "region"
    folder.mkdir()
    with tarfile.open(folder / "images-00000.tar", "w") as tar:
        link = tarfile.TarInfo("123.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, str(outside)
        tar.addfile(link)
        for name in ("../outside.jpg", "456.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 8
            tar.addfile(member, io.BytesIO(b"contents"))
    assert blank_members(folder, "images-00000.tar", {"123", "456", "../outside"}) == 2
    with tarfile.open(folder / "images-00000.tar") as tar:
        assert [member.name for member in tar] == [BLANK_NAME, "../outside.jpg", BLANK_NAME]
    assert outside.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "images-00000.tar",
        "outside.jpg",
    ]

    # A member that claims a terabyte is not believed.
    large = tarfile.TarInfo("789.jpg")
    large.size = 1 << 40
    (folder / "images-00001.tar").write_bytes(large.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match="images-00001"):
        blank_members(folder, "images-00001.tar", {"789"})
