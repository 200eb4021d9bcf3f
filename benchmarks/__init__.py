"""Measurements on a GPU: cases, the prefill run, the tuner."""
