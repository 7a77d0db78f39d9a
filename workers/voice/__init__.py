"""The demo voice that ships with the project: ``model.target = "workers.voice:Voice"``."""

from workers.voice.speech import Voice

__all__ = ["Voice"]
