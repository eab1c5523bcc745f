"""Jobs over whole images: convert, compare, commit, rebase, measure, copy, compact, and what they share.

All of them plan from mappings (``vm_core.block.extents``): holes and zeroes are known before anything is read. What has
to move goes through one bounded pipeline (``pipeline.py``). Progress and cancelling are a :class:`~.job.Job`.
"""
