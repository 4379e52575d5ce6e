"""Read configurations of other tools as a job: DeepSpeed, Accelerate, the Trainer, scripts."""
