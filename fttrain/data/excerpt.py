"""An excerpt of a data set: a few whole rows, drawn at random as an epoch draws them."""

import numpy as np

from fttrain.data.dataset import Document, Rows


class Excerpt:
    """Rows with ``documents`` documents in total, or all rows. The last row may be cut."""

    def __init__(self, rows: Rows, documents: int, seed: int) -> None:
        """Draw the rows by ``seed``."""
        self._rows: list[list[Document]] = []
        # A source may be sorted by length: its first rows would not be typical of a run.
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
