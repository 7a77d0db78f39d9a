"""A farm's processes and the files that they are started from."""
