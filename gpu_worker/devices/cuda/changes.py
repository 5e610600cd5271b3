"""What a step changes in tables on the device: words and their places."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TableWords:
    """Words for one table: flat places in it, each once, and what is to be there; `seen` as in `scatter_words`."""

    table: torch.Tensor
    places: Int32Array
    values: Int32Array
    seen: torch.Tensor | None = None


class Changes:
    """Words to be written to tables on the device; no place twice."""

    def __init__(self) -> None:
        self._words: list[TableWords] = []

    def add(
        self,
        table: torch.Tensor,
        places: npt.NDArray[np.integer],
        values: Int32Array,
        seen: torch.Tensor | None = None,
    ) -> None:
        """Write values to flat places of a table, and 1 to those of `seen`: the same one for all words of a table."""
        if len(values):
            self._words.append(TableWords(table, places.astype(np.int32), values, seen))

    def add_row(self, table: torch.Tensor, row: int, values: Int32Array) -> None:
        """Write values to the beginning of a table's row."""
        self.add(table, row * table.shape[1] + np.arange(len(values)), values)

    def pieces(self, max_words: int) -> list[list[TableWords]]:
        """Return the changes of each table joined, in pieces that take at most `max_words` to send: at least one."""
        pieces: list[list[TableWords]] = [[]]
        room = max_words
        for first in {id(words.table): words for words in self._words}.values():
            same = [words for words in self._words if words.table is first.table]
            places = np.concatenate([words.places for words in same])
            values = np.concatenate([words.values for words in same])
            while len(places):
                count = min(len(places), (room - 8) // 2)  # 8: both columns begin at a multiple of 4
                if count <= 0:
                    pieces.append([])
                    room = max_words
                    continue
                pieces[-1].append(TableWords(first.table, places[:count], values[:count], first.seen))
                places, values = places[count:], values[count:]
                room -= 2 * (-(-count // 4) * 4)
        return pieces
