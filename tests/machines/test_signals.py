"""Signals end a running machine in order, however they arrive."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from vmtest import LONG, ROOT, assemble, program, run
from vmtest.guest import Guest


def test_terminate_and_continue_together(tmp_path: Path) -> None:
    """SIGTERM with SIGCONT right behind it, as `timeout` sends them, ends a busy machine and leaves a clean image."""
    boot, disk = tmp_path / "boot.img", tmp_path / "disk.qcow2"
    boot.write_bytes(assemble(ROOT / "tests/guests/writer.S", tmp_path))
    run(program("qemu-img", "qemu-utils"), "create", "-q", "-f", "qcow2", disk, "16M")
    run(program("qemu-io", "qemu-utils"), "-c", f"write -s {boot} 0 512", disk)
    for round_ in range(30 if LONG else 6):
        with Guest("-accel", "unicorn", "-m", "16", "-drive", f"file={disk},format=qcow2,if=ide") as guest:
            guest.expect(r"F[0-9a-f]{8}\n", 60)
            time.sleep(0.05 * round_)
            guest.process.send_signal(signal.SIGTERM)
            guest.process.send_signal(signal.SIGCONT)
            assert guest.wait(10) == 0, guest.report()
        run(program("qemu-img", "qemu-utils"), "check", disk)
