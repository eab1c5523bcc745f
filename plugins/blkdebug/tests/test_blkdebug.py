"""blkdebug does what the peer's does: the same rules at the same events, the same complaints, the same names."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from vm_blkdebug.configfile import parse
from vm_blkdebug.engine import Engine
from vm_blkdebug.limits import fragments, pieces
from vm_blkdebug.node import Blkdebug
from vm_blkdebug.rules import EVENTS, InjectError, SetState
from vm_core.block import breakpoints
from vm_core.block.open import open_node
from vm_core.errors import UsageError, VmError
from vm_core.testing.iopeer import assert_same, needs_peer
from vm_core.testing.nodes import MemoryNode

IMAGES = ("create -q -f qcow2 a.qcow2 1M", "create -q -f raw a.img 1M")


def commands(*lines: str) -> list[str]:
    return [word for line in lines for word in ("-c", line)]


INJECT = '[inject-error]\nevent = "{}"\n'

CONFIGURATIONS = {
    "event": INJECT.format("l2_load"),
    "unknown-event": INJECT.format("bogus"),
    "no-event": '[inject-error]\nerrno = "5"\n',
    "group": '[foo]\nevent = "l2_load"\n',
    "key": '[inject-error]\nfoo = "l2_load"\n',
    "no-quotes": "[inject-error]\nevent = l2_load\n",
    "no-group": 'event = "l2_load"\n',
    "number": '[inject-error]\nevent = "l2_load"\nerrno = "x"\n',
    "state": '[inject-error]\nevent = "l2_load"\nstate = "x"\n',
    "switch": '[inject-error]\nevent = "l2_load"\nonce = "x"\n',
    "iotype": '[inject-error]\nevent = "l2_load"\niotype = "foo"\n',
    "iotype-other": '[inject-error]\nevent = "l2_load"\niotype = "flush"\n',
    "set-state": '[set-state]\nevent = "l2_load"\n',
    "empty": "",
    "named": '[inject-error "x"]\nevent = "l2_load"\n',
    "comment": '[inject-error]\n# comment\n  event = "l2_load"\n\n',
    "rest": '[inject-error]\nevent = "l2_load" x\n',
    "all": '[inject-error]\nevent = "l2_load"\nerrno = "28"\nonce = "on"\nimmediately = "on"\nstate = "1"\n',
    "sector": '[inject-error]\nevent = "read_aio"\nsector = "640"\n',
    "states": '[set-state]\nevent = "read_aio"\nstate = "1"\nnew_state = "2"\n'
    '[inject-error]\nevent = "read_aio"\nstate = "2"\nerrno = "28"\n',
    "none": '[inject-error]\nevent = "none"\niotype = "read"\n',
}


@needs_peer
@pytest.mark.parametrize("name", sorted(CONFIGURATIONS))
def test_configuration_file(name: str, tmp_path: Path) -> None:
    """A configuration file means what it means to the peer, and is wrong in the same words."""
    lines = commands("write -q 0 128k", "read 0 512", "read 64k 512", "read 0 512")
    assert_same(tmp_path, IMAGES, [*lines, "blkdebug:cfg:a.qcow2"], files={"cfg": CONFIGURATIONS[name]})


OPTIONS = (
    "inject-error.0.event=bogus",
    "inject-error.0.foo=1",
    "inject-error.0.event=l2_load,inject-error.0.errno=x",
    "inject-error.event=read_aio",
    "inject-error=foo",
    "inject-error.0=foo",
    "set-state.0.event=l2_load,set-state.0.state=1,set-state.0.new_state=2",
    "foo=bar",
    "align=3",
    "align=4096",
    "align=8G",
    "max-transfer=3",
    "max-transfer=0",
    "max-transfer=1024,align=512",
    "max-transfer=700,align=512",
    "opt-write-zero=700,align=512",
    "max-write-zero=5,opt-write-zero=4",
    "max-discard=700,align=512",
    "opt-discard=3,align=512",
    "config=nofile",
    "take-child-perms.0=write",
    "take-child-perms.0=bogus",
    "unshare-child-perms.0=resize",
)


@needs_peer
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str, tmp_path: Path) -> None:
    """Options are taken and refused as by the peer."""
    words = ["--image-opts", *commands("length", "read 0 512"), f"driver=blkdebug,image.filename=a.img,{options}"]
    assert_same(tmp_path, IMAGES, words)


@needs_peer
@pytest.mark.parametrize(
    "name", ["blkdebug:nofile:a.qcow2", "blkdebug:a.qcow2", "blkdebug::nofile", "blkdebug::a.qcow2", "blkdebug:"]
)
def test_names(name: str, tmp_path: Path) -> None:
    """File names with the prefix open, or are refused, as by the peer."""
    assert_same(tmp_path, IMAGES, [*commands("length", "info"), name])


#: Events that come at the same moment here and there, and a script that meets them.
EVENT_SCRIPTS: dict[str, tuple[str, ...]] = {
    "l2_load": ("read 0 64k",),
    "read_aio": ("read 0 64k",),
    "write_aio": ("write 0 64k",),
    "l2_alloc_write": ("write 512k 64k",),
    "cluster_alloc": ("write 512k 64k",),
    "cow_read": ("write 130k 1k",),
    "flush_to_os": ("write 0 64k", "flush"),
    "flush_to_disk": ("write 0 64k", "flush"),
}


@needs_peer
@pytest.mark.parametrize("once", ["on", "off"])
@pytest.mark.parametrize("event", sorted(EVENT_SCRIPTS))
def test_events(event: str, once: str, tmp_path: Path) -> None:
    """A rule at an event makes the same request fail with the same error as in the peer."""
    config = f'[inject-error]\nevent = "{event}"\nerrno = "28"\nonce = "{once}"\niotype = "read"\n'
    if event not in ("l2_load", "read_aio", "cow_read"):
        config = config.replace('iotype = "read"\n', "")
    words = ["-t", "writeback", *commands(*EVENT_SCRIPTS[event]), "blkdebug:cfg:a.qcow2"]
    from vm_core.testing.iopeer import both

    peer, mine = both(tmp_path, IMAGES, words, files={"cfg": config})
    assert (mine.out, mine.status) == (peer.out, peer.status)
    if event != "l2_alloc_write":  # where the peer still has changed tables in memory, which were given up here
        assert mine.err == peer.err


@needs_peer
def test_breakpoints(tmp_path: Path) -> None:
    """Requests stop at events, others overtake them, and go on when they are told to."""
    lines = commands(
        "break write_aio A",
        "break bogus A",
        "aio_write -P 1 0 64k",
        "wait_break A",
        "aio_write -P 2 128k 64k",
        "sleep 200",
        "resume A",
        "aio_flush",
        "resume A",
        "remove_break A",
        "break write_aio B",
        "remove_break B",
        "write -P 3 0 64k",
        "break read_aio C",
        "aio_read -P 3 0 64k",
        "wait_break C",
        "remove_break C",
        "aio_flush",
    )
    assert_same(tmp_path, IMAGES, [*lines, "blkdebug::a.qcow2"])


@needs_peer
@pytest.mark.parametrize(
    "limits",
    [
        "align=4k,max-transfer=64k",
        "align=512,max-transfer=64k,opt-write-zero=128k",
        "align=512,opt-write-zero=96k,max-write-zero=96k,opt-discard=96k,max-discard=96k",
        "max-transfer=1",
    ],
)
def test_limits(limits: str, tmp_path: Path) -> None:
    """Whatever the limits, the image below ends up with the same bytes."""
    step = 1 << 20 if "=1" not in limits or "align" in limits else 4096
    lines = commands(
        f"write -P 1 1000 {min(step // 4, 200_000)}",
        "read -P 1 1000 3000",
        "write -z 2000 1500",
        "discard 96k 192k",
        "write -P 7 5 1",
        "read -v 0 16",
    )
    assert_same(
        tmp_path,
        IMAGES,
        ["--image-opts", *lines, f"driver=blkdebug,image.driver=qcow2,image.file.filename=a.qcow2,{limits}"],
    )


def node_of(text: str = "", size: int = 1 << 20, **options: Any) -> Blkdebug:
    return Blkdebug(MemoryNode(bytes(size)), parse(text))


def test_error_waits_for_a_request_that_matches() -> None:
    """An armed error hits only requests of its kind at its sector, and with once=on only one of them."""
    node = node_of('[inject-error]\nevent = "read_aio"\nsector = "8"\nonce = "on"\nerrno = "28"\n')
    node.pread(4096, 512)
    node.event("read_aio")
    node.pread(0, 4096)
    with pytest.raises(OSError, match="No space left"):
        node.pread(4000, 200)
    node.event("read_aio")
    assert node.pread(4000, 200) == bytes(200)


def test_events_arm_and_disarm() -> None:
    """Rules that arm themselves at an event take the place of those armed before."""
    engine = Engine([InjectError("read_aio", code=5), InjectError("write_aio", code=28)])
    engine.event("read_aio")
    engine.event("write_aio")
    with pytest.raises(OSError, match="No space"):
        engine.check("read")


def test_states_change_after_all_rules_of_an_event() -> None:
    """A rule for the new state does not match at the event that brings it."""
    engine = Engine([SetState("l2_load", 1, 2), InjectError("l2_load", 2)])
    engine.event("l2_load")
    assert engine.state == 2
    engine.check("read")
    engine.event("l2_load")
    with pytest.raises(OSError, match="Input/output"):
        engine.check("read")


def test_a_closed_node_lets_everybody_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is left waiting at a breakpoint when the node is closed."""
    said: list[str] = []
    monkeypatch.setattr(breakpoints, "say", said.append)
    node = node_of()
    node.engine.set("read_aio", "A")
    thread = threading.Thread(target=node.event, args=("read_aio",))
    thread.start()
    while not node.engine.suspended("A"):
        pass
    node.close()
    thread.join(10)
    assert not thread.is_alive()
    assert said == ["blkdebug: Suspended request 'A'\n"]


def test_breakpoints_need_a_known_event() -> None:
    """A breakpoint at an event that does not exist is refused by name."""
    engine = Engine()
    with pytest.raises(UsageError, match="bogus"):
        engine.set("bogus", "A")
    assert "l2_load" in EVENTS


def test_pieces_and_fragments_cover_the_range() -> None:
    """Whatever the limits, a range is cut into adjoining pieces that cover it."""
    for offset, length in ((0, 1), (511, 2), (1000, 100_000), (4096, 8192), (3, 4093), (12345, 54321)):
        for align, preferred, longest in ((1, 0, 0), (512, 0, 2048), (512, 4096, 8192), (1, 3 * 1024, 3 * 1024)):
            for cuts in (
                list(pieces(offset, length, longest)),
                list(fragments(offset, length, align, preferred, longest)),
            ):
                position = offset
                for begin, size in cuts:
                    assert begin == position
                    assert size > 0
                    assert not longest or size <= max(longest, preferred)
                    position += size
                assert position == offset + length


def test_name_is_the_peers(tmp_path: Path) -> None:
    """An image with nothing but a configuration file is called by its file name, any other by json:."""
    (tmp_path / "a.img").write_bytes(bytes(4096))
    (tmp_path / "cfg").write_text("")
    plain = f"blkdebug:{tmp_path}/cfg:{tmp_path}/a.img"
    with open_node(plain, format="raw") as node:
        assert node.filename == plain
    options = {"driver": "blkdebug", "align": 512, "image": {"driver": "file", "filename": f"{tmp_path}/a.img"}}
    with open_node(options) as node:
        assert node.filename.startswith("json:{")
        with open_node(node.filename) as again:
            assert again.filename == node.filename


def test_malformed_configurations_end_in_one_line(tmp_path: Path) -> None:
    """Any bytes as a configuration file give rules or one sentence."""
    import random

    chance = random.Random(1)
    refused: list[str] = []
    words = [
        "[inject-error]",
        "[set-state]",
        "[",
        "]",
        '"',
        "event",
        "=",
        " ",
        "\n",
        "l2_load",
        "\0",
        "é",
        "#",
        "9" * 99,
    ]
    for _ in range(2000):
        text = "".join(chance.choice(words) for _ in range(chance.randrange(30)))
        try:
            parse(text)
        except VmError as error:
            refused.append(str(error))
    assert len(refused) > 100
