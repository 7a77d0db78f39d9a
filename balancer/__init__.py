"""nginx in front of the workers: its configuration, start, reload and end."""
