"""Chapter 13: predict before you measure.

Given the measured milliseconds of a 32K prompt, predict those of a 128K prompt. `msa exercise 13`
compares with the committed run of `msa bench prefill`. A prediction counts if it is off by at most
a third.
"""


def predict(select, attention, dense):
    """The times at 4 times the length: selection, attention over the selection, dense attention."""
    return 4 * select, 4 * attention, 4 * dense  # TODO: which of them grow with the square?
