"""The only code that imports torch: what runs on each rank."""
