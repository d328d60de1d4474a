"""Tests of scripts/: what they write, and that a failure leaves nothing half-made.

Run by ctest with the interpreter of .venv; exits with 77 (skipped) where gguf is not installed.
"""

import functools
import hashlib
import http.server
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import unittest

try:
    import gguf
    import numpy as np
    from safetensors.numpy import load_file
except ImportError as error:
    print(f"skipped: {error}; scripts/python_env.sh makes the environment")
    sys.exit(77)

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "tests" / "data" / "transformers" / "tiny_llama_tied"

HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM = 32, 64, 2, 1, 16
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "Ġ", "1"]
CONTROL, NORMAL = 3, 1


def run(script, *arguments):
    """The finished process of a script; its stderr is one text."""
    path = ROOT / script
    command = [sys.executable, str(path)] if path.suffix == ".py" else [str(path)]
    return subprocess.run(
        command + [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def interleaved(weight, heads):
    """Rows as GGUF orders them: 0, d/2, 1, d/2 + 1, ... within every head."""
    half = HEAD_DIM // 2
    rows = [
        head * HEAD_DIM + part * half + i
        for head in range(heads)
        for i in range(half)
        for part in range(2)
    ]
    return weight[rows]


class TinyGguf:
    """A GGUF file with random weights, kept as Hugging Face would order them in `weights`."""

    def __init__(self, architecture="llama", pre="smollm", add_bos=False, without=(), shapes=None):
        random = np.random.default_rng(7)
        kv = KV_HEADS * HEAD_DIM
        sizes = {
            "token_embd.weight": (len(TOKENS), HIDDEN),
            "output_norm.weight": (HIDDEN,),
            "blk.0.attn_norm.weight": (HIDDEN,),
            "blk.0.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
            "blk.0.attn_k.weight": (kv, HIDDEN),
            "blk.0.attn_v.weight": (kv, HIDDEN),
            "blk.0.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
            "blk.0.ffn_norm.weight": (HIDDEN,),
            "blk.0.ffn_gate.weight": (MLP, HIDDEN),
            "blk.0.ffn_up.weight": (MLP, HIDDEN),
            "blk.0.ffn_down.weight": (HIDDEN, MLP),
        } | (shapes or {})
        self.weights = {
            name: random.standard_normal(shape).astype(np.float32)
            for name, shape in sizes.items()
            if name not in without
        }
        self._architecture, self._pre, self._add_bos = architecture, pre, add_bos

    def write(self, path):
        writer = gguf.GGUFWriter(path, self._architecture)
        writer.add_block_count(1)
        writer.add_context_length(128)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(MLP)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(50000.0)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self._pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types([CONTROL] * 3 + [NORMAL] * (len(TOKENS) - 3))
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(0)
        writer.add_add_bos_token(self._add_bos)
        writer.add_chat_template("{{ messages }}")
        for name, weight in self.weights.items():
            stored = weight
            if name.endswith("attn_q.weight"):
                stored = interleaved(weight, HEADS)
            elif name.endswith("attn_k.weight"):
                stored = interleaved(weight, KV_HEADS)
            if name.endswith("ffn_up.weight"):
                kind = gguf.GGMLQuantizationType.Q8_0
                stored = gguf.quantize(stored, kind)
                self.weights[name] = gguf.dequantize(stored, kind)
                writer.add_tensor(name, stored, raw_dtype=kind)
            else:
                writer.add_tensor(name, stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


class ScriptTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="scripts test ")  # a path with spaces
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def assert_fails(self, process, message):
        self.assertNotEqual(process.returncode, 0, process.stdout)
        self.assertIn(message, process.stderr)
        self.assertNotIn("Traceback", process.stderr)


class ImportGgufTest(ScriptTest):
    def setUp(self):
        super().setUp()
        self.source = self.folder / "tiny.gguf"
        self.target = self.folder / "imported"

    def run_import(self, *arguments):
        return run("scripts/import_gguf.py", self.source, self.target, *arguments)

    def assert_refused(self, message, *arguments):
        self.assert_fails(self.run_import(*arguments), message)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["tiny.gguf"])

    def test_weights_are_exact_and_in_the_order_of_hugging_face(self):
        tiny = TinyGguf()
        tiny.write(self.source)
        process = self.run_import()
        self.assertEqual(process.returncode, 0, process.stderr)
        tensors = load_file(self.target / "model.safetensors")
        names = {
            "token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
            "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
            "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
            "blk.0.attn_k.weight": "model.layers.0.self_attn.k_proj.weight",
            "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
            "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj.weight",
            "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
            "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
            "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
            "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        }
        self.assertEqual(set(tensors), set(names.values()))
        for name, imported in names.items():
            self.assertEqual(tensors[imported].dtype, np.float32)
            np.testing.assert_array_equal(tensors[imported], tiny.weights[name], err_msg=name)

    def test_configuration_is_that_of_the_file(self):
        TinyGguf().write(self.source)
        self.run_import()
        config = json.loads((self.target / "config.json").read_text())
        expected = {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 50000.0,
            "tie_word_embeddings": True,
            "vocab_size": 8,
            "bos_token_id": 1,
            "eos_token_id": 0,
        }
        self.assertEqual({key: config[key] for key in expected}, expected)
        generation = json.loads((self.target / "generation_config.json").read_text())
        self.assertEqual(generation["eos_token_id"], [0, 2])

    def test_tokenizer_has_vocabulary_merges_and_special_tokens(self):
        TinyGguf(add_bos=True).write(self.source)
        self.run_import()
        tokenizer = json.loads((self.target / "tokenizer.json").read_text(encoding="utf-8"))
        self.assertEqual(tokenizer["model"]["vocab"]["Ġ"], 6)
        self.assertEqual(tokenizer["model"]["merges"], ["a b"])
        added = [
            (token["id"], token["content"], token["special"]) for token in tokenizer["added_tokens"]
        ]
        self.assertEqual(
            added, [(0, "<|endoftext|>", True), (1, "<|im_start|>", True), (2, "<|im_end|>", True)]
        )
        self.assertEqual(
            tokenizer["post_processor"]["single"][0],
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        )
        config = json.loads((self.target / "tokenizer_config.json").read_text())
        self.assertEqual(config["chat_template"], "{{ messages }}")
        self.assertEqual(config["eos_token"], "<|endoftext|>")

    def test_free_head_is_imported(self):
        tiny = TinyGguf(shapes={"output.weight": (len(TOKENS), HIDDEN)})
        tiny.write(self.source)
        self.run_import()
        tensors = load_file(self.target / "model.safetensors")
        np.testing.assert_array_equal(tensors["lm_head.weight"], tiny.weights["output.weight"])
        config = json.loads((self.target / "config.json").read_text())
        self.assertFalse(config["tie_word_embeddings"])

    def test_other_architecture_is_refused(self):
        TinyGguf(architecture="falcon").write(self.source)
        self.assert_refused("general.architecture: expected llama; was falcon")

    def test_unknown_pre_tokenizer_is_refused(self):
        TinyGguf(pre="mystery").write(self.source)
        self.assert_refused("tokenizer.ggml.pre: expected one of smollm; was mystery")

    def test_missing_tensor_is_named(self):
        TinyGguf(without=["blk.0.ffn_down.weight"]).write(self.source)
        self.assert_refused("tensor blk.0.ffn_down.weight is missing; expected shape [32, 64]")

    def test_wrong_shape_is_named(self):
        TinyGguf(shapes={"blk.0.attn_v.weight": (8, HIDDEN)}).write(self.source)
        self.assert_refused("tensor blk.0.attn_v.weight has shape [8, 32]; expected [16, 32]")

    def test_foreign_tensor_is_named(self):
        TinyGguf(shapes={"blk.0.attn_q.bias": (32,)}).write(self.source)
        self.assert_refused("tensor blk.0.attn_q.bias is not part of a Llama model")

    def test_truncated_file_is_refused(self):
        TinyGguf().write(self.source)
        content = self.source.read_bytes()
        for size in (0, 10, 200, len(content) // 2, len(content) - 64):
            with self.subTest(size=size):
                self.source.write_bytes(content[:size])
                self.assert_refused("tiny.gguf: not a GGUF file, or truncated")

    def test_other_checksum_is_refused(self):
        TinyGguf().write(self.source)
        digest = hashlib.sha256(self.source.read_bytes()).hexdigest()
        self.assert_refused(f"sha256 is {digest}; expected {'0' * 64}", "--sha256", "0" * 64)

    def test_existing_directory_is_left_alone(self):
        TinyGguf().write(self.source)
        self.target.mkdir()
        self.assert_fails(self.run_import(), "exists already")
        self.assertEqual(list(self.target.iterdir()), [])


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class FetchModelTest(ScriptTest):
    """Against a hub of its own, on the loopback."""

    def setUp(self):
        super().setUp()
        self.models = self.folder / "models"
        self.hub = self.folder / "hub"
        self.files = self.hub / "org" / "Tiny" / "resolve" / "main"
        self.files.mkdir(parents=True)
        for path in CHECKPOINT.iterdir():
            (self.files / path.name).write_bytes(path.read_bytes())
        handler = functools.partial(QuietHandler, directory=str(self.hub))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        self.addCleanup(server.server_close)
        self.addCleanup(thread.join)
        self.addCleanup(server.shutdown)
        self.endpoint = f"http://127.0.0.1:{server.server_port}"

    def run_fetch(self, model_id="org/Tiny"):
        return run(
            "scripts/fetch_model.py",
            "--hf-id",
            model_id,
            "--endpoint",
            self.endpoint,
            "--models-dir",
            self.models,
        )

    def assert_refused(self, process, message):
        self.assert_fails(process, message)
        self.assertEqual(list(self.models.iterdir()), [])

    def test_sharded_model_is_downloaded_whole(self):
        process = self.run_fetch()
        self.assertEqual(process.returncode, 0, process.stderr)
        self.assertEqual(process.stdout, f"{self.models}/tiny\n")
        for name in [
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ]:
            self.assertEqual(
                (self.models / "tiny" / name).read_bytes(), (CHECKPOINT / name).read_bytes(), name
            )

    def test_second_run_downloads_nothing(self):
        self.run_fetch()
        (self.files / "config.json").unlink()
        process = self.run_fetch()
        self.assertEqual((process.returncode, process.stderr), (0, ""))

    def test_missing_tokenizer_is_named(self):
        (self.files / "tokenizer.json").unlink()
        self.assert_refused(self.run_fetch(), "tokenizer.json: not found")

    def test_missing_shard_is_named(self):
        (self.files / "model-00002-of-00002.safetensors").unlink()
        self.assert_refused(self.run_fetch(), "model-00002-of-00002.safetensors: not found")

    def test_index_cannot_leave_the_directory(self):
        index = {"weight_map": {"x": "../../evil.safetensors"}}
        (self.files / "model.safetensors.index.json").write_text(json.dumps(index))
        self.assert_refused(self.run_fetch(), "strange file name '../../evil.safetensors'")

    def test_unreachable_hub_says_what_to_do(self):
        self.endpoint = "http://127.0.0.1:1"
        self.assert_refused(self.run_fetch(), "where the network does not allow it")

    def test_malformed_id_is_refused(self):
        process = self.run_fetch("../evil")
        self.assert_fails(process, "--hf-id: expected ORG/NAME; was ../evil")


class CalibrationTextTest(ScriptTest):
    def setUp(self):
        super().setUp()
        self.source = self.folder / "fortunes"
        self.source.mkdir()
        entries = [
            f"Passage number {i} tells of {i * 7} ships.  They sailed on a long line of "
            f"text, which\nwas wrapped here.\n\t-- Sailor {i}\n"
            for i in range(200)
        ]
        (self.source / "sea").write_text("%\n".join(entries))
        (self.source / "sea.dat").write_bytes(b"\xff\x00")
        (self.source / "sea.u8").symlink_to("sea")
        (self.source / "again").write_text(entries[3].upper())

    def build(self, name):
        target = self.folder / name
        process = run("scripts/calibration_text.py", target, "--fortunes", self.source)
        self.assertEqual(process.returncode, 0, process.stderr)
        return {path.name: path.read_text() for path in target.iterdir()}

    def test_parts_are_disjoint_and_complete(self):
        files = self.build("out")
        self.assertEqual(
            set(files),
            {
                "calibration.txt",
                "evaluation.txt",
                "calibration_sentences.txt",
                "evaluation_sentences.txt",
            },
        )
        calibration = set(files["calibration.txt"].strip().split("\n\n"))
        evaluation = set(files["evaluation.txt"].strip().split("\n\n"))
        self.assertEqual(calibration & evaluation, set())
        self.assertEqual(len(calibration) + len(evaluation), 200)
        self.assertTrue(20 <= len(evaluation) <= 60, len(evaluation))
        sentences = set(files["calibration_sentences.txt"].splitlines())
        self.assertEqual(sentences & set(files["evaluation_sentences.txt"].splitlines()), set())

    def test_wrapped_lines_are_joined(self):
        self.assertIn(
            "a long line of text, which was wrapped here.\n  -- Sailor",
            self.build("out")["calibration.txt"],
        )

    def test_same_package_gives_the_same_files(self):
        self.assertEqual(self.build("first"), self.build("second"))

    def test_missing_package_is_named(self):
        process = run("scripts/calibration_text.py", self.folder / "out", "--fortunes", "/absent")
        self.assert_fails(process, "is the package fortunes installed?")


class CommandLineTest(ScriptTest):
    def test_help_needs_nothing(self):
        for script in ("quickstart.sh", "test.sh"):
            process = run(script, "--help")
            self.assertEqual(process.returncode, 0)
            self.assertTrue(process.stdout.startswith(f"Usage: ./{script}"))

    def test_bad_arguments_are_named_before_anything_starts(self):
        for arguments, message in [
            (["--demo", "sing"], "--demo: expected generate or embed; was sing"),
            (["--demo"], "--demo: needs a value"),
            (["--frob"], "unknown argument --frob"),
            (["--model", "/absent"], "--model: /absent has no config.json"),
            (["--model", CHECKPOINT, "--hf-id", "a/b"], "--model and --hf-id: give one of them"),
        ]:
            process = run("quickstart.sh", *arguments)
            self.assertEqual(process.returncode, 1)
            self.assertEqual(process.stdout, "")
            self.assertIn(message, process.stderr)

    def test_consolidating_a_ladder_names_bad_arguments_before_anything_starts(self):
        script = "scripts/consolidate_ladder.sh"
        process = run(script, "--help")
        self.assertEqual(process.returncode, 0)
        self.assertTrue(process.stdout.startswith(f"Usage: {script}"))
        for arguments, message in [
            ([], "--text: give a file"),
            (["--text", "/absent"], "--text: /absent: no such file"),
            (["--evaluation"], "--evaluation: needs a value"),
            (["--costs", "0.9,1.2"], "--costs: expected shares such as 0.9,0.8,0.6; was 0.9,1.2"),
            (["--minutes", "an hour"], "--minutes: expected a whole number; was an hour"),
            (["--text", __file__, "--minutes", "0"], "--minutes: must be positive; was 0"),
            (["--model", "/absent"], "--model: /absent has no config.json"),
            (["--frob"], "unknown argument --frob"),
        ]:
            process = run(script, *arguments)
            self.assertEqual(process.returncode, 1)
            self.assertEqual(process.stdout, "")
            self.assertIn(message, process.stderr)


if __name__ == "__main__":
    unittest.main()
