"""Checkpoints that other tools wrote: DeepSpeed's, and Accelerate's under FSDP."""
