"""The machine: guest RAM, address spaces, interrupts, chipset, firmware, and the threads that run them."""
