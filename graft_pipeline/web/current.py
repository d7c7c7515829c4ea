"""The index that the page answers from: looked at now and then, and opened anew when it changed.

What it is asked is in scoring.py; how it changes, in search_index.py.
"""

import logging
import threading
import time
from typing import TYPE_CHECKING

from graft_pipeline.errors import GraftError
from graft_pipeline.search import SearchIndex, stale_regions
from graft_pipeline.search_index import read_manifest
from graft_pipeline.web.scoring import EncodeText, Scorer

if TYPE_CHECKING:
    from upath import UPath

logger = logging.getLogger(__name__)

#: Seconds between two looks at whether the index changed: of 20,000 regions one takes a twelfth of a second.
LOOK_S = 2.0
#: Seconds after which an index that could not be opened is tried again: another update may be under way.
RETRY_S = 10.0
#: Seconds between two looks at all regions' files, of which each is opened.
STALE_S = 60.0


class OutdatedError(GraftError):
    """The index is none any more that this server can ask."""


class Opened:
    """An index as it was when it was opened; all that is asked of one is of the same tiles. For any thread.

    Attributes:
        index: the index, all of whose files are open.
        scorer: what its tiles score.
    """

    def __init__(self, root: "UPath", index: SearchIndex, encode_text: EncodeText) -> None:
        self._root = root
        self.index = index
        self.scorer = Scorer(index, encode_text)
        self._stale, self._stale_until = index.stale, time.monotonic() + STALE_S
        self._lock = threading.Lock()

    def stale(self) -> dict[str, str]:
        """Regions that changed since the index was made, and how, as of at most `STALE_S` ago."""
        with self._lock:
            if time.monotonic() >= self._stale_until:
                try:
                    self._stale = stale_regions(self._root, self.index.sensor, self.index.manifest)
                except (GraftError, OSError) as error:
                    logger.warning("Which regions changed cannot be read, and is asked again: %s", error)
                self._stale_until = time.monotonic() + STALE_S
            return self._stale


class Current:
    """A sensor's index as it is now, without a restart after each update. For any thread.

    A photo that was purged must not live on in a server: soon after the index changed, it is opened anew.

    Args:
        root: storage root.
        index: the sensor's index.
        encode_text: the text tower of the encoder that made its vectors.
    """

    def __init__(self, root: "UPath", index: SearchIndex, encode_text: EncodeText) -> None:
        self._root, self._encode = root, encode_text
        self._opened = Opened(root, index, encode_text)
        self._refusal: str | None = None
        self._next_look = 0.0
        self._lock = threading.Lock()

    def get(self) -> Opened:
        """The index to answer from; who has one goes on with it, whatever happens to the files.

        Raises:
            OutdatedError: if the index is of another encoder now, or holds no tile any more.
        """
        if time.monotonic() >= self._next_look and self._lock.acquire(blocking=False):
            # One opens what is new; meanwhile others are answered from what is open.
            try:
                self._look()
            finally:
                self._lock.release()
        if self._refusal is not None:
            raise OutdatedError(self._refusal)
        return self._opened

    def _look(self) -> None:
        pause_s = LOOK_S
        try:
            self._follow()
        except (GraftError, OSError) as error:
            logger.warning("The search index cannot be opened anew; answers are of the one before: %s", error)
            pause_s = RETRY_S
        self._next_look = time.monotonic() + pause_s

    def _follow(self) -> None:
        served = self._opened.index
        manifest = read_manifest(self._root, served.sensor)
        if manifest == served.manifest:
            self._refusal = None
        elif manifest is not None and not manifest.rows:
            self._refusal = (
                f"No tile is in the search index of {served.sensor} any more: materialise "
                f"{served.sensor}/chip_embeddings of its regions, then {served.sensor}/search_index."
            )
        elif manifest is not None and manifest.model_id != served.model_id:
            self._refusal = (
                f"The search index of {served.sensor} is of another encoder now: restart `graft serve`."
            )
        else:
            index = SearchIndex.open(self._root, served.sensor)
            index.check_model(served.model_id)
            index.load()
            self._opened, self._refusal = Opened(self._root, index, self._encode), None
            logger.info("The search index changed: %d tiles are served now.", index.rows)
