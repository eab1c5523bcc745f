"""Disk images encrypted with LUKS version 1, as qemu-img's format ``luks`` and Linux' dm-crypt have them.

==========  ============================================================
``plugin``  what the driver tells about itself
``image``   the driver: one run of encrypted data behind a header
==========  ============================================================

Header, key slots and ciphers are :mod:`vm_core.crypto`'s, which qcow2 uses too.
"""
