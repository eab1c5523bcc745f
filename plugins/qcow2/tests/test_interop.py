"""One image in turns written here and by the peer, against a bytearray; in every combination of options."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import vm_core
from vm_core.block.mapping import Kind
from vm_core.block.node import Node
from vm_core.block.open import create_image, open_node
from vm_core.cli.img.map import entries
from vm_core.testing.qemu import LONG, Qemu

CLUSTERS = [512, 1024, 4096, 65536, 1 << 20, 2 << 20]
WIDTHS = [1, 2, 4, 8, 16, 32, 64]


class Machine(RuleBasedStateMachine):
    """The image, the model, and who has the image open."""

    qemu: Qemu

    @initialize(
        compat=st.sampled_from(["1.1", "1.1", "0.10"]),
        cluster=st.sampled_from(CLUSTERS),
        width=st.sampled_from(WIDTHS),
        lazy=st.booleans(),
        compression=st.sampled_from(["zlib", "zstd"]),
        backing=st.sampled_from([0, 0, 50_000, 700_000]),
        size=st.integers(1, 4096),
        ours=st.booleans(),
        preallocate=st.booleans(),
        extended=st.booleans(),
    )
    def make(
        self,
        compat: str,
        cluster: int,
        width: int,
        lazy: bool,
        compression: str,
        backing: int,
        size: int,
        ours: bool,
        preallocate: bool,
        extended: bool,
    ) -> None:
        self.node: Node | None = None
        self.snapshots: dict[str, bytes] = {}
        self.names = 0
        self.folder = Path(tempfile.mkdtemp(prefix="vm-qcow2-"))
        self.path = self.folder / "disk.qcow2"
        options: dict[str, Any] = {"compat": compat, "cluster_size": cluster}
        self.v3 = compat == "1.1"
        self.width = width if self.v3 else 16
        if self.v3:
            options |= {"refcount_bits": width, "lazy_refcounts": lazy, "compression_type": compression}
            if extended:
                cluster = max(cluster, 16384)
                options |= {"extended_l2": True, "cluster_size": cluster}
        self.backing = backing
        self.cluster = cluster
        size *= 512
        self.model = bytearray(size)
        if backing:
            data = random.Random(backing).randbytes(backing // 512 * 512)
            (self.folder / "base.raw").write_bytes(data)
            self.model[: len(data)] = data[:size]
            options |= {"backing_file": "base.raw", "backing_fmt": "raw"}
        elif preallocate:
            options["preallocation"] = "metadata"
        self.base = bytes(self.model)
        if ours:
            create_image(str(self.path), "qcow2", size, options)
        else:
            words = {k: ("off", "on")[v] if isinstance(v, bool) else v for k, v in options.items()}
            self.qemu.create(self.path, size, words)

    @property
    def ours(self) -> Node:
        if self.node is None:
            self.node = open_node(str(self.path), readonly=False, format="qcow2")
        return self.node

    def release(self) -> None:
        if self.node is not None:
            self.node.close()
            self.node = None

    def place(self, at: int, length: int, unit: int = 512) -> tuple[int, int]:
        """A range in the image, of whole *unit*s where it does not end with it."""
        size = len(self.model)
        offset = at % size // unit * unit
        return offset, min(-(-length // unit) * unit, size - offset)

    def clear(self, offset: int, length: int) -> None:
        """What a discard does: whole clusters become zeroes, where the format can hide a backing image."""
        if self.backing and not self.v3:
            return
        start = -(-offset // self.cluster) * self.cluster
        end = offset + length
        end = end if end == len(self.model) else end // self.cluster * self.cluster
        if start < end:
            self.model[start:end] = bytes(end - start)

    # Here

    @rule(at=st.integers(0, 1 << 21), length=st.integers(1, 200_000), value=st.integers(1, 255))
    def write(self, at: int, length: int, value: int) -> None:
        offset, length = self.place(at, length, 1)
        self.ours.pwrite(offset, bytes([value]) * length)
        self.model[offset : offset + length] = bytes([value]) * length

    @rule(at=st.integers(0, 1 << 21), length=st.integers(1, 600_000), unmap=st.booleans())
    def zero(self, at: int, length: int, unmap: bool) -> None:
        offset, length = self.place(at, length, 1)
        self.ours.zero(offset, length, unmap=unmap)
        self.model[offset : offset + length] = bytes(length)

    @rule(at=st.integers(0, 1 << 21), length=st.integers(1, 600_000))
    def discard(self, at: int, length: int) -> None:
        offset, length = self.place(at, length, 1)
        self.ours.discard(offset, length)
        self.clear(offset, length)

    @rule(at=st.integers(0, 1 << 21), length=st.integers(1, 600_000))
    def read(self, at: int, length: int) -> None:
        offset, length = self.place(at, length, 1)
        assert self.ours.pread(offset, length) == self.model[offset : offset + length]

    @rule()
    def flush(self) -> None:
        self.ours.flush()
        assert self.ours.pread(0, len(self.model)) == self.model

    @rule(size=st.integers(1, 5000))
    def resize(self, size: int) -> None:
        if self.snapshots and not self.v3:
            return
        size *= 512
        self.ours.truncate(size)
        self.resized(size)

    def resized(self, size: int) -> None:
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    @rule(at=st.integers(0, 1 << 21), value=st.integers(1, 255))
    def write_compressed(self, at: int, value: int) -> None:
        offset, length = self.place(at, self.cluster, self.cluster)
        if any(run.kind is not Kind.UNALLOCATED or run.host >= 0 for run in self.ours.map(offset, length)):
            return
        data = bytes([value]) * (length // 2) + random.Random(value).randbytes(length - length // 2)
        self.ours.write_compressed(offset, [memoryview(data)])  # type: ignore[attr-defined]
        self.model[offset : offset + length] = data

    # By the peer

    @rule(at=st.integers(0, 1 << 21), length=st.integers(1, 200_000), value=st.integers(1, 255))
    def peer_write(self, at: int, length: int, value: int) -> None:
        offset, length = self.place(at, length)
        self.release()
        self.qemu.io(self.path, f"write -P {value} {offset} {length}")
        self.model[offset : offset + length] = bytes([value]) * length

    @rule(at=st.integers(0, 1 << 21), values=st.lists(st.integers(1, 255), min_size=1, max_size=4))
    def peer_write_compressed(self, at: int, values: list[int]) -> None:
        if self.width == 1:
            return  # host clusters are shared by compressed ones, which needs counts above one
        for value in values:
            offset, length = self.place(at, self.cluster, self.cluster)
            if length < self.cluster:
                return
            if any(run.kind is not Kind.UNALLOCATED or run.host >= 0 for run in self.ours.map(offset, length)):
                continue  # the peer does not overwrite
            self.release()
            self.qemu.io(self.path, f"write -c -P {value} {offset} {length}")
            self.model[offset : offset + length] = bytes([value]) * length
            at += self.cluster

    @rule(at=st.integers(0, 1 << 21), length=st.integers(1, 600_000), unmap=st.booleans())
    def peer_zero(self, at: int, length: int, unmap: bool) -> None:
        offset, length = self.place(at, length)
        self.release()
        self.qemu.io(self.path, f"write -z {'-u ' if unmap else ''}{offset} {length}", options=("-d", "unmap"))
        self.model[offset : offset + length] = bytes(length)

    @rule(at=st.integers(0, 1 << 21), length=st.integers(1, 600_000))
    def peer_discard(self, at: int, length: int) -> None:
        if self.backing and not self.v3:
            return
        offset, length = self.place(at, length)
        self.release()
        self.qemu.io(self.path, f"discard {offset} {length}", options=("-d", "unmap"))
        self.clear(offset, length)

    @precondition(lambda self: self.width > 1 and len(self.snapshots) < (1 << min(self.width, 8)) - 2)
    @rule()
    def peer_snapshot(self) -> None:
        self.release()
        self.names += 1
        name = f"s{self.names}"
        self.qemu.img("snapshot", "-c", name, self.path)
        self.snapshots[name] = bytes(self.model)

    @precondition(lambda self: self.snapshots)
    @rule()
    def peer_delete_snapshot(self) -> None:
        self.release()
        name = next(iter(self.snapshots))
        self.qemu.img("snapshot", "-d", name, self.path)
        del self.snapshots[name]

    @rule(size=st.integers(1, 5000))
    def peer_resize(self, size: int) -> None:
        size *= 512
        if self.snapshots or (size > len(self.model) and (self.backing or len(self.model) % self.cluster)):
            return  # the peer lets old bytes show when it grows an image from within a cluster
        self.release()
        self.qemu.img("resize", "-q", "--shrink", "-f", "qcow2", self.path, size)
        self.resized(size)

    # Both agree

    @rule()
    def compare(self) -> None:
        self.release()
        self.qemu.sound(self.path)
        assert self.qemu.read(self.path) == self.model
        theirs = self.qemu.check(self.path)
        with open_node(str(self.path), format="qcow2") as node:
            ours = node.format.check()  # type: ignore[attr-defined]
        for key in ours.keys() - {"messages"}:
            assert ours[key] == theirs.get(key, 0), key

    @invariant()
    def nothing_is_wrong_here(self) -> None:
        if getattr(self, "node", None) is not None:
            node: Any = self.node
            found = node.format.check()
            assert not found.get("corruptions"), found
            assert not found.get("leaks"), found

    def teardown(self) -> None:
        if not hasattr(self, "path"):
            return
        try:
            self.compare()
            for name, data in self.snapshots.items():
                raw = self.folder / "snapshot.raw"
                self.qemu.img("convert", "-l", f"snapshot.name={name}", "-O", "raw", self.path, raw)
                found = raw.read_bytes()
                assert found[: len(data)] == data[: len(found)]
        finally:
            self.release()
            shutil.rmtree(self.folder, ignore_errors=True)


@pytest.mark.timeout(4 * 3600 if LONG else 600)
def test_turns_with_the_peer(qemu: Qemu) -> None:
    """Whatever is done to an image here and by qemu-io, in whatever order, both find in it what was last written."""
    from hypothesis.stateful import run_state_machine_as_test

    Machine.qemu = qemu
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=200 if LONG else 25,
            stateful_step_count=50 if LONG else 15,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=not LONG,
            report_multiple_bugs=False,
            phases=(Phase.generate, Phase.shrink) if LONG else (Phase.generate,),
            database=None,
        ),
    )


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_and_cluster_size(tmp_path: Path, qemu: Qemu, cluster: int, width: int) -> None:
    """Images of every cluster size and refcount width are read identically by either side, after writing by either."""
    chance = random.Random(cluster * width)
    path = tmp_path / "disk.qcow2"
    size = min(max(300 * cluster, 1 << 20), 12 << 20) + 512
    create_image(str(path), "qcow2", size, {"cluster_size": cluster, "refcount_bits": width})
    model = bytearray(size)
    for _ in range(2):
        with open_node(str(path), readonly=False) as node:
            for _ in range(12):
                offset = chance.randrange(size)
                data = chance.randbytes(min(size - offset, chance.choice([1, 5000, 200_000])))
                node.pwrite(offset, data)
                model[offset : offset + len(data)] = data
        qemu.sound(path)
        commands = []
        for _ in range(6):
            offset = chance.randrange(size // 512) * 512
            length = min(size - offset, chance.choice([512, 5120, 204_800]))
            value = chance.randrange(1, 256)
            commands.append(f"write -P {value} {offset} {length}")
            model[offset : offset + length] = bytes([value]) * length
        qemu.io(path, *commands)
        with open_node(str(path)) as node:
            assert node.pread(0, size) == model
    assert qemu.read(path) == model
    qemu.sound(path)


def test_compressed_data_goes_behind_none_that_is_gone(tmp_path: Path, qemu: Qemu) -> None:
    """Where compressed data ended, something else may be by now: the next piece must not be put there."""
    path = tmp_path / "image"
    qemu.create(path, 8 << 20)
    size = 65536
    first, second = ((bytes(range(start, start + 64)) * 1024) for start in (1, 100))
    with open_node({"driver": "qcow2", "file.filename": str(path)}, readonly=False) as node:
        node.write_compressed(0, [memoryview(first)])  # type: ignore[attr-defined]
        node.discard(0, size)
        node.flush()
        data = bytes(range(1, 252)) * 600
        node.pwrite(4 * size, data)
        node.write_compressed(16 * size, [memoryview(second)])  # type: ignore[attr-defined]
        assert node.pread(4 * size, len(data)) == data
        assert node.pread(16 * size, size) == second
    qemu.sound(path)
    assert qemu.read(path)[4 * size : 4 * size + len(data)] == data


def test_holes_of_a_data_file_show_where_the_peer_looks(tmp_path: Path, qemu: Qemu) -> None:
    """Where far more clusters are counted than there is space for, the map tells what is a hole in the data file."""
    path = tmp_path / "x.qcow2"
    qemu.create(path, 4 << 20, {"data_file": tmp_path / "x.data", "data_file_raw": "on"})
    for step in ("write 1M 64k", "write -z 2M 64k", "write 3M 64k"):
        qemu.io(path, step)
        qemu.img("bitmap", "--add", path, step.replace(" ", "-"))
        theirs = json.loads(qemu.img("map", "--output=json", path))
        with open_node(str(path)) as node:
            ours = [one._asdict() for one in entries(node, 0, node.size)]
        words = ("start", "length", "depth", "present", "zero", "data")
        assert [[one[word] for word in words] for one in ours] == [[one[word] for word in words] for one in theirs]
    assert any(one["zero"] and one["data"] for one in theirs), "the peer did not look into the data file"


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_compressed_images_end_with_a_sector(tmp_path: Path, qemu: Qemu, kind: str) -> None:
    """Entries of compressed clusters count whole sectors: as in the peer's images, the file holds the last one, too."""
    source, path = tmp_path / "raw", tmp_path / "x.qcow2"
    chance = random.Random(5)
    for size in (300, 1000, 2777):
        source.write_bytes(chance.randbytes(size) + bytes((256 << 10) - size))
        vm_core.convert(str(source), str(path), format="qcow2", compressed=True, compression_type=kind)
        table = int.from_bytes(path.read_bytes()[40:48], "big")
        data = path.read_bytes()
        l2 = int.from_bytes(data[table : table + 8], "big") & 0x00FF_FFFF_FFFF_FE00
        entry = int.from_bytes(data[l2 : l2 + 8], "big")
        assert entry & 1 << 62
        host, sectors = entry & (1 << 54) - 1, (entry >> 54 & 0xFF) + 1
        assert (host & ~511) + sectors * 512 <= len(data)
        qemu.sound(path)
        assert qemu.read(path) == source.read_bytes()
