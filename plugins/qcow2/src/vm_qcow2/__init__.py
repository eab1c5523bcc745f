"""The QCOW2 image format, versions 2 and 3, read and write.

Everything here follows the format's specification, *qcow2.txt* of QEMU's interoperability documents; section names in
docstrings are its own.

==================  ====================================================================================
``plugin``          what the driver tells about itself
``image``           the driver: maps, allocates, zeroes, discards
``header``          the header's fields, and what is checked before anything is believed
``extensions``      header extensions: backing format, feature names, the rest kept as it is
``features``        the feature bits by name
``geometry``        numbers that follow from cluster size, refcount width and version
``store``           checked reads and writes of metadata, header updates, the corrupt bit
``entries``         L2 entries, and runs of them
``tables``          the L1 table and cached L2 tables
``refcounts``       the refcount table and cached refcount blocks
``allocator``       free clusters, first fit; growth of the refcount structures
``overlap``         where metadata is, so that nothing is written over it
``order``           the order in which all that reaches the disk
``compression``     compressed clusters
``writing``         taking, entering, zeroing and giving back guest clusters and subclusters
``encryption``      LUKS and the old AES
``headerarea``      header, extensions and backing name, written anew
``amend``           changing an image's version, refcount width and keys
``preallocation``   host space before anybody writes
``runtime``         the options with which an image is opened
``snapshots``       the table of internal snapshots
``snapshotting``    taking, applying, deleting and loading them
``sharing``         the refcounts of clusters that snapshots share
``bitmaps``         persistent dirty bitmaps; ``bitmaparea``: their extension in the header
``inplace``         this format's part in converting images in place
``check``           counting references anew; repair
``rebuild``         the refcount structures, made anew
``create``          new images
==================  ====================================================================================
"""
