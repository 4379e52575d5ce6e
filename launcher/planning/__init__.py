"""What will run: every open key decided, memory and speed forecast, without torch."""
