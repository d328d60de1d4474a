#!/usr/bin/env python3
"""Makes tests/data/transformers/: what PyPI's transformers computes, for the engine's tests.

    make_model_fixtures.py [--only NAME]...

Tiny checkpoints with random weights come with the outputs of transformers' own models, in float64
arithmetic on the stored weights. For the two models of the quickstart, where models/ holds them,
only the outputs are written. Needs requirements-fixtures.txt. Formats: the README beside the data.
"""

import argparse
import json
import math
import pathlib

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.pytorch_utils import Conv1D

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data" / "transformers"
MODELS = ROOT / "models"

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)

# Its greedy text is clear-cut: no token leads the next by less than 0.06, so that rounding does not
# decide.
SMOLLM2_TEXT = (
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is Madrid. "
    "The capital of"
)
MINILM_TEXTS = [
    "A gardener waters the tomatoes early in the morning.",
    "Someone is watering vegetables at dawn.",
    "The train to the coast leaves at 7:45 from platform 3.",
    "Her violin was made in Cremona, around 1690!",
    "Der Fluß ist über die Ufer getreten – naïve façades stehen im Wasser.",
    "def add(a, b): return a + b",
    "Rain.",
    "Interest rates rose again, which surprised few economists but worried many home owners.",
]


# transformers computes RMSNorm and the rotary angles in float32 whatever the model's type. These
# replacements compute in the type of the hidden states.


def rms_norm_forward(self, hidden):
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden * torch.rsqrt(variance + self.variance_epsilon)


def inverse_frequencies(config):
    """float64 [head_dim / 2]: RoPE's, scaled as Llama 3.1 does where the config says so."""
    rope = config.rope_parameters
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if rope["rope_type"] == "default":
        return plain
    lowered = plain / rope["factor"]
    if rope["rope_type"] == "linear":
        return lowered
    assert rope["rope_type"] == "llama3"
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    blend = (turns - low) / (high - low)
    between = (1 - blend) * lowered + blend * plain
    return torch.where(turns < low, lowered, torch.where(turns > high, plain, between))


def rotary_forward(self, hidden, position_ids):
    frequencies = inverse_frequencies(self.config)
    assert torch.allclose(frequencies, self.inv_freq.double(), rtol=1e-5)
    angles = position_ids[..., None].to(hidden.dtype) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


FLOAT32_PARTS = [
    (modeling_llama.LlamaRMSNorm, rms_norm_forward),
    (modeling_llama.LlamaRotaryEmbedding, rotary_forward),
    (modeling_qwen2.Qwen2RMSNorm, rms_norm_forward),
    (modeling_qwen2.Qwen2RotaryEmbedding, rotary_forward),
    (modeling_qwen3.Qwen3RMSNorm, rms_norm_forward),
    (modeling_qwen3.Qwen3RotaryEmbedding, rotary_forward),
]


class Float64Parts:
    """Within it, language models in float64 compute in float64 throughout."""

    def __enter__(self):
        self._forwards = [module.forward for module, _ in FLOAT32_PARTS]
        for module, forward in FLOAT32_PARTS:
            module.forward = forward

    def __exit__(self, *_):
        for (module, _), forward in zip(FLOAT32_PARTS, self._forwards):
            module.forward = forward


def causal_logits(model, ids):
    """float64 [positions, vocabulary], checked against transformers' unchanged float32 pass."""
    with torch.no_grad():
        plain = model.float()(torch.tensor([ids])).logits[0]
        with Float64Parts():
            exact = model.double()(torch.tensor([ids])).logits[0]
        model.float()
    error = (plain - exact).abs().max() / exact.abs().max()
    assert error < 2e-5, f"float64 and float32 logits differ by {error}"
    return exact


def bert_embedding(model, ids, pooling):
    """float64 [hidden]: pooled and of length 1, as sentence-transformers' modules do it."""
    with torch.no_grad():
        hidden = model.double()(torch.tensor([ids])).last_hidden_state[0]
    pooled = hidden.mean(0) if pooling == "mean" else hidden[0]
    return pooled / pooled.norm()


def rounded(tensor):
    """Nested lists with ten significant digits: far below the tests' tolerances."""
    if tensor.dim() == 0:
        return float(f"{tensor.item():.10g}")
    return [rounded(part) for part in tensor]


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")


def randomise(model, dtype, generator):
    """Weights that make every part of the model matter; all of them exact in `dtype`."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            module = modules[name.rpartition(".")[0]]
            values = torch.randn(weight.shape, generator=generator)
            if "norm" in type(module).__name__.lower() and name.endswith("weight"):
                values = 1 + 0.2 * values
            elif weight.dim() == 1:
                values = 0.2 * values
            elif isinstance(module, Conv1D):  # stored [in, out]
                values = values / math.sqrt(weight.shape[0])
            elif not isinstance(module, torch.nn.Embedding):
                values = values / math.sqrt(weight.shape[1])
            weight.copy_(values.to(dtype))


def stored_tensors(model, dtype):
    tied = getattr(model.config, "tie_word_embeddings", False)
    return {
        name: tensor.to(dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight") and tensor.is_floating_point()
    }


def save_sharded(tensors, directory):
    names = sorted(tensors)
    weight_map = {}
    for index, part in enumerate([names[: len(names) // 2], names[len(names) // 2 :]]):
        file = f"model-{index + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file, {"format": "pt"})
        weight_map.update({name: file for name in part})
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def byte_characters():
    """GPT-2's printable character for every byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }


def special_token(index, content):
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return {"id": index, "content": content, **flags, "special": True}


def byte_tokenizer():
    """Token ids 0 to 255 are the bytes; three special tokens follow."""
    characters = byte_characters()
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special_token(256 + i, content) for i, content in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {characters[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }


def character_word_pieces():
    """A WordPiece tokenizer of single letters and digits and a few words."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = (
        specials + list(letters) + ["##" + c for c in letters] + list(".,!?'-") + ["the", "##ing"]
    )
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    template = [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    ]
    second = [
        {"Sequence": {"id": "B", "type_id": 1}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 1}},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special_token(i, content) for i, content in enumerate(specials)],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": template + second,
            "special_tokens": {
                token: {"id": token, "ids": [vocabulary[token]], "tokens": [token]}
                for token in ("[CLS]", "[SEP]")
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    }


def write_causal(
    name, config, dtype, seed, sharded=False, config_style=5, vocabulary=None, alter=None
):
    """`vocabulary`: the tokens whose logits are kept, where not all are; `alter(config, tensors)`
    changes what is stored, in place."""
    directory = DATA / name
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, dtype, generator)
    tensors = stored_tensors(model, dtype)
    stored = {
        **config.to_diff_dict(),
        "architectures": [type(model).__name__],
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    stored.pop("dtype", None)
    type_name = str(dtype).removeprefix("torch.")
    if config_style == 4:
        rope = stored.pop("rope_parameters", None)
        if rope is not None:
            stored["rope_theta"] = rope.pop("rope_theta")
            stored["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        stored |= {"torch_dtype": type_name, "transformers_version": "4.46.3"}
    else:
        stored |= {"dtype": type_name}
    if alter is not None:
        alter(stored, tensors)
    if sharded:
        save_sharded(tensors, directory)
    else:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    write_json(directory / "config.json", stored)
    write_json(directory / "generation_config.json", {"eos_token_id": [258, 256]})
    write_json(directory / "tokenizer.json", byte_tokenizer())
    write_json(
        directory / "tokenizer_config.json",
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "chat_template": CHATML,
            "tokenizer_class": "GPT2Tokenizer",
        },
    )

    # Read back by transformers, so that the files are what is tested.
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = [list("Nested models: 9".encode()), [257, 0, 263, 131, 77, 256, 10]]
    logits = [causal_logits(model, sequence) for sequence in ids]
    expected = {"input_ids": ids}
    if vocabulary is not None:
        expected["vocabulary"] = vocabulary
        logits = [values[:, vocabulary] for values in logits]
    write_json(
        directory / "expected.json", expected | {"logits": [rounded(values) for values in logits]}
    )


def make_tiny_llama():
    """Free head, a head size that is not hidden / heads, sizes that are no multiples of 32."""
    config = transformers.LlamaConfig(
        vocab_size=264,
        hidden_size=48,
        intermediate_size=108,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        bos_token_id=257,
        eos_token_id=258,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
    )
    write_causal("tiny_llama", config, torch.bfloat16, seed=1)


def make_tiny_llama_tied():
    config = transformers.LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        bos_token_id=257,
        eos_token_id=258,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    write_causal("tiny_llama_tied", config, torch.float32, seed=2, sharded=True, config_style=4)


# Among them tokens that the texts hold, and the last of the vocabulary.
SOME_TOKENS = [*range(3, 264, 12), 257, 263]


def small_sizes(**changes):
    """What a family's configuration class takes; sizes that are no multiples of 32."""
    return {
        "vocab_size": 264,
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    } | changes


# Of the eight frequencies of a head of 16, one is kept, two are interpolated, the rest divided.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_tiny_llama3_rope():
    config = transformers.LlamaConfig(**small_sizes(head_dim=16, rope_parameters=LLAMA3_ROPE))
    write_causal("tiny_llama3_rope", config, torch.bfloat16, seed=6, vocabulary=SOME_TOKENS)


def make_tiny_llama_linear_rope():
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    config = transformers.LlamaConfig(**small_sizes(rope_parameters=rope, attention_bias=True))
    write_causal(
        "tiny_llama_linear_rope",
        config,
        torch.bfloat16,
        seed=7,
        config_style=4,
        vocabulary=SOME_TOKENS,
    )


def make_tiny_qwen2():
    config = transformers.Qwen2Config(**small_sizes())
    write_causal(
        "tiny_qwen2", config, torch.bfloat16, seed=8, config_style=4, vocabulary=SOME_TOKENS
    )


def make_tiny_qwen3():
    """Heads that together are wider than the hidden state, as in the real ones; a free head."""
    config = transformers.Qwen3Config(**small_sizes(head_dim=16, tie_word_embeddings=False))
    write_causal("tiny_qwen3", config, torch.bfloat16, seed=9, vocabulary=SOME_TOKENS)


def gpt2_config(**changes):
    return transformers.GPT2Config(
        **{
            "vocab_size": 264,
            "n_positions": 64,
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 3,
            "layer_norm_epsilon": 1e-5,
            "bos_token_id": 257,
            "eos_token_id": 258,
        }
        | changes
    )


def make_tiny_gpt2():
    write_causal(
        "tiny_gpt2", gpt2_config(), torch.bfloat16, seed=10, config_style=4, vocabulary=SOME_TOKENS
    )


def make_tiny_gpt2_bare():
    """As the first GPT-2 checkpoints are: no prefix, the causal mask stored, n_ctx; a free head."""

    def alter(config, tensors):
        config["n_ctx"] = config["n_positions"]
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        positions = config["n_positions"]
        mask = torch.ones(positions, positions).tril().bool()
        for block in range(config["n_layer"]):
            tensors[f"h.{block}.attn.bias"] = mask[None, None].clone()

    config = gpt2_config(n_inner=44, tie_word_embeddings=False)
    write_causal(
        "tiny_gpt2_bare", config, torch.float16, seed=11, vocabulary=SOME_TOKENS, alter=alter
    )


def write_bert(name, config, dtype, pooling, seed):
    directory = DATA / name
    (directory / "1_Pooling").mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    model = transformers.BertModel(config).eval()
    randomise(model, dtype, generator)
    save_file(stored_tensors(model, dtype), directory / "model.safetensors", {"format": "pt"})
    stored = {**config.to_diff_dict(), "architectures": ["BertModel"], "model_type": "bert"}
    stored["hidden_act"] = config.hidden_act
    stored.pop("dtype", None)
    stored["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json(directory / "config.json", stored)
    write_json(directory / "tokenizer.json", character_word_pieces())
    write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True},
    )
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    write_json(
        directory / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
    )
    write_json(
        directory / "sentence_bert_config.json",
        {"max_seq_length": config.max_position_embeddings, "do_lower_case": False},
    )
    write_json(
        directory / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": config.hidden_size,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )

    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    texts = ["The willow, bending.", "42 owls?", "a"]
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in texts]
    embedding = [rounded(bert_embedding(model, sequence, pooling)) for sequence in ids]
    write_json(
        directory / "expected.json", {"texts": texts, "input_ids": ids, "embedding": embedding}
    )


def bert_config(hidden, mlp):
    return transformers.BertConfig(
        vocab_size=88,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
    )


def make_tiny_bert():
    write_bert("tiny_bert", bert_config(hidden=32, mlp=96), torch.float32, "mean", seed=3)


def make_tiny_bert_cls():
    write_bert("tiny_bert_cls", bert_config(hidden=40, mlp=84), torch.bfloat16, "cls", seed=4)


def make_tiny_bert_classifier():
    """Three labels; names with `bert.`, bf16. Texts alone and in pairs, whose token types differ."""
    directory = DATA / "tiny_bert_classifier"
    directory.mkdir(parents=True, exist_ok=True)
    config = bert_config(hidden=40, mlp=84)
    config.id2label = {0: "contradiction", 1: "neutral", 2: "entailment"}
    config.label2id = {label: number for number, label in config.id2label.items()}
    model = transformers.BertForSequenceClassification(config).eval()
    randomise(model, torch.bfloat16, torch.Generator().manual_seed(12))
    save_file(
        stored_tensors(model, torch.bfloat16), directory / "model.safetensors", {"format": "pt"}
    )
    stored = {**config.to_diff_dict(), "architectures": ["BertForSequenceClassification"]}
    stored["model_type"] = "bert"
    stored["hidden_act"] = config.hidden_act
    stored.pop("dtype", None)
    stored["torch_dtype"] = "bfloat16"
    write_json(directory / "config.json", stored)
    write_json(directory / "tokenizer.json", character_word_pieces())
    write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True},
    )

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32
    ).eval()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = [["The willow, bending."], ["42 owls?", "a few"], ["a"], ["no", "The willow bends."]]
    ids, second, logits = [], [], []
    for pair in texts:
        parts = [tokenizer.encode(text).ids for text in pair]
        # [CLS] first [SEP] second [SEP], of types 0 and 1.
        sequence = parts[0] + (parts[1][1:] if len(parts) > 1 else [])
        types = [0] * len(parts[0]) + [1] * (len(sequence) - len(parts[0]))
        with torch.no_grad():
            output = model.double()(
                torch.tensor([sequence]), token_type_ids=torch.tensor([types])
            ).logits[0]
        ids.append(sequence)
        second.append(len(parts[0]))
        logits.append(rounded(output))
    write_json(
        directory / "expected.json",
        {"texts": texts, "input_ids": ids, "second_text": second, "label_logits": logits},
    )


def greedy(model, ids, count):
    """`count` most likely tokens, and the smallest lead that any of them had over its second."""
    ids = list(ids)
    lead = math.inf
    with torch.no_grad():
        for _ in range(count):
            logits = model(torch.tensor([ids])).logits[0, -1]
            best = logits.topk(2)
            lead = min(lead, (best.values[0] - best.values[1]).item())
            ids.append(best.indices[0].item())
    return {"tokens": ids[-count:], "smallest_lead": round(lead, 4)}


def make_smollm2():
    """Logits of the last positions, and 64 greedy tokens with and without bf16 weights."""
    source = MODELS / "smollm2-135m-instruct"
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    ids = tokenizer.encode(SMOLLM2_TEXT).ids
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(5)
    entries = torch.randperm(model.config.vocab_size, generator=generator)[:256].sort().values
    positions = list(range(len(ids) - 6, len(ids)))
    logits = causal_logits(model, ids)[positions][:, entries]
    expected = {
        "text": SMOLLM2_TEXT,
        "input_ids": ids,
        "positions": positions,
        "vocabulary": entries.tolist(),
        "logits": rounded(logits),
        "greedy": greedy(model, ids, 64),
    }
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.copy_(weight.bfloat16().float())
    expected["greedy_bf16_weights"] = greedy(model, ids, 64)
    write_json(DATA / "smollm2-135m-instruct.json", expected)


def make_minilm():
    source = MODELS / "all-minilm-l6-v2"
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_padding()
    ids = [tokenizer.encode(text).ids for text in MINILM_TEXTS]
    model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    embedding = [rounded(bert_embedding(model, sequence, "mean")[:16]) for sequence in ids]
    write_json(
        DATA / "all-minilm-l6-v2.json",
        {"texts": MINILM_TEXTS, "input_ids": ids, "embedding": embedding},
    )


FIXTURES = {
    "tiny_llama": make_tiny_llama,
    "tiny_llama_tied": make_tiny_llama_tied,
    "tiny_llama3_rope": make_tiny_llama3_rope,
    "tiny_llama_linear_rope": make_tiny_llama_linear_rope,
    "tiny_qwen2": make_tiny_qwen2,
    "tiny_qwen3": make_tiny_qwen3,
    "tiny_gpt2": make_tiny_gpt2,
    "tiny_gpt2_bare": make_tiny_gpt2_bare,
    "tiny_bert": make_tiny_bert,
    "tiny_bert_cls": make_tiny_bert_cls,
    "tiny_bert_classifier": make_tiny_bert_classifier,
    "smollm2-135m-instruct": make_smollm2,
    "all-minilm-l6-v2": make_minilm,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", action="append", choices=FIXTURES, help="may be given several times"
    )
    options = parser.parse_args()
    DATA.mkdir(parents=True, exist_ok=True)
    for name in options.only or FIXTURES:
        print(f"making {name}", flush=True)
        FIXTURES[name]()


if __name__ == "__main__":
    main()
