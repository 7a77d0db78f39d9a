"""A farm's settings and their sources, its state directory, and the exit codes."""
