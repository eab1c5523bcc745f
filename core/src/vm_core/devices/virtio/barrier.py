"""Memory barriers between a device and a driver that runs on another host processor at the same time.

Theory of operation. Single loads and stores of 2, 4 and 8 aligned bytes through a cast memoryview are one machine
instruction in CPython (the ``struct``-like pack and unpack of one native item is a fixed-size ``memcpy``), so they are
never torn. What is left is their order:

- On x86 loads stay ordered among loads and stores among stores. Publishing a used index behind its entries, or reading
  entries behind an available index, needs nothing; :func:`ordered` is then a function that does nothing. Elsewhere it
  is the full barrier.
- A store followed by a load of another address may be swapped by every processor. That pair decides both
  suppressions (virtio 1.2, 2.7.7.1 and 2.7.10): "I have published, does the other side want to know?" asked by both
  sides at once loses the wakeup unless each has a barrier in between. :func:`full` is that barrier.

Python has no fence. Taking and releasing a lock executes one atomic read-modify-write each: on x86 any of them is a
full barrier; on processors with acquire and release semantics the release of one round followed by the acquire of the
next orders everything before against everything behind. Hence two rounds.
"""

from __future__ import annotations

import platform
import threading

_lock = threading.Lock()


def full() -> None:
    """No access behind this point is seen before an access ahead of it."""
    with _lock:
        pass
    with _lock:
        pass


def _nothing() -> None:
    """The processor keeps this order by itself."""


#: Loads ahead before loads behind, stores ahead before stores behind.
ordered = _nothing if platform.machine().lower() in ("x86_64", "amd64", "i386", "i686") else full
