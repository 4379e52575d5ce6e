"""Pages of the runs in a folder, handed out on this machine alone while they go on."""
