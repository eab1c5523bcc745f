"""Parallels' expandable images (``.hds``, ``.hdd``): a header, one block allocation table, and clusters."""
