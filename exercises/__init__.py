"""Exercises with starter code, their checks and their solutions; `msa exercise` runs the checks."""
