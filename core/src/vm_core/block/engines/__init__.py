"""Host-I/O engines that core brings."""
