"""The figures of results: one file for each kind of results file; `msa bench plots` draws them."""
