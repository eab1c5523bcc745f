"""Images to measure with, made once by the peer's tools from one populated file system."""

from __future__ import annotations

import subprocess
from pathlib import Path

from vmtest import program

#: Directories whose files fill the file system, until there are :data:`POPULATED` bytes.
SOURCES = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/jvm", "/usr/lib/gcc", "/usr/lib/python3", "/usr/share", "/usr/bin")
SIZE = 2 << 30
POPULATED = 1200 << 20
PASSPHRASE = "measured"


class Images:
    """A folder of images; each is made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def img(self) -> str:
        """The peer's qemu-img."""
        return program("qemu-img", "qemu-utils")

    def path(self, name: str) -> Path:
        """Where something called *name* may be made."""
        return self.folder / name

    def raw(self) -> Path:
        """A raw ext4 image with more than 1 GiB of a system's files in it."""
        path = self.path("base.raw")
        if not path.exists():
            tree = self.path("tree")
            tree.mkdir(exist_ok=True)
            filled = 0
            for source in map(Path, SOURCES):
                if filled >= POPULATED:
                    break
                if source.is_dir():
                    subprocess.run(["cp", "-a", source, tree], check=False, stderr=subprocess.DEVNULL)
                    filled = int(subprocess.run(["du", "-sb", tree], capture_output=True, check=True).stdout.split()[0])
            part = path.with_suffix(".part")
            with part.open("wb") as file:
                file.truncate(SIZE)
            mkfs = program("mkfs.ext4", "e2fsprogs")
            subprocess.run([mkfs, "-q", "-d", tree, part], check=True)
            subprocess.run(["rm", "-rf", tree], check=True)
            part.rename(path)
        return path

    def converted(self, name: str, format: str, *arguments: str) -> Path:
        """The same contents in another format, by the peer's hand."""
        path = self.path(name)
        if not path.exists():
            part = path.with_name(f"{name}.part")
            self.qemu("convert", *arguments, "-O", format, self.raw(), part)
            part.rename(path)
        return path

    def qemu(self, *arguments: str | Path) -> None:
        """Run the peer's qemu-img."""
        subprocess.run([self.img, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
