"""QED images: a header, an L1 table, L2 tables, clusters; nothing is counted, so nothing can be miscounted.

==================  ====================================================================================
``plugin``          what the driver tells about itself
``header``          the header: fields, feature bits, what is checked before anything is believed
``tables``          the L1 table and cached pages of L2 tables, written back in a safe order
``image``           the driver: maps, allocates, zeroes
``check``           counting references; repair
``create``          new images
==================  ====================================================================================
"""
