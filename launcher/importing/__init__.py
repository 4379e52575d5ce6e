"""From the configuration files of others to a job: DeepSpeed, Accelerate, the Hugging Face Trainer, a command line."""
