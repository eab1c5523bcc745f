"""The block layer: nodes, mappings, formats and the backend that devices and tools hold."""
