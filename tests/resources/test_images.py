import contextlib
import hashlib
import http.server
import io
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import tenacity
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from PIL import Image, ImageDraw

from graft_pipeline.errors import ItemError, ServiceError, SettingsError
from graft_pipeline.settings import Settings
from resources import images
from resources.http import Retries
from resources.images import ImageFetcher, encode

URL = "https://live.staticflickr.com/65535/123_abc_n.jpg"


def picture(width=320, height=240, seed=0):
    """A smooth RGB picture with a bright upper left corner."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 200, (6, 8, 3), dtype=np.uint8))
    image = small.resize((width, height), Image.Resampling.BICUBIC)
    ImageDraw.Draw(image).rectangle((0, 0, width // 4, height // 4), fill="white")
    return image


def file_of(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def fetcher(url=None, attempts=3, **options):
    options = {"retries": Retries(attempts=attempts, wait=tenacity.wait_none()), "timeout_s": 20.0, **options}
    return ImageFetcher(static_url=url, **options)


def decoded(image):
    opened = Image.open(io.BytesIO(image.content))
    opened.load()
    assert (opened.format, opened.mode) == ("JPEG", "RGB")
    assert (opened.width, opened.height) == (image.width_px, image.height_px)
    return opened


# --- what becomes of an image's bytes ---


def test_small_jpeg_is_kept_byte_for_byte():
    content = file_of(picture())
    image = encode(content)
    assert image.content == content
    assert (image.width_px, image.height_px) == (320, 240)
    assert len(image.phash) == 16
    int(image.phash, 16)


@pytest.mark.parametrize(
    ("size", "stored"), [((1024, 768), (341, 256)), ((600, 900), (256, 384)), ((257, 300), (256, 299))]
)
def test_larger_images_are_reduced_to_the_shorter_side(size, stored):
    image = encode(file_of(picture(*size)))
    assert decoded(image).size == stored


def test_reduction_is_deterministic_and_keeps_the_hash():
    content = file_of(picture(1600, 1200), quality=95)
    assert encode(content) == encode(content)
    small = encode(file_of(picture(1600, 1200).resize((341, 256), Image.Resampling.LANCZOS)))
    bits = int(encode(content).phash, 16) ^ int(small.phash, 16)
    assert bits.bit_count() <= 4


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("LA", "PNG"),
        ("1", "PNG"), ("I;16", "PNG"), ("RGB", "WEBP"), ("RGBA", "WEBP"), ("P", "GIF"), ("L", "GIF"),
    ],
)  # fmt: skip
def test_every_mode_becomes_rgb(mode, kind):
    source = picture()
    if mode == "I;16":
        converted = Image.fromarray(np.asarray(source.convert("L")).astype(np.uint16) * 257)
    else:
        converted = source.convert(mode)
    stored = np.asarray(decoded(encode(file_of(converted, kind))).convert("L"), dtype=float)
    wanted = np.asarray(source.convert("L"), dtype=float)
    if mode != "1":
        assert np.abs(stored - wanted).mean() < 12


def test_transparent_parts_become_white():
    image = Image.new("RGBA", (64, 64), (200, 0, 0, 0))
    assert np.asarray(decoded(encode(file_of(image, "PNG")))).min() > 250
    palette = picture().quantize(8)
    unseen = np.asarray(palette) == 3
    stored = np.asarray(decoded(encode(file_of(palette, "PNG", transparency=3))))
    assert unseen.any()
    assert np.median(stored[unseen]) > 250


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_stored_upright(orientation):
    upright = picture(320, 200)
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = upright if back is None else upright.transpose(Image.Transpose(back))
    stored = decoded(encode(file_of(turned, exif=exif, quality=95)))
    assert stored.size == upright.size
    assert np.abs(np.asarray(stored, dtype=float) - np.asarray(upright, dtype=float)).mean() < 6
    assert stored.getexif().get(0x0112, 1) == 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("value", [b"Exif\0\0broken", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_senseless_exif_is_ignored(value):
    assert encode(file_of(picture(), exif=value)).width_px == 320


def test_swollen_file_is_not_kept():
    content = file_of(picture())[:-2] + b"\xff\xfe\xff\xff" + bytes(65533)
    content += b"\xff\xfe\xff\xff" + bytes(65533) + b"\xff\xfe\xff\xff" + bytes(65533)
    content += b"\xff\xfe\xff\xff" + bytes(65533) + b"\xff\xd9"
    assert len(encode(content).content) < 65_000


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}])
@pytest.mark.parametrize("size", [(320, 240), (900, 700)])
def test_no_cut_jpeg_passes(options, size):
    content = file_of(picture(*size), **options)
    for length in [1, 2, 3, 10, 100, *range(200, len(content), max(1, len(content) // 40)), len(content) - 1]:
        with pytest.raises(ItemError) as caught:
            encode(content[:length])
        assert (caught.value.reason, caught.value.is_permanent) in (
            ("truncated", False),
            ("not_an_image", True),
        )


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_no_cut_file_passes(kind):
    content = file_of(picture(), kind)
    for length in [12, *range(30, len(content) - 12, max(1, len(content) // 40))]:
        with pytest.raises(ItemError):
            encode(content[:length])


def test_no_cut_animation_crashes():
    frames = [picture(64, 48, seed).quantize(8) for seed in range(2)]
    content = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    first = len(file_of(frames[0], "GIF"))
    for length in range(first - 10, first + 60):
        with contextlib.suppress(ItemError):
            encode(content[:length])


def test_multi_picture_jpeg_is_a_still_photo():
    content = file_of(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
    assert Image.open(io.BytesIO(content)).format == "MPO"
    assert decoded(encode(content)).size == (320, 240)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations_are_rejected(kind):
    content = file_of(picture(), kind, save_all=True, append_images=[picture(seed=1)], duration=100)
    with pytest.raises(ItemError) as caught:
        encode(content)
    assert (caught.value.reason, caught.value.is_permanent) == ("animated", True)


@pytest.mark.parametrize(
    ("content", "reason", "is_permanent"),
    [
        (b"", "truncated", False),
        (b"<!DOCTYPE html><html>busy</html>", "not_an_image", False),
        (b"  <html>", "not_an_image", False),
        (b"\xef\xbb\xbf<!DOCTYPE html>", "not_an_image", False),
        (b"<script>location = 'https://portal.example/'</script>", "not_an_image", False),
        (b"%PDF-1.7 text", "not_an_image", True),
        (bytes(1000), "not_an_image", True),
        (b"\xff\xd8\xff", "truncated", False),
        (b"GIF89a", "truncated", False),
        (file_of(picture(), "BMP"), "not_an_image", True),
        (file_of(picture(), "TIFF"), "not_an_image", True),
        (file_of(Image.new("RGB", (1, 1)), "GIF"), "too_small", True),
        (file_of(Image.new("RGB", (4000, 20))), "too_small", True),
    ],
)
def test_what_is_no_photo(content, reason, is_permanent):
    with pytest.raises(ItemError) as caught:
        encode(content)
    assert (caught.value.reason, caught.value.is_permanent) == (reason, is_permanent)


@pytest.mark.parametrize("size", [(7100, 7100), (20000, 20000)])
def test_pixel_bomb_is_rejected_by_its_header(size):
    """Only the header says so: decoding would fail with `truncated`."""
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    content += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(ItemError) as caught:
        encode(content)
    assert caught.value.reason == "too_large"


# --- how bytes are fetched ---


def test_static_url_stands_in_for_flickrs_hosts(scripted, reply):
    content = file_of(picture())
    server = scripted(lambda request: reply(content, headers={"Content-Type": "image/jpeg"}))
    photos = fetcher(server.url + "/static")
    assert photos.fetch(URL).content == content
    assert server.requests[0].path == "/static/65535/123_abc_n.jpg"
    assert photos.requests == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://live.staticflickr.com/1.jpg",
        "https://example.com/1.jpg",
        "https://staticflickr.com.example.com/1.jpg",
        "https://user@live.staticflickr.com/1.jpg",
        "https://live.staticflickr.com:8080/1.jpg",
        "https://live.staticflickr.com:no/1.jpg",
        "https://127.0.0.1/1.jpg",
        "file:///etc/passwd",
        "//live.staticflickr.com/1.jpg",
        "https://example.com\\.staticflickr.com/1.jpg",
        "https://example.com#.staticflickr.com/1.jpg",
        "https://example.com?.staticflickr.com/1.jpg",
        "https://live.staticflickr.com/../stats",
        "https://live.staticflickr.com/a\r\nHost: example.com",
        "http://127.0.0.1:1/static/1.jpg",
        "",
    ],
)
@pytest.mark.parametrize("static_url", [None, "http://127.0.0.1:1/static"])
def test_only_flickrs_hosts_are_asked(url, static_url):
    photos = fetcher(static_url)
    with pytest.raises(ItemError) as caught:
        photos.fetch(url)
    assert (caught.value.reason, caught.value.is_permanent) == ("url_not_allowed", True)
    assert photos.requests == 0


GOOD = file_of(picture())


@pytest.mark.parametrize(
    "bad",
    [
        {"status": 429, "headers": {"Retry-After": "0"}},
        {"status": 503},
        {"body": GOOD[:500], "announced": len(GOOD)},
        {"body": GOOD[:500], "announced": -1},
        {"body": b""},
        {"body": b"<html>busy</html>"},
    ],
)
def test_passing_trouble_is_retried(scripted, reply, bad):
    answers = iter([reply(**bad), reply(GOOD)])
    server = scripted(lambda request: next(answers))
    assert fetcher(server.url).fetch(URL).content == GOOD
    assert len(server.requests) == 2


def test_silent_server_is_asked_again(scripted, reply):
    answers = iter([reply(hangs=True)])
    server = scripted(lambda request: next(answers, reply(GOOD)))
    assert fetcher(server.url, timeout_s=0.3, attempts=20).fetch(URL).content == GOOD
    assert len(server.requests) > 1


@pytest.mark.parametrize(
    ("bad", "reason", "is_permanent", "requests"),
    [
        ({"status": 404}, "gone", True, 1),
        ({"status": 410}, "gone", True, 1),
        ({"status": 403}, "forbidden", False, 1),
        ({"status": 400}, "refused", True, 1),
        ({"status": 429, "headers": {"Retry-After": "0"}}, "rate_limited", False, 3),
        ({"status": 500}, "unavailable", False, 3),
        ({"hangs": True}, "timeout", False, 3),
        ({"body": GOOD[:500], "announced": len(GOOD)}, "truncated", False, 3),
        ({"body": GOOD[:500]}, "truncated", False, 3),
        ({"body": b"<html></html>"}, "not_an_image", False, 3),
        ({"body": b"text"}, "not_an_image", True, 1),
        ({"status": 302, "headers": {"Location": "/images/photo_unavailable.png"}}, "gone", True, 1),
        (
            {"status": 302, "headers": {"Location": "https://s.yimg.com/pw/photo_unavailable.png"}},
            "gone",
            True,
            1,
        ),
        ({"status": 302, "headers": {"Location": "http://169.254.169.254/secret"}}, "redirected", False, 1),
        ({"status": 302, "headers": {"Location": "file:///etc/passwd"}}, "redirected", False, 1),
        ({"status": 302}, "redirected", False, 4),
        ({"status": 302, "headers": {"Location": "http://[broken/"}}, "redirected", False, 1),
    ],
)
def test_lasting_trouble_is_an_error_of_the_item(scripted, reply, bad, reason, is_permanent, requests):
    server = scripted(lambda request: reply(**bad))
    with pytest.raises(ItemError) as caught:
        fetcher(server.url, timeout_s=0.15 if "hangs" in bad else 20.0).fetch(URL)
    assert (caught.value.reason, caught.value.is_permanent) == (reason, is_permanent)
    assert len(server.requests) == requests


def test_same_broken_file_is_not_asked_for_for_ever(scripted, reply):
    server = scripted(lambda request: reply(GOOD[:500]))
    with pytest.raises(ItemError):
        fetcher(server.url, attempts=20).fetch(URL)
    assert len(server.requests) == 3


def test_redirects_within_flickrs_hosts_are_followed(scripted, reply):
    def respond(request):
        if request.path == "/static/new.jpg":
            return reply(GOOD)
        if request.path == "/static/half.jpg":
            return reply(status=302, headers={"Location": "https://farm1.staticflickr.com/new.jpg"})
        return reply(status=301, headers={"Location": "half.jpg"})

    server = scripted(respond)
    assert fetcher(server.url + "/static").fetch("https://live.staticflickr.com/old.jpg").content == GOOD


@pytest.mark.parametrize("announced", [None, -1])
def test_huge_file_is_not_read(scripted, reply, announced, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 10_000)
    server = scripted(lambda request: reply(bytes(500_000), announced=announced))
    with pytest.raises(ItemError) as caught:
        fetcher(server.url).fetch(URL)
    assert (caught.value.reason, caught.value.is_permanent) == ("too_large", True)


def test_unreachable_host_ends_the_run(free_url):
    with pytest.raises(ServiceError, match=free_url.removeprefix("http://") + ".*run again"):
        fetcher(free_url).fetch(URL)


@pytest.fixture
def flickr_hosts(tmp_path, monkeypatch):
    """Flickr's hosts as this machine's names find them: `live` answers over TLS, no other is known."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, day = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")]), timedelta(days=1)
    alternatives = x509.SubjectAlternativeName([x509.DNSName("live.staticflickr.com")])
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), 1, datetime.now(UTC) - day, datetime.now(UTC) + day
    )
    certificate = builder.add_extension(alternatives, critical=False).sign(key, hashes.SHA256())
    private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (tmp_path / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *private))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "cert.pem"))

    class Photos(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(GOOD)))
            self.end_headers()
            self.wfile.write(GOOD)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Photos)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def getaddrinfo(host, *_, **__):
        if host == "live.staticflickr.com":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", server.server_address)]
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    server.shutdown()
    server.server_close()


def test_a_host_that_is_gone_fails_its_own_photos_while_others_answer(flickr_hosts):
    photos = fetcher(public_only=False)
    gone = "https://farm9.staticflickr.com/1/2_n.jpg"
    with pytest.raises(ServiceError, match="run again"):
        photos.fetch(gone)
    photos.fetch(URL)
    with pytest.raises(ItemError, match=r"farm9.*cannot be reached") as caught:
        photos.fetch(gone)
    assert (caught.value.reason, caught.value.is_permanent) == ("unreachable", False)


@pytest.mark.parametrize(
    "bad",
    [
        {"status": 503},
        {"body": b"<html>Please log in</html>"},
        {"status": 302, "headers": {"Location": "https://portal.example/"}},
    ],
)
def test_host_that_fails_for_every_photo_ends_the_run(scripted, reply, bad):
    server = scripted(lambda request: reply(**bad))
    photos = fetcher(server.url, attempts=1, concurrency=1)
    for _ in range(19):
        with pytest.raises(ItemError):
            photos.fetch(URL)
    with pytest.raises(ServiceError, match="20 items in a row"):
        photos.fetch(URL)


def test_real_host_at_a_private_address_is_refused(monkeypatch):
    """DNS that points Flickr's host into the own network (here: everything to loopback) does not help."""
    import socket

    real = socket.getaddrinfo
    with socket.create_server(("127.0.0.1", 0)) as inside:
        port = inside.getsockname()[1]
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, _port, *rest: real("127.0.0.1", port, *rest))
        with pytest.raises(ServiceError, match="not a public address"):
            fetcher(attempts=1).fetch(URL)


def test_many_threads_share_a_fetcher(scripted, reply):
    contents = [file_of(picture(seed=seed)) for seed in range(8)]
    server = scripted(lambda request: reply(contents[int(request.path[1:-4])]))
    photos = fetcher(server.url, concurrency=8)
    found: dict[int, str] = {}

    def work(start):
        for number in range(start, 64, 8):
            image = photos.fetch(f"https://live.staticflickr.com/{number % 8}.jpg")
            found[number] = hashlib.sha256(image.content).hexdigest()

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: hashlib.sha256(contents[number % 8]).hexdigest() for number in range(64)}
    assert photos.requests == 64


@pytest.mark.parametrize("url", ["", "live.example.com", "http://[broken", "file:///etc"])
def test_unusable_address_is_a_settings_error(url):
    with pytest.raises(SettingsError, match="GRAFT_FLICKR_STATIC_URL"):
        ImageFetcher(static_url=url)


def test_the_pace_of_a_host_is_kept(scripted, reply):
    """Twenty a second, two of them at once: a slow machine only makes the span of twelve longer."""
    server = scripted(lambda request: reply(GOOD))
    photos = fetcher(server.url, requests_per_second=20, concurrency=8)
    started = time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        assert len(list(threads.map(lambda _: photos.fetch(URL), range(12)))) == 12
    assert time.monotonic() - started > 10 / 20 - 0.1


@pytest.mark.parametrize("headers", [{"Retry-After": "1"}, {}])
def test_a_host_that_asks_to_wait_is_left_alone_by_all_threads(scripted, reply, headers):
    arrived, waits = [], iter([{"status": 429, "headers": headers}])

    def respond(request):
        arrived.append(time.monotonic())
        return reply(**next(waits, {"body": GOOD}))

    photos = fetcher(scripted(respond).url, attempts=1, concurrency=4)
    with pytest.raises(ItemError, match="429"):
        photos.fetch(URL)
    with ThreadPoolExecutor(4) as threads:
        assert len(list(threads.map(lambda _: photos.fetch(URL), range(4)))) == 4
    assert arrived[1] - arrived[0] >= 1


def test_settings_name_everything(scripted, reply):
    server = scripted(lambda request: reply(GOOD))
    settings = Settings(
        world="planet",
        flickr_static_url=server.url + "/here/",
        image_concurrency=3,
        image_requests_per_second=7,
    )
    photos = ImageFetcher.from_settings(settings)
    photos.fetch(URL)
    assert (photos.concurrency, photos._requests_per_second) == (3, 7)
    assert server.requests[0].path == "/here/65535/123_abc_n.jpg"
    photos.close()
    assert "here" in repr(photos)


# --- the planet ---


@pytest.fixture(scope="module")
def photographed():
    """The planet's photos around a place."""
    from resources.planet.world import World

    return World(0).photos_near(-71.4, 42.3, 16.0)


def url_of(photo, suffix="_n"):
    return (
        f"https://live.staticflickr.com/{photo['server']}/{photo['photo_id']}_{photo['secret']}{suffix}.jpg"
    )


def test_planet_serves_photos(planet, photographed):
    photos = fetcher(planet.url + "/static")
    sound = photographed[photographed["has_urls"] & (photographed["flaw"] == "")][:20]
    fetched = [photos.fetch(url_of(photo)) for photo in sound]
    assert {min(image.width_px, image.height_px) for image in fetched} == {240}
    for image, photo in zip(fetched, sound, strict=True):
        assert decoded(image).size == ((240, 320) if photo["is_portrait"] else (320, 240))
    assert len({image.phash for image in fetched}) > 10
    larger = photos.fetch(url_of(sound[0], "_z"))
    assert min(larger.width_px, larger.height_px) == 256


@pytest.mark.parametrize(
    ("flaw", "reason", "is_permanent"),
    [
        ("html", "not_an_image", False),
        ("truncated", "truncated", False),
        ("huge", "too_large", True),
        ("animated", "animated", True),
    ],
)
def test_planet_serves_broken_photos(planet, photographed, flaw, reason, is_permanent):
    photo = photographed[photographed["has_urls"] & (photographed["flaw"] == flaw)][0]
    with pytest.raises(ItemError) as caught:
        fetcher(planet.url + "/static").fetch(url_of(photo))
    assert (caught.value.reason, caught.value.is_permanent) == (reason, is_permanent)


def test_planet_serves_cmyk_photos(planet, photographed):
    photo = photographed[photographed["has_urls"] & (photographed["flaw"] == "cmyk")][0]
    decoded(fetcher(planet.url + "/static").fetch(url_of(photo)))


def test_planet_has_no_other_photos(planet, photographed):
    with pytest.raises(ItemError) as caught:
        fetcher(planet.url + "/static").fetch("https://live.staticflickr.com/1/10000000000_0000000000_n.jpg")
    assert (caught.value.reason, caught.value.is_permanent) == ("gone", True)


def test_planet_full_of_faults_yields_the_same_images(planet, make_planet, photographed):
    sound = photographed[photographed["has_urls"] & (photographed["flaw"] == "")][:15]
    calm, rough_planet = fetcher(planet.url + "/static"), make_planet(seed=0, fault_rate=0.4, stall_s=0.5)
    rough = fetcher(rough_planet.url + "/static", attempts=15)
    for photo in sound:
        assert rough.fetch(url_of(photo)) == calm.fetch(url_of(photo))
    assert rough.requests == rough_planet.stats()["image"] > len(sound)
