#!/bin/sh
# All tests in one command: brings the programs the tests compare with, then runs tox's default environments.
set -eu
cd "$(dirname "$0")/.."
. tools/debian.sh
need python3 python3-venv seabios grub-rescue-pc grub-common grub-pc-bin e2fsprogs qemu-utils qemu-system-x86 \
    binutils gcc libc6-dev bximage hdparm acpica-tools
python=$(python_311)
[ -x .tox/bootstrap/bin/python ] || "$python" -m venv .tox/bootstrap
.tox/bootstrap/bin/python -m pip install -q "tox>=4.11"
exec .tox/bootstrap/bin/tox run "$@"
