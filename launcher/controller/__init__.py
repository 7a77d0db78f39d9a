"""The controller: what is wanted, what is seen, and the next step."""
