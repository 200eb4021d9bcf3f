"""Demonstrations on real data. `msa demo digits`: attention as a classifier of real images."""
