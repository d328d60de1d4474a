#!/usr/bin/env python3
"""Writes a model of a real shape with random weights, for measuring speed and memory.

    make_random_model.py OUT --shape tinyllama-1.1b --tokenizer models/smollm2-135m-instruct
    make_random_model.py OUT.nested --artifact --shape ... --tokenizer ...

Without --artifact OUT is a Hugging Face directory in bf16, which `nestor bench OUT` runs as it is.
With it OUT is an int8 artifact of the same weights with both ladders: planes as
docs/artifact_format.md says, and factors that are random, too, but as large as real ones would be.
So every byte and FLOP is that of a real model, and no level's output means anything; none has a
measured quality. Vocabulary and tokenizer are those of another directory. Weights are scaled so
that activations keep their size. The same seed gives the same weights in both.

Either takes under a minute and 2 GB. `nestor compress` makes an artifact of OUT, too, with at least

    nestor compress OUT OUT.nested --levels 1 --calibration models/calibration.txt \\
        --calibration-tokens 512 --self-sample 0 --evaluation-tokens 512 --max-residual-rank 8 \\
        --max-head-residual-rank 8

but whatever the ranks it decomposes every layer: it held 8.7 GB, and when 2 % were done it
expected half an hour of two busy cores (it was not run to its end).
"""

import argparse
import hashlib
import json
import pathlib
import shutil
import sys

import numpy as np

SHAPES = {
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
    },
}

TOKENIZER_FILES = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]
TOKEN_KEYS = ["bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"]

GROUP = 32
LARGEST_CODE = 119
ATTENTION_CONTEXT = 128  # positions, by the definition of relative FLOPs
# Components of each residual level, of a block's layer and of the head.
RESIDUAL_RANKS = [(0, 0), (16, 32), (64, 128)]
# FLOPs of each prefix level, as share of the dense layer's.
PREFIX_SHARES = [0.25, 0.5, 0.75]
# What the coarse plane leaves out of a random weight, root mean square: 16 of 2 * 119 steps over
# some 4.5 standard deviations, 1 / sqrt(12) of a step.
RESIDUAL_SIZE = 0.09


class TensorFile:
    """A safetensors file that is written tensor by tensor: its header comes last, into room that
    was left for it."""

    HEADER_BYTES = 1 << 20

    def __init__(self, path):
        self._file = open(path, "wb")
        self._file.seek(8 + self.HEADER_BYTES)
        self._header = {"__metadata__": {"format": "pt"}}
        self._size = 0
        self.checksums = {}

    def add(self, name, dtype, array):
        data = np.ascontiguousarray(array).data.cast("B")
        self._file.write(data)
        self._header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [self._size, self._size + len(data)],
        }
        self.checksums[name] = hashlib.sha256(data).hexdigest()
        self._size += len(data)

    def close(self):
        header = json.dumps(self._header).encode()
        assert len(header) <= self.HEADER_BYTES, len(header)
        self._file.seek(0)
        self._file.write(self.HEADER_BYTES.to_bytes(8, "little") + header.ljust(self.HEADER_BYTES))
        self._file.close()


class Layer:
    """A linear layer: its name, shape, and how large its weights are."""

    def __init__(self, name, out, inputs, scale=1.0):
        self.name, self.out, self.inputs = name, out, inputs
        self.scale = scale / np.sqrt(inputs)
        self.is_head = not name.startswith("model.layers.")

    def prefix_rank(self, share):
        """The multiple of 8 whose FLOPs are that share of the dense layer's."""
        return max(8, round(share * self.out * self.inputs / (self.out + self.inputs) / 8) * 8)

    def ranks(self):
        """Of every level but the full one: (ladder, form, rank)."""
        levels = [("residual", "residual", ranks[self.is_head]) for ranks in RESIDUAL_RANKS]
        levels.append(("residual", "middle", 0))
        return levels + [("prefix", "prefix", self.prefix_rank(share)) for share in PREFIX_SHARES]

    def cost(self, form, rank):
        """Bytes and FLOPs of one token, as CostOfLinear in kernels/nested_linear.cc states them."""
        planes = {"dense": 2, "middle": 1.5, "residual": 1, "prefix": 0}[form]
        weights = self.out * self.inputs
        size = int(planes * weights) // 2 + (planes > 0) * weights // GROUP * 2
        size += rank * (self.inputs + self.out) * (GROUP + 2) // GROUP
        flops = 2 * weights * (planes > 0) + 2 * rank * (self.out + self.inputs)
        return np.array([size, flops])


def layers_of(config):
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    keys = config["head_dim"] * config["num_key_value_heads"]
    # What each block adds to the residual stream shrinks with the number of blocks, as in GPT-2.
    added = 1 / np.sqrt(2 * config["num_hidden_layers"])
    layers = []
    for block in range(config["num_hidden_layers"]):
        stem = f"model.layers.{block}."
        layers += [
            Layer(stem + "self_attn.q_proj", hidden, hidden),
            Layer(stem + "self_attn.k_proj", keys, hidden),
            Layer(stem + "self_attn.v_proj", keys, hidden),
            Layer(stem + "self_attn.o_proj", hidden, hidden, added),
            Layer(stem + "mlp.gate_proj", mlp, hidden),
            Layer(stem + "mlp.up_proj", mlp, hidden),
            Layer(stem + "mlp.down_proj", hidden, mlp, added),
        ]
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return layers + [Layer(head, config["vocab_size"], hidden)]


def to_bf16(values):
    """Bits of the nearest bf16."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def random_for(seed, name):
    return np.random.default_rng([seed, *hashlib.sha256(name.encode()).digest()])


def random_weight(seed, layer):
    """Bits of bf16, [out, in]."""
    values = random_for(seed, layer.name).standard_normal((layer.out, layer.inputs), np.float32)
    values *= np.float32(layer.scale)
    return to_bf16(values)


def pack(codes):
    """Two 4-bit codes a byte."""
    unsigned = (codes + 8).view(np.uint8)
    return unsigned[:, 0::2] | unsigned[:, 1::2] << 4


def quantise(weight):
    """Coarse, middle and fine plane and scales of a weight, [out, in]."""
    groups = weight.reshape(len(weight), -1, GROUP)
    scales = np.abs(groups).max(axis=2) / np.float32(LARGEST_CODE)
    # Rounded up, so that no code is larger.
    scales = ((scales.view(np.uint32) + 0xFFFF) >> 16).astype(np.uint16)
    codes = np.rint(groups / from_bf16(scales)[:, :, None]).astype(np.int8).reshape(weight.shape)
    high = (codes + 8) >> 4
    low = codes - 16 * high
    middle = (low + 8).view(np.uint8) >> 2
    middle = sum(middle[:, i::4] << 2 * i for i in range(4)).astype(np.uint8)
    return pack(high), middle, pack(low), scales


def add_factors(file, seed, layer, form, rank, size):
    """Factors whose product is a weight of `size` times the layer's own."""
    random = random_for(seed, f"{layer.name}.{form}")
    largest = 127
    deviation = np.sqrt(largest * (largest + 1) / 3)  # of a uniform code
    for part, length, scale in [
        ("a", layer.inputs, 1 / np.sqrt(layer.inputs)),
        ("bt", layer.out, size * layer.scale * np.sqrt(layer.inputs / rank)),
    ]:
        codes = random.integers(-largest, largest, (rank, length), np.int8, endpoint=True)
        scales = np.full((rank, length // GROUP), scale / deviation, np.float32)
        file.add(f"{layer.name}.{form}.{part}", "I8", codes)
        file.add(f"{layer.name}.{form}.{part}_scales", "BF16", to_bf16(scales))


def add_layer(file, seed, layer):
    coarse, middle, fine, scales = quantise(from_bf16(random_weight(seed, layer)))
    file.add(layer.name + ".coarse", "U8", coarse)
    file.add(layer.name + ".middle", "U8", middle)
    file.add(layer.name + ".fine", "U8", fine)
    file.add(layer.name + ".scales", "BF16", scales)
    for form, size in [("residual", RESIDUAL_SIZE), ("prefix", 1)]:
        rank = stored_rank(layer, form)
        add_factors(file, seed, layer, form, rank, size)


def stored_rank(layer, form):
    return max(rank for _, other, rank in layer.ranks() if other == form)


def add_other_tensors(file, seed, config):
    if not config["tie_word_embeddings"]:
        table = Layer("model.embed_tokens", config["vocab_size"], config["hidden_size"])
        file.add("model.embed_tokens.weight", "BF16", random_weight(seed, table))
    ones = to_bf16(np.ones(config["hidden_size"], np.float32))
    for block in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            file.add(f"model.layers.{block}.{norm}.weight", "BF16", ones)
    file.add("model.norm.weight", "BF16", ones)


def levels_of(layers, config):
    """The levels of nested.json, the full one last."""
    attention = 4 * ATTENTION_CONTEXT * config["num_hidden_layers"]
    attention *= config["num_attention_heads"] * config["head_dim"]
    profiles = [
        (layers[0].ranks()[i][0], [layer.ranks()[i][1:] for layer in layers])
        for i in range(len(layers[0].ranks()))
    ]
    profiles.append(("full", [("dense", 0)] * len(layers)))
    costs = [
        sum(layer.cost(form, rank) for layer, (form, rank) in zip(layers, profile))
        + np.array([0, attention])
        for _, profile in profiles
    ]
    return [
        {
            "ladder": ladder,
            "forms": [form for form, _ in profile],
            "ranks": [rank for _, rank in profile],
            "weight_bytes": int(cost[0]),
            "flops": int(cost[1]),
            "relative_cost": float(cost[0] / costs[-1][0]),
            "relative_flops": float(cost[1] / costs[-1][1]),
            "metrics": {},
        }
        for (ladder, profile), cost in zip(profiles, costs)
    ]


def write_checkpoint(directory, seed, config, layers):
    file = TensorFile(directory / "model.safetensors")
    for layer in layers:
        file.add(layer.name + ".weight", "BF16", random_weight(seed, layer))
        print(layer.name, file=sys.stderr)
    add_other_tensors(file, seed, config)
    file.close()


def write_artifact(directory, seed, config, layers, name):
    file = TensorFile(directory / "nested.safetensors")
    for layer in layers:
        add_layer(file, seed, layer)
        print(layer.name, file=sys.stderr)
    add_other_tensors(file, seed, config)
    file.close()
    description = {
        "format": "nestor-nested",
        "version": 1,
        "source": {"name": name, "sha256": ""},
        "dtype": "int8",
        "group_size": GROUP,
        "planes": [4, 4],
        "layers": [
            {
                "name": layer.name,
                "out": layer.out,
                "in": layer.inputs,
                "residual_rank": stored_rank(layer, "residual"),
                "prefix_rank": stored_rank(layer, "prefix"),
                "middle_plane": True,
            }
            for layer in layers
        ],
        "levels": levels_of(layers, config),
        "checksums": file.checksums,
    }
    (directory / "nested.json").write_text(json.dumps(description, indent=1), encoding="utf-8")


def model_config(shape, tokenizer, tied_head):
    source = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "head_dim": shape["hidden_size"] // shape["num_attention_heads"],
        "tie_word_embeddings": tied_head,
        "torch_dtype": "bfloat16",
        **shape,
        **{key: source[key] for key in TOKEN_KEYS if key in source},
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--tokenizer", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--tied-head", action="store_true", help="the embedding is the head, too")
    parser.add_argument(
        "--artifact", action="store_true", help="an int8 artifact with both ladders"
    )
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.out.exists():
        sys.exit(f"make_random_model.py: {options.out} exists already")
    if not (options.tokenizer / "config.json").is_file():
        sys.exit(f"make_random_model.py: --tokenizer: {options.tokenizer} has no config.json")

    config = model_config(SHAPES[options.shape], options.tokenizer, options.tied_head)
    partial = options.out.with_name(options.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (options.tokenizer / name).is_file():
            shutil.copy(options.tokenizer / name, partial)
    layers = layers_of(config)
    if options.artifact:
        write_artifact(partial, options.seed, config, layers, f"random-{options.shape}")
    else:
        write_checkpoint(partial, options.seed, config, layers)
    partial.rename(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
