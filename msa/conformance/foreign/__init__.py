"""Functions of other projects, or of the reader, tried in place of a backend."""
