"""Models for tests, each as small as a user's could be."""
