"""Parts of a PC's chipset, one a module. They take register accesses and a clock, and know no thread and no file."""
