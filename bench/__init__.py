"""Benchmarks: the same work done here and by the peer, interleaved in one run, reported as ratios."""
