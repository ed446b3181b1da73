"""Tiny checkpoints on disk: safetensors, GGUF, a tokenizer, a data set."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")


def tokenizer(extra: int = 0) -> PreTrainedTokenizerFast:
    """Bytes and three special tokens: 259 of the vocabulary of 300; ``extra`` more on request."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.add_tokens([f"<new{i}>" for i in range(extra)])
    fast.chat_template = CHATML
    return fast


def save(source: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """``source`` and the tokenizer as safetensors in ``folder``."""
    source.save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    return folder


def write_data(file: Path, count: int = 60) -> Path:
    """Questions and answers of uneven length, as messages."""
    lines = []
    for i in range(count):
        question = {"role": "user", "content": f"What is {i} plus {i % 7}?"}
        answer = {"role": "assistant", "content": f"It is {i + i % 7}." + " Really." * (i % 4)}
        lines.append(json.dumps({"messages": [question, answer]}))
    file.write_text("\n".join(lines) + "\n")
    return file


def write_gguf(source: PreTrainedModel, file: Path, rope_freqs: np.ndarray | None = None) -> Path:
    """``source`` as llama.cpp's converter writes it: its names, q and k interleaved for Llama.

    Each layer's linears have a storage type of their own.
    """
    config: Any = source.config
    architecture = "llama" if config.model_type == "mistral" else config.model_type
    by_name = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(by_name[architecture], config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([f"token {i}" for i in range(config.vocab_size)])
    types = (
        gguf.GGMLQuantizationType.F16,
        gguf.GGMLQuantizationType.Q8_0,
        gguf.GGMLQuantizationType.Q4_1,
    )
    for name, tensor in source.state_dict().items():
        stem, _, kind = name.rpartition(".")
        values = tensor.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = _interleave(values, heads)
        storage = gguf.GGMLQuantizationType.F32
        if "proj" in name and kind == "weight":
            storage = types[int(name.split(".")[2]) % len(types)]
        data = gguf.quants.quantize(values, storage)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", data, raw_dtype=storage)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from two halves to pairs, as llama.cpp's rotation wants them."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
