"""Make the encoder-decoder models of `docs/benchmarks/tasks.md`, for which no package carries weights.

    python tests/benchmarks/writing_models.py pair DIRECTORY
    python tests/benchmarks/writing_models.py t5 DIRECTORY train.de train.en

`pair` is an EncoderDecoderModel of two MiniLM-L6: real weights but for the cross-attention and the output matrix's
bias. `t5` is a T5 with random weights, 256 wide, of 3 + 3 layers, with 8,000 byte-level pieces that are learned from
the texts. Both begin from seed 17.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    EncoderDecoderModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from launcher.training.demo.models import model_directory

NUM_PIECES = 8000
WIDTH, LAYERS = 256, 3


def main() -> None:
    """Write the model that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("pair", "t5"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("texts", type=Path, nargs="*", help="of t5: files that its pieces are learned from")
    options = parser.parse_args()
    torch.manual_seed(17)
    if options.kind == "pair":
        pair(options.directory)
    elif not options.texts:
        parser.error("t5 needs texts")
    else:
        t5(options.directory, options.texts)


def pair(directory: Path) -> None:
    """Two MiniLM-L6, the second one as a decoder."""
    source = str(model_directory("minilm-l6"))
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(source, source, tie_encoder_decoder=False)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model.config.decoder_start_token_id = tokenizer.cls_token_id
    model.config.eos_token_id = tokenizer.sep_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def t5(directory: Path, texts: list[Path]) -> None:
    """A small T5 with random weights, and pieces learned from these files."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_PIECES,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train([str(path) for path in texts], trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=32,
        d_ff=4 * WIDTH,
        num_layers=LAYERS,
        num_heads=WIDTH // 32,
        dropout_rate=0.1,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main()
