"""blkdebug: a node that makes requests fail or stop at the moments that format drivers announce.

It is made for tests of programs and drivers, of the error paths that never run otherwise. What it does is described in
QEMU's *docs/devel/blkdebug* and in the QAPI type *BlockdevOptionsBlkdebug*; files and names are those of QEMU.

=============  =========================================================================================
``plugin``     what the driver tells about itself
``rules``      rules: which event does what in which state
``configfile`` rules from a configuration file
``engine``     the state, the errors that are armed, the requests that are stopped
``blocklock``  requests that change parts of blocks exclude each other
``limits``     alignment and greatest lengths that the node pretends to have
``node``       the node
=============  =========================================================================================
"""
