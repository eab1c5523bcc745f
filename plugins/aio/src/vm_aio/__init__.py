"""Host-I/O engines that leave the waiting to Linux: ``io_uring`` and ``native`` (Linux AIO)."""
