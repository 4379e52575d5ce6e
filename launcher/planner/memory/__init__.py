"""The memory model: a plan and a config.json in, bytes by phase and by kind out."""
