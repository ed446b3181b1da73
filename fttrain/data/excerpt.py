"""A few examples of a data set as a run would meet them: whole rows, drawn as an epoch does it."""

import numpy as np

from fttrain.data.dataset import Document, Rows


class Excerpt:
    """Rows that hold ``documents`` documents together, or all there are; the last row may lack some
    of its own.
    """

    def __init__(self, rows: Rows, documents: int, seed: int) -> None:
        """``seed``: draws the rows."""
        self._rows: list[list[Document]] = []
        # A source may be sorted by length: its first rows would not be those of a run.
        for row in np.random.RandomState(seed & 0xFFFFFFFF).permutation(len(rows)).tolist():
            if documents <= 0:
                break
            self._rows.append(rows[row][:documents])
            documents -= len(self._rows[-1])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[Document]:
        return self._rows[index]

    @property
    def documents(self) -> int:
        return sum(map(len, self._rows))
