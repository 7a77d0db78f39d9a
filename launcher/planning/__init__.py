"""From devices and a measured footprint to a plan."""
