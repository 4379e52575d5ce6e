"""How many samples a job has and how long they are, from a sample of its data files."""
