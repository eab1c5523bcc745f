"""Compressed loop images, as Knoppix boots from: a shell script, a table of offsets, and blocks of zlib data."""
