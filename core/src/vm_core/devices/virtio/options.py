"""The options that every virtio PCI function has, for descriptors. Names and defaults are QEMU's."""

from __future__ import annotations

from ...descriptors import Option

PCI_OPTIONS: tuple[Option, ...] = (
    Option(
        "disable-legacy",
        "enum",
        "leave out the legacy interface (auto: offered)",
        "auto",
        ("auto", "on", "off", "yes", "no", "true", "false"),
    ),
    Option("disable-modern", "bool", "leave out the modern interface of virtio 1.0 and later", False),
    Option("queue-size", "int", "descriptors of each queue, a power of two from 2 to 1024", 256),
    Option("vectors", "int", "MSI-X vectors; 0: no MSI-X (default: one a queue and one more)", 0xFFFFFFFF),
    Option("packed", "bool", "offer the packed virtqueue layout", False),
    Option("event_idx", "bool", "offer notification suppression by index", True),
    Option("indirect_desc", "bool", "offer indirect descriptors", True),
    Option("any_layout", "bool", "tell legacy drivers that requests may be laid out anyhow", True),
    Option("notify_on_empty", "bool", "offer legacy drivers an interrupt whenever a queue runs empty", True),
    Option("queue_reset", "bool", "offer the reset of single queues", True),
    Option(
        "ioeventfd",
        "enum",
        "who serves kicks: the I/O thread (on), the vCPU that kicks (off), whichever is faster here (auto)",
        "auto",
        ("auto", "on", "off", "yes", "no", "true", "false"),
    ),
)
