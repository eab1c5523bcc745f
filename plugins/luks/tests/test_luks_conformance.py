"""The kit's tests, with qemu-img as the oracle."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from luks_peer import LONG, Peers

from vm_core.block.node import Node
from vm_core.testing.conformance import FormatConformance
from vm_core.testing.nodes import MemoryNode

_QUICK = {"key-secret": "sec", "iter-time": 1}


class TestLuks(FormatConformance):
    """LUKS in its modes. A new image holds whatever the key makes of zeroes, so it is zeroed first."""

    driver = "luks"
    size = 128 * 1024 + 512
    create_options = (
        _QUICK,
        *(
            [
                {**_QUICK, "cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "essiv", "hash-alg": "sha1"},
                {**_QUICK, "cipher-mode": "ecb"},
                {**_QUICK, "ivgen-alg": "plain", "hash-alg": "sha512"},
            ]
            if LONG
            else []
        ),
    )
    operations = 200 if LONG else 40
    rounds = 300 if LONG else 5
    cuts = 300 if LONG else 12
    metadata = 592
    header = 256

    @pytest.fixture(autouse=True)
    def _few_iterations(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Damaged images may ask for as many iterations as are allowed: here fewer are, since seconds are counted."""
        monkeypatch.setattr("vm_core.crypto.luks.MAX_ITERATIONS", 1 << 20)

    def open(self, storage: Node | str | Path, *, readonly: bool = True, **options: Any) -> Node:
        return super().open(storage, readonly=readonly, **{"key-secret": "sec", **options})

    def make(self, options: dict[str, Any], size: int | None = None) -> MemoryNode:
        file = super().make(options, size)
        with self.open(file, readonly=False) as node:
            node.zero(0, node.size)
        return file

    def oracle_read(self, path: Path) -> bytes | None:
        return Peers().read(path) if shutil.which("qemu-img") else None

    def oracle_make(self, path: Path, data: bytes, options: dict[str, Any]) -> bool:
        if not shutil.which("qemu-img"):
            return False
        peers = Peers()
        given = {**options, "iter-time": 20}
        peers.img(
            "create",
            *("-q", "-f", "luks", "-o", ",".join(f"{key}={value}" for key, value in given.items())),
            *(path, len(data)),
        )
        peers.write(path, data)
        return True
