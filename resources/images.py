"""The fetcher of ground photos: bytes from Flickr's image hosts, made into small clean JPEGs.

Which photos are fetched and where the images are stored is decided in graft_pipeline/ground_images.py.
"""

import codecs
import io
import logging
import re
import struct
import threading
from collections.abc import Sequence
from typing import Any
from urllib.parse import urljoin

import numpy as np

from graft_pipeline.errors import ItemError, ServiceError, SettingsError
from graft_pipeline.ground_images import FetchedImage
from graft_pipeline.settings import Settings
from resources.http import (
    TRANSIENT_STATUSES,
    USER_AGENT,
    Answer,
    BodyTooLargeError,
    Breaker,
    BrokenBodyError,
    HttpPool,
    Pace,
    Retries,
    TransientError,
    UnreachableError,
    host_of,
    is_http_url,
)

logger = logging.getLogger(__name__)

#: Largest file that is read, bytes; Flickr's largest display sizes stay far below.
MAX_BYTES = 20_000_000
#: Largest image that is decoded, pixels: its header tells before anything is decoded.
MAX_PIXELS = 50_000_000
#: Scans of a JPEG that is decoded: progressive ones have about ten, and each costs a pass over all pixels.
MAX_SCANS = 64
#: An image without this many pixels on its shorter side shows nothing: tracking pixels, spacers.
MIN_SIDE_PX = 32
#: Images are reduced to this shorter side, pixels; the foundation model looks at 224.
SHORT_SIDE_PX = 256
JPEG_QUALITY = 90
MAX_REDIRECTS = 3
#: An unusable body that comes so often, byte for byte, is not asked for again in the same materialisation.
SAME_BODY_LIMIT = 3

#: Passing reasons that tell of the host, or of a proxy in between, and not of the photo.
_OF_THE_HOST = ("not_an_image", "redirected")
#: What Flickr redirects to, or serves, in place of a photo that was removed.
_PLACEHOLDER = "photo_unavailable"
_EXIF_ORIENTATION = 0x0112
_START_OF_SCAN = b"\xff\xda"
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
#: What Pillow raises of files that are broken somewhere.
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, struct.error)


class ImageFetcher:
    """Fetches photos by URL; one object serves many threads.

    Only Flickr's image hosts are spoken to, over https, at public addresses; or, in their place, the address
    that a deployment configures.

    Args:
        static_url: where URLs of Flickr's image hosts are fetched from instead; None: as they are given.
        hosts: names of the image hosts; their subdomains are allowed too.
        public_only: refuse addresses in private, loopback or link-local networks; unless given, those of
            Flickr's own hosts.
        concurrency: number of threads that will use the object; a host has no more connections.
        requests_per_second: pace of the requests to one host; None: as fast as it goes.
        timeout_s: limit of one connect, and of each wait for bytes.
        retries: attempts and waits per photo.

    Attributes:
        concurrency: as given; for the caller's thread pool.
    """

    def __init__(
        self,
        *,
        static_url: str | None = None,
        hosts: Sequence[str] = ("staticflickr.com",),
        public_only: bool | None = None,
        concurrency: int = 16,
        requests_per_second: int | None = None,
        timeout_s: float = 30.0,
        retries: Retries | None = None,
    ) -> None:
        if static_url is not None and not is_http_url(static_url):
            raise SettingsError(f"{static_url!r} is no http(s) URL: correct GRAFT_FLICKR_STATIC_URL.")
        self._static_url = static_url.rstrip("/") if static_url is not None else None
        self._url_form = _url_form(hosts)
        self.concurrency = concurrency
        self._retries = retries or Retries()
        self._requests_per_second = requests_per_second
        self._paces: dict[str, Pace] = {}
        self._answered: set[str] = set()
        self._lock = threading.Lock()
        if public_only is None:
            public_only = static_url is None
        self._pool = HttpPool(connections=concurrency, timeout_s=timeout_s, public_only=public_only)
        host = self._static_url or "https://live.staticflickr.com"
        self._breaker = Breaker("Flickr's image host", host, limit=max(20, 2 * concurrency))

    @classmethod
    def from_settings(cls, settings: Settings, *, retries: Retries | None = None) -> "ImageFetcher":
        """The fetcher of a deployment.

        Args:
            settings: names the static URL, hosts, concurrency, pace and timeout; only the planet may be at a
                private address.
            retries: attempts and waits per photo.
        """
        return cls(
            static_url=settings.flickr_static_url,
            hosts=settings.image_hosts,
            public_only=not settings.is_planet,
            concurrency=settings.image_concurrency,
            requests_per_second=settings.image_requests_per_second,
            timeout_s=settings.image_timeout_s,
            retries=retries,
        )

    def __repr__(self) -> str:
        return f"ImageFetcher(static_url={self._static_url!r}, requests={self.requests})"

    @property
    def requests(self) -> int:
        """HTTP requests made so far."""
        return self._pool.requests

    @property
    def downloaded_bytes(self) -> int:
        """Bytes of the answers so far."""
        return self._pool.downloaded_bytes

    def close(self) -> None:
        """Close idle connections; the object opens new ones if it is used again."""
        self._pool.close()

    def fetch(self, url: str) -> FetchedImage:
        """Fetch one photo, check that it is whole, and reduce it.

        Args:
            url: an https URL of an image host.

        Returns:
            The photo as RGB JPEG, upright, with a shorter side of at most 256 px. A file that is so already
            is kept byte for byte.

        Raises:
            ItemError: if this photo cannot be had. Permanent: `gone`, `animated`, `not_an_image`,
                `too_large`, `too_small`, `url_not_allowed`, `refused`. To be tried again: `truncated`,
                `timeout`, `connection`, `unavailable`, `unreachable` (its host, while others answer),
                `rate_limited`, `forbidden`, `redirected`, and `not_an_image` for HTML, which tells of the server,
                not of the photo.
            ServiceError: if no host can be reached, or photo after photo fails.
        """
        bodies: list[bytes] = []
        try:
            image = self._retries.call(lambda: self._attempt(url, bodies))
        except ItemError as error:
            if not error.is_permanent and error.reason in _OF_THE_HOST:
                self._breaker.failed(str(error))
            else:
                self._breaker.succeeded()
            raise
        except TransientError as error:
            # Where another host answers, one that does not is no trouble of the network: Flickr gave up some.
            if not error.is_unreachable or self._answered - {host_of(url)}:
                self._breaker.failed(str(error))
                raise ItemError(error.reason, f"{url}: {error}", is_permanent=False) from None
            message = str(error)
        else:
            self._breaker.succeeded()
            return image
        raise ServiceError(
            f"Photos cannot be fetched: {message}. Check the network, the proxy (HTTPS_PROXY) and "
            "GRAFT_FLICKR_STATIC_URL, then run again: finished work is kept."
        )

    def _attempt(self, url: str, bodies: list[bytes]) -> FetchedImage:
        """One attempt; `bodies` are the unusable ones that this photo's attempts brought."""
        body = self._get(url).body
        try:
            return encode(body)
        except ItemError as error:
            # The next answer may be whole: HTTP cannot tell when no length was announced. The same bytes
            # again and again are what the server has.
            bodies.append(body)
            if error.is_permanent or bodies.count(body) >= SAME_BODY_LIMIT:
                raise
            raise TransientError(error.reason, str(error), is_quick=True) from None

    def _get(self, url: str) -> Answer:
        """The first answer that is no redirect."""
        target = self._address(url)
        if target is None:
            raise ItemError("url_not_allowed", f"{url!r} is not on Flickr's image hosts", is_permanent=True)
        for _ in range(MAX_REDIRECTS + 1):
            pace = self._pace(host_of(target))
            try:
                with pace.slot():
                    answer = self._pool.request("GET", target, headers=_HEADERS, max_bytes=MAX_BYTES)
            except BodyTooLargeError as error:
                raise ItemError("too_large", f"{url}: {error}", is_permanent=True) from None
            except UnreachableError as error:
                message = f"{host_of(target)} cannot be reached: {error}"
                raise TransientError("unreachable", message, is_unreachable=True) from None
            except TimeoutError as error:
                raise TransientError("timeout", str(error)) from None
            except BrokenBodyError as error:
                raise TransientError("truncated", str(error)) from None
            except ConnectionError as error:
                raise TransientError("connection", str(error)) from None
            self._answered.add(host_of(url))
            if answer.status == 429:
                # It is we who are too fast, not this photo: all threads wait. Flickr does not say how long.
                pace.pause(answer.retry_after_s)
            else:
                pace.ease()
            if not 300 <= answer.status < 400:
                self._check_status(url, answer)
                return answer
            try:
                location = urljoin(target, answer.headers.get("location", ""))
            except ValueError:
                location = "nowhere"
            if _PLACEHOLDER in location:
                raise ItemError("gone", f"{url}: removed from Flickr", is_permanent=True)
            is_inside = self._static_url is not None and location.startswith(self._static_url + "/")
            onward = location if is_inside else self._address(location)
            if onward is None:
                raise ItemError("redirected", f"{url}: redirected to {host_of(location)}", is_permanent=False)
            target = onward
        raise ItemError("redirected", f"{url}: more than {MAX_REDIRECTS} redirects", is_permanent=False)

    def _pace(self, host: str) -> Pace:
        """The limits of one host."""
        with self._lock:
            if host not in self._paces:
                self._paces[host] = Pace(
                    host, concurrency=self.concurrency, requests_per_second=self._requests_per_second
                )
            return self._paces[host]

    def _check_status(self, url: str, answer: Answer) -> None:
        status = answer.status
        if status in TRANSIENT_STATUSES:
            reason = "rate_limited" if status == 429 else "unavailable"
            raise TransientError(reason, f"HTTP {status}", retry_after_s=answer.retry_after_s)
        if status == 200:
            return
        if status in (404, 410):
            raise ItemError("gone", f"{url}: HTTP {status}", is_permanent=True)
        if status in (401, 403):
            # Made private, or this machine is blocked for a while: the row's own attempts decide.
            raise ItemError("forbidden", f"{url}: HTTP {status}", is_permanent=False)
        raise ItemError("refused", f"{url}: HTTP {status}", is_permanent=True)

    def _address(self, url: str) -> str | None:
        """Where a URL of Flickr's hosts is really fetched from; None if it is no such URL."""
        match = self._url_form.fullmatch(url)
        if match is None or ".." in match[1].split("/"):
            return None
        return url if self._static_url is None else self._static_url + match[1]


def _url_form(hosts: Sequence[str]) -> re.Pattern[str]:
    """The URLs of some hosts; strict, so that no two parsers can read different hosts out of one URL."""
    names = "|".join(re.escape(host) for host in hosts)
    return re.compile(
        rf"https://(?:[a-z0-9-]+\.)*(?:{names})(?::443)?(/[\w./~%+-]*)(?:\?[\w=&.-]*)?", re.ASCII
    )


_HEADERS = {"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"}


def encode(content: bytes) -> FetchedImage:
    """Check a photo's bytes and make them what is stored.

    Args:
        content: a JPEG, PNG, WebP or still GIF file.

    Returns:
        RGB JPEG, upright, with a shorter side of at most 256 px, and its perceptual hash.

    Raises:
        ItemError: `not_an_image`, `animated`, `too_large`, `too_small` (permanent); `truncated`, or
            `not_an_image` for HTML (not permanent).
    """
    import imagehash
    from PIL import Image

    if not content:
        raise ItemError("truncated", "no bytes", is_permanent=False)
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except Image.UnidentifiedImageError:
        raise _unidentified(content) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ItemError("too_large", str(error), is_permanent=True) from None
    except _BROKEN as error:
        raise ItemError("truncated", f"unreadable header: {error}", is_permanent=False) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ItemError("too_large", f"{width} x {height} px", is_permanent=True)
    if min(width, height) < MIN_SIDE_PX:
        raise ItemError("too_small", f"{width} x {height} px", is_permanent=True)
    try:
        # A multi-picture JPEG holds further views of a still photo: its first picture is the photo.
        is_animated = image.format != "MPO" and getattr(image, "is_animated", False)
    except _BROKEN as error:
        raise ItemError("truncated", f"unreadable frames: {error}", is_permanent=False) from None
    if is_animated:
        # Not how many: to count a GIF's is to read them all.
        raise ItemError("animated", "more than one frame", is_permanent=True)
    # Within a scan's data the marker cannot occur; other pictures of the file count as well.
    if image.format in ("JPEG", "MPO") and (scans := content.count(_START_OF_SCAN)) > MAX_SCANS:
        raise ItemError("too_large", f"{scans} scans", is_permanent=True)
    is_jpeg = image.format == "JPEG"
    if is_jpeg and b"\xff\xd9" not in content[-4096:]:
        raise ItemError("truncated", "no end-of-image marker", is_permanent=False)
    try:
        orientation = _orientation(image)
        target = _reduced(width, height)
        is_kept = (
            is_jpeg
            and image.mode == "RGB"
            and orientation == 1
            and target == (width, height)
            and len(content) <= 3 * width * height
        )
        if target != (width, height):
            # Decodes a JPEG at a half, quarter or eighth of its size, if that is still large enough.
            image.draft(None, target)
        image.load()
    except _BROKEN as error:
        raise ItemError("truncated", f"not decodable: {error}", is_permanent=False) from None
    if not is_kept:
        # Hamming: half of Lanczos' time, which is most of an image's, and sharper than the area filter of others.
        image = _upright(_as_rgb(image).resize(target, Image.Resampling.HAMMING), orientation)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
        content = buffer.getvalue()
    return FetchedImage(content, image.width, image.height, str(imagehash.phash(image)))


def _orientation(image: Any) -> int:
    """EXIF orientation, 1 to 8; 1 if there is none, or no sense in it."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except _BROKEN:
        return 1
    return value if value in range(1, 9) else 1


def _reduced(width: int, height: int) -> tuple[int, int]:
    """Size with a shorter side of at most `SHORT_SIDE_PX`."""
    scale = SHORT_SIDE_PX / min(width, height)
    return (width, height) if scale >= 1 else (max(1, round(width * scale)), max(1, round(height * scale)))


def _as_rgb(image: Any) -> Any:
    """Any mode as RGB; transparent parts become white."""
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        ground = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(ground, layered).convert("RGB")
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey instead of scaling it.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _upright(image: Any, orientation: int) -> Any:
    """The picture as its EXIF orientation says it is to be seen."""
    from PIL import Image

    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


def _unidentified(content: bytes) -> ItemError:
    """Whether bytes that no decoder knows are another thing, or the start of an image."""
    starts = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"GIF8")
    if content.startswith(starts):
        return ItemError("truncated", "the header is cut", is_permanent=False)
    if content.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"<":
        return ItemError("not_an_image", f"HTML of {len(content)} bytes", is_permanent=False)
    return ItemError("not_an_image", f"unknown content of {len(content)} bytes", is_permanent=True)
