"""nginx in front of the workers: its configuration, its start, its end. Knows addresses only."""
