"""Functions of other projects, or of your own, tested in place of a backend.

signature         what functions of a convention are given and return
like_*            the conventions, one file each, with adapters to this project's packed tensors
conventions       the table of all conventions
pages_and_rows    packed tokens in shuffled pages or padded rows, with rubbish around them
arguments         what the adapters share
wrapped_function  one function, completed to a backend
target            the function under test, and the rules that apply to it
bad_target        the errors for functions that cannot be tested
"""
