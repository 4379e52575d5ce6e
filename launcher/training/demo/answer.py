"""Generate one greedy answer of a model, on the CPU."""

from __future__ import annotations

from pathlib import Path


def answer(model_directory: Path, prompt: str, max_new_tokens: int = 48) -> str:
    """Return the model's continuation of `prompt`, decoded greedily up to its end token or `max_new_tokens`
    tokens, on one line."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        generated = model.generate(**tokens, max_new_tokens=max_new_tokens, do_sample=False)
    return " ".join(
        tokenizer.decode(generated[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True).split()
    )
