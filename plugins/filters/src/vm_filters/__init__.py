"""Filters: nodes that change how requests go through, not where bytes are.

================  =====================================================================================
``plugin``        what the drivers tell about themselves
``copyonread``    ``copy-on-read``: an image takes what is read from its backing images
``compress``      ``compress``: everything is written in compressed form
``preallocate``   ``preallocate``: a growing file gets host space in large pieces ahead of it
``throttle``      ``throttle``: requests wait for their turn
``groups``        throttle groups: the limits that filters share
``buckets``       the leaky buckets of a group
``quorum``        ``quorum``: several equal images, and a vote on what is read
``blkverify``     ``blkverify``: two images that must read the same
================  =====================================================================================

Their options are those of QEMU's QAPI schema (*BlockdevOptionsCor*, *…Throttle*, *…Preallocate*, *…Quorum*,
*…Blkverify*).
"""
