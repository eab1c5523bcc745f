"""``vm-img``: qemu-img's job. One module a subcommand; :mod:`.common` is what they share."""
