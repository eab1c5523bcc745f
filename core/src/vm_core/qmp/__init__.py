"""The monitor: QMP, QEMU's JSON protocol, and the commands for people (HMP)."""
