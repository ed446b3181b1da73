"""Packing: documents into rows of at most seq_len tokens, by best-fit decreasing. Nothing is padded
and no document is split.

Attention stays inside a document: a row is a list of documents, and a micro-batch has their
lengths.
"""

import numpy as np
from numpy.typing import NDArray


def pack(lengths: NDArray[np.int64], seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (order, offsets) of the rows; row r is ``order[offsets[r]:offsets[r + 1]]``.

    ``lengths`` (documents,): tokens, each in [1, seq_len]. ``order`` int64 (documents,),
    ``offsets`` int64 (rows + 1,). Deterministic: documents ascend within a row, rows ascend by
    their first document. Raises ValueError for other lengths.
    """
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= seq_len:
        raise ValueError(f"document lengths must be in [1, {seq_len}]")
    rows: list[list[int]] = []
    # free tokens -> the rows that have exactly as many
    rows_by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rooms = 0  # bit r: some row has r free tokens. The best fit is the lowest bit >= the length
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(document)
        rows_by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    rows = sorted(sorted(row) for row in rows)
    order = np.array([document for row in rows for document in row], dtype=np.int64)
    return order, np.cumsum([0, *map(len, rows)], dtype=np.int64)


def one_per_row(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (order, offsets) as ``pack`` does, with a single document in each row."""
    return np.arange(len(lengths), dtype=np.int64), np.arange(len(lengths) + 1, dtype=np.int64)
