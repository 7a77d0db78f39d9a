"""What a farm is told: settings and where they come from, and its state directory."""
