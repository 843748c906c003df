"""A tiny random Llama with a tokenizer of its own, in memory or as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from micromix_compile.models import builtin_text

VOCABULARY = 256


def tiny_llama(dtype: torch.dtype = torch.bfloat16, layers: int = 2) -> LlamaForCausalLM:
    """Hidden 64, FFN 96, K of down_proj a multiple of 32 but not of 64; always the same weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        # Larger than usual, so that the logits of a random model differ and quantisation can be seen in them.
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer trained on a little of the built-in text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["</s>"])
    tokenizer.train_from_iterator([builtin_text()[:20000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def save_tiny(directory: Path) -> Path:
    """Write model and tokenizer as a Hugging Face directory."""
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
