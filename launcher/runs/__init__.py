"""The run directory: all its files, read and written without torch."""
