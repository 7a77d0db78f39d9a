"""The controller: desired state, observed state, and the next step."""
