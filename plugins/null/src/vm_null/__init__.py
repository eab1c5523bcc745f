"""Disks that keep nothing (``null-co``, ``null-aio``), as QEMU's QAPI type *BlockdevOptionsNull* describes them."""
