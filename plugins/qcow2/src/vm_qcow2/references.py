"""Counting anew how often each host cluster is pointed at."""

from __future__ import annotations

from array import array

from .store import Store

#: Clusters a piece of the map.
PIECE_BITS = 12
PIECE = 1 << PIECE_BITS
#: Bytes of counters that any image may need.
LIMIT_BYTES = 64 << 20


class References:
    """Counters for the clusters of a file, in pieces that exist where something is counted."""

    def __init__(self, store: Store) -> None:
        bits = store.geometry.refcount_bits
        #: The same type as the decoded refcounts, where that is wide enough, so that slices compare at once.
        self.code = {32: "I", 64: "Q"}.get(bits, "H")
        self._most = (1 << 8 * array(self.code).itemsize) - 1
        self._store = store
        self._pieces: dict[int, array[int]] = {}
        self._none = array(self.code, bytes(PIECE * array(self.code).itemsize))
        # A file without holes needs a counter a cluster; one that claims more points into its holes.
        clusters = max(store.file.allocated(), 1 << 20) >> store.geometry.cluster_bits
        self._limit = max(LIMIT_BYTES, 16 * clusters) // (PIECE * self._none.itemsize)

    def add(self, first: int, count: int, weight: int = 1) -> None:
        """*weight* more references to each of *count* clusters."""
        while count:
            piece = self._pieces.get(first >> PIECE_BITS)
            if piece is None:
                if len(self._pieces) >= self._limit:
                    raise self._store.error("the tables point at more places than the file has; it cannot be checked")
                piece = self._pieces[first >> PIECE_BITS] = self._none[:]
            low = first & PIECE - 1
            high = min(low + count, PIECE)
            if high - low > 1 and piece[low:high] == self._none[low:high]:
                piece[low:high] = array(self.code, (weight,)) * (high - low)
            else:
                for index in range(low, high):
                    piece[index] = min(piece[index] + weight, self._most)
            first += high - low
            count -= high - low

    def get(self, cluster: int) -> int:
        """References to one cluster."""
        piece = self._pieces.get(cluster >> PIECE_BITS)
        return piece[cluster & PIECE - 1] if piece is not None else 0

    def piece(self, number: int) -> array[int]:
        """The counters of one piece."""
        return self._pieces.get(number, self._none)

    def __contains__(self, number: int) -> bool:
        """Whether anything is counted in piece *number*."""
        return number in self._pieces

    def pieces(self) -> list[int]:
        """Numbers of the pieces in which something is counted."""
        return sorted(self._pieces)

    def end(self) -> int:
        """The cluster after the last that is referenced."""
        for number in sorted(self._pieces, reverse=True):
            piece = self._pieces[number]
            for index in range(PIECE - 1, -1, -1):
                if piece[index]:
                    return (number << PIECE_BITS) + index + 1
        return 0
