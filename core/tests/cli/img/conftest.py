"""Images that the command lines of these tests work on, made by the peer once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from .peer import peer

_LINES = """
create -q -f qcow2 a.qcow2 1M
io: -c 'write -P 1 0 64k' -c 'write -P 2 256k 128k' a.qcow2
create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2
io: -c 'write -P 3 64k 64k' -c 'write -z 256k 64k' b.qcow2
create -q -f qcow2 -b b.qcow2 -F qcow2 c.qcow2 3M
create -q -f raw r.raw 1M
io: -f raw -c 'write -P 1 0 20k' -c 'write -P 2 512k 4k' r.raw
create -q -f qcow2 -b r.raw -F raw onraw.qcow2
create -q -f qcow2 snap.qcow2 1M
io: -c 'write -P 1 0 64k' snap.qcow2
snapshot -c one snap.qcow2
snapshot -c 'a rather long name of a snapshot' snap.qcow2
create -q -f qcow2 bm.qcow2 1M
bitmap --add bm.qcow2 bm0
bitmap --add --disable -g 512 bm.qcow2 bm1
create -q -f qcow2 -o compat=0.10 old.qcow2 1M
create -q -f qcow2 -o lazy_refcounts=on,refcount_bits=1,cluster_size=4k small.qcow2 1M
create -q -f qcow2 -o preallocation=metadata meta.qcow2 1M
create -q -f qcow2 -u -b ../a.qcow2 -F qcow2 sub/up.qcow2 1M
create -q -f qcow2 -u -b gone -F qcow2 orphan.qcow2 1M
create -q -f qcow2 -u -b loop2.qcow2 -F qcow2 loop1.qcow2 1M
create -q -f qcow2 -u -b loop1.qcow2 -F qcow2 loop2.qcow2 1M
create -q -f qcow2 leak.qcow2 1M
io: -c 'write 0 64k' leak.qcow2
convert -c -O qcow2 a.qcow2 compressed.qcow2
"""


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of images."""
    where = tmp_path_factory.mktemp("base")
    (where / "sub").mkdir()
    (where / "dir").mkdir()
    for line in _LINES.strip().splitlines():
        peer(line, where)
    # A cluster that nothing points at any more: the L2 entry of the first one is cleared.
    with (where / "leak.qcow2").open("r+b") as file:
        file.seek(0x40000)
        file.write(bytes(8))
    # A refcount of 0 for a cluster in use.
    (where / "damaged.qcow2").write_bytes((where / "a.qcow2").read_bytes())
    with (where / "damaged.qcow2").open("r+b") as file:
        file.seek(0x20000 + 2 * 5)
        file.write(bytes(2))
    (where / "odd.raw").write_bytes(b"x" * 1000)
    (where / "empty").write_bytes(b"")
    (where / "secret").write_text("passphrase")
    return where
