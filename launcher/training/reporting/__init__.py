"""What a run tells people as it goes: numbers, events, symptoms, slow ranks."""
