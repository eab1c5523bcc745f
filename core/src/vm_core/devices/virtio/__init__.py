"""virtio for authors of devices: rings, negotiation and transports (virtio 1.2, OASIS).

A device subclasses :class:`~.device.VirtioDevice` (features, configuration, and what to do with a batch of
chains), and :class:`~.pci.VirtioPci` for its PCI function. The parts below those can be used alone:

- :mod:`.split` and :mod:`.packed`: the two ring layouts, without threads, registers or devices;
- :mod:`.ram`: guest memory as rings see it;
- :mod:`.registers`: register tables and their decoder.
"""
