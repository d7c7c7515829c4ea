"""What sheets choose to show."""

import numpy as np
import pyarrow as pa

from graft_pipeline import embeddings, sheets


def embedded(angles: list[float]) -> pa.Table:
    vectors = np.column_stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    return pa.table({"embedding": embeddings.to_column(vectors)})


def test_the_most_and_the_least_typical_rows_are_found() -> None:
    nearest, farthest = sheets.extreme_rows(embedded([0.0, 0.1, -0.1, 2.0, 0.2]), 1)
    assert nearest.tolist() == [4]
    assert farthest.tolist() == [3]


def test_few_rows_are_not_shown_twice() -> None:
    nearest, farthest = sheets.extreme_rows(embedded([0.0, 0.1, 1.0]), 16)
    assert len({*nearest.tolist(), *farthest.tolist()}) == 2
    assert [len(rows) for rows in sheets.extreme_rows(embedded([0.3]), 16)] == [0, 0]


def test_positions_follow_the_order_of_the_photos_shown() -> None:
    pairs = pa.table({"photo_id": ["a", "b", "c"], "col_px": [1.0, 2.0, 3.0], "row_px": [0.0, 0.0, 0.0]})
    assert sheets.photo_marks(pairs, ["c", "a"])[:, 0].tolist() == [3.0, 1.0, 2.0]
    assert sheets.centered_square(448, 224) == (112, 112, 336, 336)
