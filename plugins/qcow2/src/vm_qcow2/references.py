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
        geometry = store.geometry
        #: The type of the decoded refcounts, so that slices compare at once.
        self.code = {16: "H", 32: "I", 64: "Q"}.get(geometry.refcount_bits, "B")
        #: No counter goes higher.
        self.most = geometry.refcount_max
        #: Clusters looked at: those of the file, and what was counted or taken behind its end.
        self.clusters = -(-store.file.size >> geometry.cluster_bits)
        self._store = store
        self._pieces: dict[int, array[int]] = {}
        self._none = array(self.code, bytes(PIECE * array(self.code).itemsize))
        # A file without holes needs a counter a cluster; one that claims more points into its holes.
        clusters = max(store.file.known_allocated().get("actual-size", 0), 1 << 20) >> geometry.cluster_bits
        self._limit = max(LIMIT_BYTES, 16 * clusters) // (PIECE * self._none.itemsize)

    def add(self, first: int, count: int, weight: int = 1) -> list[int]:
        """*weight* more references to each of *count* clusters; returns those that cannot be counted so high."""
        over: list[int] = []
        self.clusters = max(self.clusters, first + count)
        while count:
            piece = self._writable(first >> PIECE_BITS)
            low = first & PIECE - 1
            high = min(low + count, PIECE)
            value = piece[low]
            alike = high - low > 1 and piece[low:high] == array(self.code, (value,)) * (high - low)
            if alike and value + weight <= self.most:
                piece[low:high] = array(self.code, (value + weight,)) * (high - low)
                first, count = first + high - low, count - high + low
                continue
            for index in range(low, high):
                if piece[index] + weight > self.most:
                    piece[index] = self.most
                    over.append(first - low + index)
                else:
                    piece[index] += weight
            first += high - low
            count -= high - low
        return over

    def _writable(self, number: int) -> array[int]:
        piece = self._pieces.get(number)
        if piece is None:
            if len(self._pieces) >= self._limit:
                raise self._store.error("the tables point at more places than the file has; it cannot be checked")
            piece = self._pieces[number] = self._none[:]
        return piece

    def get(self, cluster: int) -> int:
        """References to one cluster."""
        piece = self._pieces.get(cluster >> PIECE_BITS)
        return piece[cluster & PIECE - 1] if piece is not None else 0

    def piece(self, number: int) -> array[int]:
        """The counters of one piece."""
        return self._pieces.get(number, self._none)

    def slice(self, first: int, count: int) -> array[int]:
        """The counters of *count* clusters."""
        found = array(self.code)
        while count:
            piece = self.piece(first >> PIECE_BITS)
            part = piece[first & PIECE - 1 : (first & PIECE - 1) + count]
            found.extend(part)
            first += len(part)
            count -= len(part)
        return found

    def __contains__(self, number: int) -> bool:
        """Whether anything is counted in piece *number*."""
        return number in self._pieces

    def pieces(self) -> list[int]:
        """Numbers of the pieces in which something is counted."""
        return sorted(self._pieces)

    def take(self, count: int, start: int) -> int:
        """Count the first *count* clusters in a row from *start* on to which nothing points; returns the first."""
        found = 0
        cluster = start
        while found < count:
            piece = self._pieces.get(cluster >> PIECE_BITS)
            if piece is None:
                step = min(count - found, PIECE - (cluster & PIECE - 1))
                found, cluster = found + step, cluster + step
            else:
                found = 0 if piece[cluster & PIECE - 1] else found + 1
                cluster += 1
        self.add(cluster - count, count)
        return cluster - count
