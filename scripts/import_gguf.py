#!/usr/bin/env python3
"""Turns a GGUF file of the Llama architecture into a Hugging Face directory.

    import_gguf.py GGUF OUT_DIR [--sha256 HEX]

OUT_DIR gets config.json, generation_config.json, model.safetensors (float32, the values that the
file's quantised tensors stand for), tokenizer.json and tokenizer_config.json. It appears at once
when everything is written: a failed or killed run leaves no OUT_DIR.
"""

import argparse
import hashlib
import json
import pathlib
import shutil
import sys

import gguf
import numpy as np
from safetensors.numpy import save_file

# Layers of the Llama architecture: GGUF's name behind "blk.N." -> Hugging Face's behind
# "model.layers.N.".
LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
# tokenizer.ggml.pre -> pre_tokenizer of tokenizer.json.
PRE_TOKENIZERS = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
    }
}

# tokenizer.ggml.token_type
CONTROL, USER_DEFINED = 3, 4


class GgufError(Exception):
    """What is wrong with the file, in words for its user."""


class Metadata:
    """The key-value part of a GGUF file."""

    def __init__(self, reader):
        self._fields = {key: field.contents() for key, field in reader.fields.items()}

    def get(self, key, default=None):
        return self._fields.get(key, default)

    def require(self, key):
        if key not in self._fields:
            raise GgufError(f"metadata key {key} is missing")
        return self._fields[key]


def shortest_float(value):
    """The shortest decimal with the same float32 value: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def model_config(metadata, tied_head):
    rope_scaling = metadata.get("llama.rope.scaling.type", "none")
    if rope_scaling != "none":
        raise GgufError(f"llama.rope.scaling.type: expected none; was {rope_scaling}")
    heads = metadata.require("llama.attention.head_count")
    hidden_size = metadata.require("llama.embedding_length")
    head_dim = metadata.get("llama.attention.key_length", hidden_size // heads)
    rope_dim = metadata.get("llama.rope.dimension_count", head_dim)
    if rope_dim != head_dim:
        raise GgufError(f"llama.rope.dimension_count: expected {head_dim}; was {rope_dim}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": metadata.require("llama.feed_forward_length"),
        "max_position_embeddings": metadata.require("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": metadata.require("llama.block_count"),
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": shortest_float(metadata.require("llama.attention.layer_norm_rms_epsilon")),
        "rope_scaling": None,
        "rope_theta": shortest_float(metadata.get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": tied_head,
        "torch_dtype": "float32",
        "vocab_size": len(metadata.require("tokenizer.ggml.tokens")),
    }


def hugging_face_name(name):
    if name in MODEL_TENSORS:
        return MODEL_TENSORS[name]
    parts = name.split(".", 2)
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in LAYER_TENSORS:
        return f"model.layers.{parts[1]}.{LAYER_TENSORS[parts[2]]}"
    raise GgufError(f"tensor {name} is not part of a Llama model as this importer knows it")


def expected_shapes(config):
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (q, hidden),
        "attn_k.weight": (kv, hidden),
        "attn_v.weight": (kv, hidden),
        "attn_output.weight": (hidden, q),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (mlp, hidden),
        "ffn_up.weight": (mlp, hidden),
        "ffn_down.weight": (hidden, mlp),
    }
    shapes = {"token_embd.weight": (config["vocab_size"], hidden), "output_norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["output.weight"] = (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        shapes.update({f"blk.{index}.{name}": shape for name, shape in layer.items()})
    return shapes


def half_split_rope_rows(weight, heads):
    """Undoes the row order of GGUF, which interleaves the two halves of every head for its rope.

    weight: [heads * head_dim, n], rows of a head ordered (0, d/2, 1, d/2 + 1, ...); the result has
    them in order, as Hugging Face's rotate_half expects.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def show_progress(done, total):
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\rdequantising: {done}/{total} tensors", end=end, file=sys.stderr, flush=True)


def import_tensors(reader, config):
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = {name: hugging_face_name(name) for name in tensors}
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise GgufError(f"tensor {name} is missing; expected shape {list(shape)}")
    imported = {}
    for name, tensor in tensors.items():
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise GgufError(f"tensor {name} has type {tensor.tensor_type.name}: {error}") from error
        values = np.ascontiguousarray(values, dtype=np.float32)
        if name not in expected or values.shape != expected[name]:
            wanted = list(expected[name]) if name in expected else "no such tensor"
            raise GgufError(f"tensor {name} has shape {list(values.shape)}; expected {wanted}")
        if not np.isfinite(values).all():
            raise GgufError(f"tensor {name} holds values that are not finite")
        if name.endswith("attn_q.weight"):
            values = half_split_rope_rows(values, config["num_attention_heads"])
        elif name.endswith("attn_k.weight"):
            values = half_split_rope_rows(values, config["num_key_value_heads"])
        imported[names[name]] = values
        show_progress(len(imported), len(tensors))
    return imported


def added_tokens(metadata):
    tokens = metadata.require("tokenizer.ggml.tokens")
    types = metadata.require("tokenizer.ggml.token_type")
    return [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == CONTROL,
        }
        for index, kind in enumerate(types)
        if kind in (CONTROL, USER_DEFINED)
    ]


def token_of(metadata, role):
    index = metadata.get(f"tokenizer.ggml.{role}_token_id")
    return None if index is None else metadata.require("tokenizer.ggml.tokens")[index]


def bos_post_processor(metadata):
    """What puts the first token before a text, where the file asks for one."""
    if not metadata.get("tokenizer.ggml.add_bos_token", False):
        return None
    bos = token_of(metadata, "bos")
    if bos is None:
        raise GgufError("tokenizer.ggml.add_bos_token is set without tokenizer.ggml.bos_token_id")
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    pair = [special, sequence, special, {"Sequence": {"id": "B", "type_id": 1}}]
    ids = {"id": bos, "ids": [metadata.get("tokenizer.ggml.bos_token_id")], "tokens": [bos]}
    return {
        "type": "TemplateProcessing",
        "single": [special, sequence],
        "pair": pair,
        "special_tokens": {bos: ids},
    }


def tokenizer(metadata):
    model = metadata.require("tokenizer.ggml.model")
    if model != "gpt2":
        raise GgufError(f"tokenizer.ggml.model: expected gpt2 (byte-level BPE); was {model}")
    pre = metadata.get("tokenizer.ggml.pre", "absent")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise GgufError(f"tokenizer.ggml.pre: expected one of {known}; was {pre}")
    tokens = metadata.require("tokenizer.ggml.tokens")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(metadata),
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": bos_post_processor(metadata),
        "decoder": {**BYTE_LEVEL, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": metadata.require("tokenizer.ggml.merges"),
        },
    }


def tokenizer_config(metadata):
    added = added_tokens(metadata)
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in added
        },
        "additional_special_tokens": [token["content"] for token in added if token["special"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.require("llama.context_length"),
        "tokenizer_class": "GPT2Tokenizer",
    }
    for role, gguf_role in [("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")]:
        token = token_of(metadata, gguf_role)
        if token is not None:
            config[f"{role}_token"] = token
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    return config


def generation_config(metadata):
    """Token ids that end a text: the file's, and the end of a ChatML turn where it has one."""
    ends = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot")]
    tokens = metadata.require("tokenizer.ggml.tokens")
    if "<|im_end|>" in tokens:
        ends.append(tokens.index("<|im_end|>"))
    return {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({end for end in ends if end is not None}),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def write_json(path, value, indent=2):
    # UTF-8 as it is: json's own escapes would triple the size of tokenizer.json.
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def check_sha256(path, expected):
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise GgufError(f"sha256 is {actual}; expected {expected}: damaged, or another file")


def open_gguf(path):
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise GgufError(f"not a GGUF file, or truncated: {error}") from error


def import_model(path, directory):
    """Writes all files of the model into `directory`, which exists and is empty."""
    reader = open_gguf(path)
    metadata = Metadata(reader)
    architecture = metadata.require("general.architecture")
    if architecture != "llama":
        raise GgufError(f"general.architecture: expected llama; was {architecture}")
    tied_head = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = model_config(metadata, tied_head)
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", generation_config(metadata))
    write_json(directory / "tokenizer.json", tokenizer(metadata))
    write_json(directory / "tokenizer_config.json", tokenizer_config(metadata))
    tensors = import_tensors(reader, config)
    weights = directory / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    # The library makes it readable for its owner alone.
    weights.chmod((directory / "config.json").stat().st_mode)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="example: import_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2",
    )
    parser.add_argument("gguf", type=pathlib.Path, help="the file to read")
    parser.add_argument("out_dir", type=pathlib.Path, help="the directory to make")
    parser.add_argument("--sha256", help="refuse a file with another checksum")
    options = parser.parse_args()

    if options.out_dir.exists():
        sys.exit(f"import_gguf.py: {options.out_dir}: exists already")
    partial = options.out_dir.with_name(options.out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if options.sha256:
            check_sha256(options.gguf, options.sha256)
        partial.mkdir(parents=True)
        import_model(options.gguf, partial)
        partial.rename(options.out_dir)
    except (GgufError, OSError) as error:
        sys.exit(f"import_gguf.py: {options.gguf}: {error}")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    main()
