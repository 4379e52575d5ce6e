"""The plan of what will run: every open key decided, memory and speed forecast, without torch."""
