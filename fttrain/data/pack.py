"""Documents -> rows of at most seq_len tokens, by best-fit decreasing. Nothing is padded and no
document is split.

Attention stays inside a document: a row keeps its documents apart, and the micro-batch made of it
their lengths.
"""

import numpy as np
from numpy.typing import NDArray


def pack(lengths: NDArray[np.int64], seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lengths (documents,) in tokens, each in [1, seq_len] -> (order, offsets).

    Row r holds the documents ``order[offsets[r]:offsets[r + 1]]``. Deterministic: documents ascend
    within a row, rows ascend by their first document. ``order`` int64 (documents,), ``offsets``
    int64 (rows + 1,).
    """
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= seq_len:
        raise ValueError(f"document lengths must be in [1, {seq_len}]")
    rows: list[list[int]] = []
    roomy: list[list[int]] = [
        [] for _ in range(seq_len + 1)
    ]  # room in tokens -> rows that have exactly that much
    rooms = 0  # bit r: some row has room r. The best fit is the lowest bit at or above the length
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = roomy[room].pop()
            if not roomy[room]:
                rooms &= ~(1 << room)
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(document)
        roomy[room - length].append(row)
        rooms |= 1 << (room - length)
    rows = sorted(sorted(row) for row in rows)
    order = np.array([document for row in rows for document in row], dtype=np.int64)
    return order, np.cumsum([0, *map(len, rows)], dtype=np.int64)


def one_per_row(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The same result for rows of a single document."""
    return np.arange(len(lengths), dtype=np.int64), np.arange(len(lengths) + 1, dtype=np.int64)
