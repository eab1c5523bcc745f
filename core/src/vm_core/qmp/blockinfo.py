"""Drives and images in QAPI's shapes: BlockInfo, BlockDeviceInfo, ImageInfo, BlockStats (``qapi/block-core.json``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..block.backend import BlockBackend
    from ..block.node import Node
    from .monitor import Drive


def block_info(drive: Drive) -> dict[str, Any]:
    """``BlockInfo`` of one drive."""
    info: dict[str, Any] = {
        "device": drive.id if drive.backend.name == drive.id else "",
        "locked": drive.backend.locked,
        "removable": drive.backend.removable,
        "type": "unknown",
    }
    if drive.device is not None:
        info["io-status"] = "failed" if drive.backend.stopped_requests else "ok"
        info["qdev"] = drive.device.id
        if drive.backend.removable:
            info["tray_open"] = drive.backend.tray_open
    if drive.backend.node is not None:
        info["inserted"] = device_info(drive.backend.node, drive.backend, drive.detect_zeroes)
    return info


def device_info(node: Node, backend: BlockBackend | None, detect_zeroes: str = "off") -> dict[str, Any]:
    """``BlockDeviceInfo`` of *node*, as *backend* uses it."""
    depth, below = 0, node.backing
    while below is not None:
        depth, below = depth + 1, below.backing
    cache = backend.cache if backend is not None else None
    info: dict[str, Any] = {
        "file": node.filename,
        "node-name": node.node_name,
        "ro": node.readonly if backend is None else backend.readonly,
        "drv": node.driver,
        "backing_file_depth": depth,
        "encrypted": False,
        "detect_zeroes": detect_zeroes,
        "write_threshold": 0,
        "cache": {
            "writeback": backend.write_cache if backend is not None else True,
            "direct": cache.direct if cache is not None else False,
            "no-flush": cache.no_flush if cache is not None else False,
        },
        "image": image_info(node),
        # Throttling, which there is none of.
        **dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0),
    }
    if node.backing is not None:
        info["backing_file"] = node.backing.filename
    return info


def image_info(node: Node) -> dict[str, Any]:
    """``ImageInfo`` of *node* and of its backing chain."""
    from ..block.medium import present

    info: dict[str, Any] = {
        "filename": node.filename,
        "format": node.driver,
        "virtual-size": node.size,
        **node.known_allocated(),
        "dirty-flag": False,
    }
    if not present(node):  # nothing more is known of it
        del info["dirty-flag"]
        return info
    if node.cluster_size > 1:
        info["cluster-size"] = node.cluster_size
    specific = node.info()
    if specific:
        info["format-specific"] = {"type": node.driver, "data": specific}
    if node.backing is not None:
        info["backing-filename"] = info["full-backing-filename"] = node.backing.filename
        info["backing-filename-format"] = node.backing.driver
        info["backing-image"] = image_info(node.backing)
    return info


def block_stats(drive: Drive) -> dict[str, Any]:
    """``BlockStats`` of one drive. Counters that are not kept are left zero, as QEMU does for some drivers."""
    stats = drive.backend.stats
    values = {
        "rd_bytes": stats.read_bytes,
        "wr_bytes": stats.written_bytes,
        "unmap_bytes": stats.discarded_bytes,
        "rd_operations": stats.reads,
        "wr_operations": stats.writes,
        "flush_operations": stats.flushes,
        "unmap_operations": stats.discards,
        "failed_rd_operations": stats.failed_reads,
        "failed_wr_operations": stats.failed_writes,
        "failed_flush_operations": stats.failed_flushes,
        "failed_unmap_operations": stats.failed_others,
        **dict.fromkeys(_UNCOUNTED, 0),
        "account_invalid": True,
        "account_failed": True,
        "timed_stats": [],
    }
    result: dict[str, Any] = {"device": drive.id, "stats": values}
    if drive.device is not None:
        result["qdev"] = drive.device.id
    if drive.backend.node is not None:
        result["node-name"] = drive.backend.node.node_name
    return result


_UNCOUNTED = (
    "rd_total_time_ns",
    "wr_total_time_ns",
    "flush_total_time_ns",
    "unmap_total_time_ns",
    "wr_highest_offset",
    "rd_merged",
    "wr_merged",
    "unmap_merged",
    "invalid_rd_operations",
    "invalid_wr_operations",
    "invalid_flush_operations",
    "invalid_unmap_operations",
)


def all_nodes(drives: list[Drive]) -> list[tuple[Node, BlockBackend | None]]:
    """Every node under *drives*, each once, with the backend on top of it where there is one."""
    found: dict[int, tuple[Node, BlockBackend | None]] = {}

    def visit(node: Node, backend: BlockBackend | None) -> None:
        if id(node) not in found:
            found[id(node)] = (node, backend)
            for child in node.children().values():
                visit(child, None)

    for drive in drives:
        if drive.backend.node is not None:
            visit(drive.backend.node, drive.backend)
    return list(found.values())
