"""Tiny random models of Hugging Face architectures, with inputs, for tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf

VOCABULARY = 128
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": VOCABULARY}
_PLAIN = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_GROUPED = {**_PLAIN, **_IDS, "num_key_value_heads": 2}
_CAUSAL = {**_PLAIN, **_IDS}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, **_IDS}
_OPT = {k: v for k, v in _CAUSAL.items() if k != "intermediate_size"}
_OPT |= {"ffn_dim": 96, "word_embed_proj_dim": 64}
_FALCON = {k: v for k, v in _CAUSAL.items() if k != "intermediate_size"}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, **_IDS}
_WHISPER = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "decoder_start_token_id": 0,
    **_IDS,
}


def token_ids(batch: int, length: int) -> torch.Tensor:
    """Random tokens `[batch, length]` without the special ones."""
    return torch.randint(3, VOCABULARY, (batch, length))


def _text(batch: int, length: int) -> dict:
    return {"input_ids": token_ids(batch, length)}


def _text_pair(batch: int, length: int) -> dict:
    return {"input_ids": token_ids(batch, length), "decoder_input_ids": token_ids(batch, 5)}


def _image(batch: int, length: int) -> dict:
    return {"pixel_values": torch.randn(batch, 3, 16, 16)}


def _audio(batch: int, length: int) -> dict:
    return {"input_features": torch.randn(batch, 8, 32), "decoder_input_ids": token_ids(batch, 5)}


def _image_and_text(batch: int, length: int) -> dict:
    return {**_image(batch, length), **_text(batch, length)}


def _clip() -> tf.CLIPModel:
    text = tf.CLIPTextConfig(**_CAUSAL, max_position_embeddings=64)
    vision = tf.CLIPVisionConfig(**_PLAIN, image_size=16, patch_size=8)
    return tf.CLIPModel(
        tf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32)
    )


def _vit() -> tf.ViTModel:
    return tf.ViTModel(tf.ViTConfig(**_PLAIN, image_size=16, patch_size=8))


def _t5() -> tf.T5ForConditionalGeneration:
    config = tf.T5Config(**_T5, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    return tf.T5ForConditionalGeneration(config)


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[int, int], dict]]] = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GROUPED)), _text),
    "mistral": (lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GROUPED)), _text),
    "qwen2": (lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_GROUPED)), _text),
    "qwen3": (lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GROUPED, head_dim=16)), _text),
    "gemma3": (lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_GROUPED, head_dim=16)), _text),
    "phi3": (lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_GROUPED)), _text),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT2)), _text),
    "gpt_neox": (lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_CAUSAL)), _text),
    "opt": (lambda: tf.OPTForCausalLM(tf.OPTConfig(**_OPT)), _text),
    "falcon": (lambda: tf.FalconForCausalLM(tf.FalconConfig(**_FALCON)), _text),
    "stablelm": (lambda: tf.StableLmForCausalLM(tf.StableLmConfig(**_GROUPED)), _text),
    "olmo2": (lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**_GROUPED)), _text),
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(**_CAUSAL)), _text),
    "vit": (_vit, _image),
    "whisper": (lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**_WHISPER)), _audio),
    "t5": (_t5, _text_pair),
    "clip": (_clip, _image_and_text),
}


def build(name: str) -> torch.nn.Module:
    """A model of `MODELS`, float32, in evaluation mode, the same weights at every call."""
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def inputs(name: str, batch: int = 2, length: int = 13) -> dict:
    """Keyword arguments for one forward of the model."""
    return MODELS[name][1](batch, length)
