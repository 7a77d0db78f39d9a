"""A farm's processes and the files that start them."""
