"""VirtualBox disk images (VDI), version 1.1, read and write.

The format has no published specification. Field names and meanings are those that Oracle's forum post "All about VDIs"
and the ``VDI`` article of the forensics wiki document, checked against images of VirtualBox and of QEMU.

===========  =========================================================================================
``plugin``   what the driver tells about itself
``header``   the header's fields, and what is checked before anything is believed
``image``    the driver: maps, allocates, brings the block map to the disk
``parents``  differencing images: which image is the parent
``check``    looking for damage
``create``   new images
===========  =========================================================================================
"""
