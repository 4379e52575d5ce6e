"""What a GPU has to show. `make gpu-check` runs all of it; LAUNCHER_GPU_REHEARSAL=1 goes through it on a CPU."""
