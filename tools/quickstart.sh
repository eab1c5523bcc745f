#!/bin/sh
# The main job in one command: install everything into .venv, make a disk image with firmware's boot loader and a real
# Linux on it, and boot it from qcow2. Options are handed to vm.
set -eu
cd "$(dirname "$0")/.."
. tools/debian.sh
need python3 python3-venv seabios grub-common grub-pc-bin e2fsprogs
python=$(python_311)
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python tools/plugins.py
.venv/bin/python examples/linux_guest build/guest
echo "Booting:  .venv/bin/vm -m 256 -drive file=build/guest/disk.qcow2,if=virtio -no-reboot $*" >&2
exec .venv/bin/vm -m 256 -drive file=build/guest/disk.qcow2,if=virtio -no-reboot "$@"
