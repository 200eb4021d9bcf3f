"""The paper's ablations, repeated with the tiny model: `msa findings` and `msa findings run`.

`findings_tiny.json` has the results that come with the package.
"""
