"""Shortlists: which of millions of vectors may be nearest to a query, by a compressed index of faiss.

Vectors are scored exactly afterwards, in search.py; which vectors are in the index is kept by search_index.py.
"""

import math
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from graft_pipeline.errors import DataError

#: Bits that each dimension keeps. Of a million vectors of 512 dimensions, among a thousand candidates were 99 % of the
#: hundred nearest to words, which lie apart from all images; one bit finds fewer, four take twice the memory to find
#: them among fewer candidates. Graphs (HNSW) take four times the memory.
BITS = 2
#: Vectors that the lists are learned from, for each list.
SAMPLE_PER_LIST = 40
_ITERATIONS = 8
_SEED = 1
#: Share of the lists that a query looks into, and at least as many as hold so many vectors.
PROBED_SHARE, LEAST_PROBED = 1 / 24, 50_000
#: Candidates for each vector that is asked for, at least the second number.
CANDIDATES_PER_HIT, LEAST_CANDIDATES = 20, 500


class Shortlist:
    """Inverted lists around centres of k-means; in them, vectors of two bits a dimension, as RaBitQ rounds them.

    A random rotation goes first, on which RaBitQ's rounding relies.
    """

    def __init__(self, index: Any) -> None:
        """Use `train` or `read`."""
        import faiss

        self._index = index
        self._lists = faiss.extract_index_ivf(index)

    @classmethod
    def train(cls, sample: npt.NDArray[np.float32], rows: int) -> Self:
        """An empty index whose lists suit some vectors.

        Args:
            sample: (M, D) float32, L2-normalised; `sample_size(rows)` of them.
            rows: how many vectors it is going to hold.

        Returns:
            The index.
        """
        import faiss

        width, lists = sample.shape[1], lists_for(rows)
        rotation = faiss.RandomRotationMatrix(width, width)
        rotation.init(_SEED)
        rotated = rotation.apply(sample)
        centres = faiss.Kmeans(
            *(width, lists), niter=_ITERATIONS, spherical=True, seed=_SEED, min_points_per_centroid=1
        )
        centres.train(rotated)
        quantizer = faiss.IndexFlatIP(width)
        quantizer.add(centres.centroids)
        inverted = faiss.IndexIVFRaBitQFastScan(
            quantizer, width, lists, faiss.METRIC_INNER_PRODUCT, 32, True, BITS
        )
        inverted.train(rotated)
        # Python would free what faiss owns from here on.
        quantizer.this.disown()
        inverted.own_fields = True
        index = faiss.IndexPreTransform(rotation, inverted)
        rotation.this.disown()
        inverted.this.disown()
        index.own_fields = True
        return cls(index)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a written index.

        Args:
            path: local file.

        Returns:
            The index.

        Raises:
            FileNotFoundError: if there is none.
            DataError: if it is damaged.
        """
        import faiss

        # faiss does not tell a missing file from a damaged one.
        path.stat()
        try:
            return cls(faiss.read_index(str(path)))
        except RuntimeError as error:
            raise DataError(
                f"{path} is damaged: delete it and materialise the search index again."
            ) from error

    def write(self, path: Path) -> None:
        """Write the index to a local file; same history on as many cores, same bytes."""
        import faiss

        faiss.write_index(self._index, str(path))

    @property
    def rows(self) -> int:
        """Vectors in it."""
        return int(self._index.ntotal)

    def add(self, vectors: npt.NDArray[np.float32], first_id: int) -> None:
        """Add vectors.

        Args:
            vectors: (N, D) float32, L2-normalised.
            first_id: they are numbered from it.
        """
        self._index.add_with_ids(
            np.ascontiguousarray(vectors), np.arange(first_id, first_id + len(vectors), dtype=np.int64)
        )

    def remove(self, first_id: int, count: int) -> None:
        """Remove vectors by their numbers.

        Args:
            first_id: first number.
            count: how many numbers.
        """
        import faiss

        self._index.remove_ids(faiss.IDSelectorRange(first_id, first_id + count))

    def candidates(
        self,
        vector: npt.NDArray[np.float32],
        top: int,
        is_admitted: npt.NDArray[np.bool_] | None = None,
    ) -> npt.NDArray[np.int64]:
        """Numbers of the vectors among which the nearest are.

        Args:
            vector: (D,) float32, L2-normalised.
            top: how many of the nearest are wanted.
            is_admitted: (largest number + 1,) bool, which may be answered; None: all. More lists are looked into the
                fewer they are, and until enough of them are found: ground of an area looks alike, so that they may all
                lie in lists that are far from the vector.

        Returns:
            Their numbers, ascending.
        """
        import faiss

        admitted = self.rows if is_admitted is None else max(1, int(np.count_nonzero(is_admitted)))
        wanted = max(LEAST_CANDIDATES, CANDIDATES_PER_HIT * top)
        lists = self._lists.nlist
        probed = lists * max(PROBED_SHARE, LEAST_PROBED / self.rows) * math.sqrt(self.rows / admitted)
        # Kept by name: faiss refers to them.
        bits = None if is_admitted is None else np.packbits(is_admitted, bitorder="little")
        selector = None if bits is None else faiss.IDSelectorBitmap(bits)
        while True:
            inside = faiss.SearchParametersIVF(nprobe=min(lists, math.ceil(probed)), sel=selector)
            parameters = faiss.SearchParametersPreTransform(index_params=inside)
            _, found = self._index.search(vector[None], wanted, params=parameters)
            numbers = np.sort(found[0][found[0] >= 0])
            if probed >= lists or len(numbers) >= min(wanted, admitted):
                return numbers
            probed *= 4


def sample_size(rows: int) -> int:
    """How many of some vectors the lists are learned from.

    Args:
        rows: vectors.

    Returns:
        The number.
    """
    return min(rows, SAMPLE_PER_LIST * lists_for(rows))


def lists_for(rows: int) -> int:
    """How many lists an index of some vectors has: a power of two near twice the root of their number.

    Args:
        rows: vectors.

    Returns:
        The number.
    """
    return int(2 ** round(math.log2(max(1.0, 2 * math.sqrt(rows)))))
