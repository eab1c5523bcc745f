"""The first QCOW image format: a header, one L1 table, L2 tables, and clusters in the order of their writing."""
