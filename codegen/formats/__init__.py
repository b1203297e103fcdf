"""Layouts of a packed weight in memory, made for instructions of a GPU; each converts back bit for bit."""
