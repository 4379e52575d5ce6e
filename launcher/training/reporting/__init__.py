"""Reports of a running job: numbers, events, symptoms, slow ranks."""
