"""Demonstrations on real data: `msa demo`, `msa ask`, and `msa demo digits` in `digits/`."""
