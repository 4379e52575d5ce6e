"""Pages about the runs in a folder, served live on this machine only."""
