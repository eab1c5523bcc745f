"""Virtual PC and Hyper-V disk images (VHD), read and write.

Source: Microsoft's *Virtual Hard Disk Image Format Specification*, version 1.0 of October 2006; section names in
docstrings are its own. What images of other makers and QEMU do differently is said where it matters.

================  ====================================================================================
``plugin``        what the driver tells about itself
``footer``        the footer, the dynamic disk header and parent locators as they lie on the disk
``geometry``      cylinders, heads and sectors; how large a disk is, which is not always what it says
``image``         opening: which of the three kinds an image is
``fixed``         fixed images: the disk as it is, and a footer
``table``         the block allocation table, and the order in which everything reaches the disk
``dynamic``       dynamic images: blocks that are there or not
``differencing``  differencing images: sectors that are there or the parent's
``bitmaps``       the sector bitmaps of blocks
``parents``       which file is the parent
``create``        new images
``overlay``       new differencing images, and naming another parent
================  ====================================================================================
"""
