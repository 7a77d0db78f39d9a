"""Load over HTTP, and what it measures. Knows nothing of launcher, balancer or workers."""
