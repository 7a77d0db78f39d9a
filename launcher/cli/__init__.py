"""The command `gpufarm`."""
