"""Items of a partition that are fetched but in no shard or table yet: kept one by one, so that no kill loses them.

What an item is, and how it becomes a row, is decided in ground_images.py, chips.py and photos.py.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graft_pipeline.manifests import disk_full_explained, is_local

if TYPE_CHECKING:
    from upath import UPath

logger = logging.getLogger(__name__)

#: Folder of a partition that holds the items; it is gone when the partition is complete.
FOLDER = ".unfinished"


class Unfinished:
    """Kept items of one partition, found by key; any thread may keep and take.

    An item is one file: a line of JSON, then its content. Nothing waits for the disk: a killed process loses
    nothing by that, and what a power cut tears is noticed by its hash and fetched again.
    """

    def __init__(self, folder: "UPath | Path") -> None:
        """Look what an earlier process left.

        Args:
            folder: the partition's folder; one process at a time works in it.
        """
        self._folder = folder / FOLDER
        # Kept as a plain path: made anew for each item, paths would cost more than the writing.
        self._local = Path(str(self._folder))
        self._is_local = is_local(folder)
        self._keys = self._found()
        if self._keys:
            logger.info("%d items of an interrupted run are at hand in %s", len(self._keys), folder)

    def _found(self) -> set[str]:
        try:
            if self._is_local:
                return {path.name for path in self._local.iterdir()}
            folder = cast("UPath", self._folder)
            folder.fs.invalidate_cache(folder.path)
            return {str(name).rpartition("/")[2] for name in folder.fs.ls(folder.path, detail=False)}
        except FileNotFoundError:
            return set()

    def keep(self, key: str, request: str, values: Mapping[str, Any], content: bytes = b"") -> None:
        """Keep an item.

        Args:
            key: what it is called; letters, digits, `-`, `_` and `.`.
            request: what was asked for; an item is only given back for the same.
            values: what came of it, as JSON types.
            content: its bytes.

        Raises:
            ServiceError: if the disk is full.
        """
        head = {"request": request, "sha256": hashlib.sha256(content).hexdigest(), "values": dict(values)}
        data = json.dumps(head).encode() + b"\n" + content
        if self._is_local:
            path = self._local / key
            # Under its final name at once, as its hash tells whether it is whole: one file in place of a rename.
            with disk_full_explained(path):
                try:
                    path.write_bytes(data)
                except FileNotFoundError:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
        else:
            remote = cast("UPath", self._folder / key)
            remote.fs.pipe_file(remote.path, data)
        self._keys.add(key)

    def take(self, key: str, request: str) -> tuple[dict[str, Any], bytes] | None:
        """What is kept of an item; it stays there until it is forgotten.

        Args:
            key: what it is called.
            request: what is asked for.

        Returns:
            (values, content), None if there is none, it answers another request, or it is damaged.
        """
        if key not in self._keys:
            return None
        try:
            line, _, content = (self._folder / key).read_bytes().partition(b"\n")
            head = json.loads(line)
            is_whole = head["sha256"] == hashlib.sha256(content).hexdigest()
            return (head["values"], content) if is_whole and head["request"] == request else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def forget(self, keys: Iterable[str]) -> None:
        """Drop items that are stored for good now.

        Args:
            keys: of any items; those that are not kept are passed over.
        """
        gone = self._keys.intersection(keys)
        self._keys -= gone
        self._remove(gone)

    def close(self) -> None:
        """Drop everything: the partition is complete."""
        gone, self._keys = self._keys, set()
        self._remove(gone)
        if self._is_local:
            # Of files that others put there the folder may keep its own.
            with contextlib.suppress(OSError):
                self._local.rmdir()

    def _remove(self, keys: Iterable[str]) -> None:
        if self._is_local:
            for key in keys:
                (self._local / key).unlink(missing_ok=True)
            return
        folder = cast("UPath", self._folder)
        paths = [f"{folder.path}/{key}" for key in keys]
        if paths:
            with contextlib.suppress(FileNotFoundError):
                folder.fs.rm(paths)
