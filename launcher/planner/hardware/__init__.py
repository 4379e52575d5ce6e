"""What this machine and others can do: detected, measured, or from the table of GPUs."""
