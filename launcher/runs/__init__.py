"""The run directory: every file in it, read and written without torch."""
