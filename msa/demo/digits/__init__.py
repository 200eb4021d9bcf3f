"""`msa demo digits`: real images of digits, classified by attention."""

from msa.demo.digits.classify import DigitsOptions, compute, make_stream, run

__all__ = ["DigitsOptions", "compute", "make_stream", "run"]
