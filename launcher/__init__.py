"""The command `gpufarm`: configuration, sizing, and the life of a farm."""
