"""Hyper-V disk images (VHDX), read and write.

Source: Microsoft's *[MS-VHDX]: Virtual Hard Disk v2 (VHDX) File Format*; section numbers in docstrings are its own.

================  ======================================================================================
``plugin``        what the driver tells about itself
``guids``         the GUIDs of the format
``headers``       the two headers, of which one counts, and how they are updated
``regions``       the region table: where the block allocation table and the metadata are
``metadata``      sizes of disk, blocks and sectors; the parent locator
``log``           the log: finding what has to be replayed, replaying it, writing to it
``table``         the block allocation table
``image``         the driver: maps, allocates, and the order in which everything reaches the disk
``differencing``  differencing images: sectors that are there or the parent's
``bitmaps``       the sector bitmaps of blocks
``parents``       differencing images: which file is the parent
``check``         looking for damage
``create``        new images
``overlay``       new differencing images, and naming another parent
================  ======================================================================================
"""
