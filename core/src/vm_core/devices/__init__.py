"""Toolkits for authors of device frontends: registers, PCI, DMA, ATA, virtio."""
