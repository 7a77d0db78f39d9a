"""The demo voice that ships with the project: ``model.target = "workers.models.voice:Voice"``."""

from workers.models.voice.speech import Voice

__all__ = ["Voice"]
