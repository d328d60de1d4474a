"""Tests of consolidate/ on tiny artifacts of random weights, beside the C++ engine.

Run by ctest as `consolidate_test.py CONSOLIDATE_FIXTURE`; exits with 77 (skipped) where torch or
transformers is not installed.
"""

import json
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

try:
    import torch
    import transformers  # pylint: disable=unused-import
    from safetensors.torch import load_file, save_file
except ImportError as error:
    print(f"skipped: {error}; see requirements-consolidate.txt")
    sys.exit(77)

from consolidate import data, delta, evaluate, sampling
from consolidate.__main__ import UsageError, main, parse, start_from
from consolidate.artifact import (
    Artifact,
    ArtifactError,
    dequantise_factor,
    padded,
    quantise_factor,
    quantise_term,
    read_metadata,
    term_codes,
)
from consolidate.data import Batch, DataError, Sentences, Windows, load_tokenizer
from consolidate.nested import NestedModel
from consolidate.objectives import (
    Embeddings,
    FlexRank,
    NestedSubspaces,
    cross_entropy,
    divergence,
)
from consolidate.profiles import SAMPLERS
from consolidate.quality import Judge, spearman
from consolidate.sampling import _begins, _Follow, _RoomyLayer, sample_text
from consolidate.train import (
    Diverged,
    Settings,
    Trainer,
    export_delta,
    export_factors,
    learning_rate_at,
)

FIXTURE = sys.argv.pop(1) if len(sys.argv) > 1 else str(ROOT / "build/bin/consolidate_fixture")
# What is compared with the engine is in fp32, also on a CPU with AVX-512 BF16.
torch.cpu.get_capabilities = dict
TOKENS = [17, 3, 99, 64, 120, 5, 77, 31, 42, 8]


def fixture(*arguments) -> str:
    done = subprocess.run(
        [FIXTURE, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return done.stdout


def engine_outputs(artifact, tokens=TOKENS) -> list[torch.Tensor]:
    """Of every level: logits after every token, flat, or the embedding."""
    return [torch.tensor(values) for values in json.loads(fixture("outputs", artifact, *tokens))]


def setUpModule():  # pylint: disable=invalid-name
    torch.set_num_threads(2)
    global DIRECTORY  # pylint: disable=global-statement
    DIRECTORY = tempfile.TemporaryDirectory()
    for kind in ("llama", "bert"):
        fixture("make", kind, path(kind))


def tearDownModule():  # pylint: disable=invalid-name
    DIRECTORY.cleanup()


def path(*parts) -> pathlib.Path:
    return pathlib.Path(DIRECTORY.name, *parts)


def open_model(kind="llama") -> NestedModel:
    return NestedModel(Artifact(path(kind, "nested")))


def prefix_levels(model) -> list[int]:
    return [i for i, level in enumerate(model.artifact.levels) if level.ladder == "prefix"]


def add_random_delta(model, rank=3):
    """Terms that change what a level computes."""
    generator = torch.Generator().manual_seed(3)
    ranks = delta.ranks_for(model.artifact, prefix_levels(model), rank)
    for nested, k in zip(model.nested, ranks):
        if k > 0:
            nested.add_delta(k, generator)
            nested.delta_bt.data.copy_(
                0.1 * torch.randn(nested.delta_bt.shape, generator=generator)
            )


def trainer_of(model, directory, levels=None, objective=FlexRank, **settings):
    levels = levels or prefix_levels(model)
    if not any(p.requires_grad for p in model.parameters()):
        model.train_factors(levels)
    text = Windows([path("llama", "text.txt")], load_tokenizer(model.artifact.directory), 32, 1)
    chosen = {
        "steps": 10,
        "batch": 8,
        "micro_batch": 4,
        "learning_rate": 3e-3,
        "warm_up": 2,
        "checkpoint_steps": 5,
    } | settings
    return Trainer(
        model,
        text,
        objective(model.teacher(), levels),
        SAMPLERS["uniform"](levels, 1),
        None,
        Settings(levels=levels, **chosen),
        directory,
    )


def fake_nestor(levels: int) -> pathlib.Path:
    """A program that evaluates as nestor does, but that level i has quality 0.5 + i / 100."""
    report = {
        "tokens": 64,
        "levels": [
            {"form": "prefix", "relative_flops": 0.5, "quality": 0.5 + i / 100, "perplexity": 9.5}
            for i in range(levels)
        ],
    }
    program = path("nestor.sh")
    program.write_text(f"#!/bin/sh\necho '{json.dumps(report)}'\n")
    program.chmod(0o755)
    return program


class Forward(unittest.TestCase):
    """What a level computes."""

    def test_every_level_has_the_engines_logits(self):
        model = open_model()
        tokens = torch.tensor([TOKENS])
        expected = engine_outputs(path("llama", "nested"))
        self.assertEqual(len(expected), len(model.artifact.levels))
        self.assertEqual(
            {level.ladder for level in model.artifact.levels}, {"residual", "prefix", "full"}
        )
        forms = {form for level in model.artifact.levels for form in level.forms}
        self.assertEqual(forms, {"dense", "residual", "middle", "prefix"})
        for level, values in enumerate(expected):
            model.set_level(level)
            with torch.no_grad():
                logits = model.logits(tokens).flatten()
            scale = values.abs().max().item()
            self.assertLess((logits - values).abs().max().item(), 1e-4 * scale, f"level {level}")

    def test_every_level_has_the_engines_embedding(self):
        model = open_model("bert")
        tokens = [2, *TOKENS, 3]
        expected = engine_outputs(path("bert", "nested"), tokens)
        for level, values in enumerate(expected):
            model.set_level(level)
            with torch.no_grad():
                batch = torch.tensor([tokens])
                embedding = model.embeddings(batch, torch.ones_like(batch))[0]
            values = torch.nn.functional.normalize(values, dim=0)
            self.assertLess((embedding - values).abs().max().item(), 1e-4, f"level {level}")

    def test_masked_equals_sliced(self):
        model = open_model()
        nested = next(n for n in model.nested if n.layer.prefix_rank >= 8)
        x = torch.randn(5, nested.layer.in_)
        for rank in (1, 4, nested.layer.prefix_rank):
            mask = (torch.arange(nested.layer.prefix_rank) < rank).float()
            masked = (x @ nested.prefix_a.T * mask) @ nested.prefix_bt
            for rows in (1, 500):  # two thin products, and one matrix
                nested.set_level("prefix", rank)
                y = nested(x.repeat(rows, 1))[:5] - (0 if nested.bias is None else nested.bias)
                torch.testing.assert_close(y, masked, rtol=1e-4, atol=1e-4)

    def test_a_term_equals_its_components_put_first(self):
        model = open_model()
        add_random_delta(model)
        nested = next(n for n in model.nested if n.delta_rank > 0)
        rank, k = nested.layer.prefix_rank, nested.delta_rank
        x = torch.randn(4, nested.layer.in_)
        nested.set_level("prefix", rank)
        a = torch.cat((nested.delta_a, nested.prefix_a[: rank - k]))
        bt = torch.cat((nested.delta_bt, nested.prefix_bt[: rank - k]))
        torch.testing.assert_close(nested(x), (x @ a.T) @ bt, rtol=1e-4, atol=1e-4)

    def test_a_new_term_changes_nothing_but_the_components_it_displaces(self):
        model = open_model()
        nested = next(n for n in model.nested if n.layer.prefix_rank >= 8)
        rank = nested.layer.prefix_rank
        x = torch.randn(4, nested.layer.in_)
        nested.set_level("prefix", rank - 2)
        expected = nested(x)
        nested.add_delta(2, torch.Generator().manual_seed(1))
        nested.set_level("prefix", rank)
        torch.testing.assert_close(nested(x), expected, rtol=1e-4, atol=1e-4)

    def test_gradients_of_a_term_are_those_of_autograd(self):
        model = open_model()
        add_random_delta(model)
        nested = next(n for n in model.nested if n.delta_rank > 0)
        rank = nested.layer.prefix_rank
        x = torch.randn(6, nested.layer.in_, requires_grad=True)
        seed = torch.randn(6, nested.layer.out)
        nested.set_level("prefix", rank)
        nested.gather_gradients()
        (nested(x) * seed).sum().backward()
        found = [t.grad.clone() for t in (x, nested.delta_a, nested.delta_bt)]
        gathered = nested._gathered  # pylint: disable=protected-access
        torch.testing.assert_close(gathered.gradient, seed.T @ x.detach())
        torch.testing.assert_close(gathered.moment, x.detach().T @ x.detach())
        for tensor in (x, nested.delta_a, nested.delta_bt):
            tensor.grad = None
        base = rank - nested.delta_rank
        weight = nested.prefix_bt[:base].T @ nested.prefix_a[:base]
        y = x @ (weight + nested.delta_bt.T @ nested.delta_a).T
        (y * seed).sum().backward()
        for value, tensor in zip(found, (x, nested.delta_a, nested.delta_bt)):
            torch.testing.assert_close(value, tensor.grad, rtol=1e-4, atol=1e-4)

    def test_hidden_states_between_blocks_are_bf16_where_products_are(self):
        model = open_model()
        model.set_level(model.full_level)
        tokens = torch.tensor([TOKENS])
        seen = []
        hook = model.model.base_model.layers[1].register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].dtype)
        )
        self.addCleanup(hook.remove)
        with torch.no_grad():
            exact = model.hidden(tokens)
            with mock.patch.object(
                model, "precision", lambda: torch.autocast("cpu", torch.bfloat16)
            ):
                rounded = model.hidden(tokens)
        self.assertEqual(seen, [torch.float32, torch.bfloat16])
        error = (rounded - exact).norm() / exact.norm()
        self.assertGreater(error.item(), 0)
        self.assertLess(error.item(), 0.02)


class Losses(unittest.TestCase):
    """Values and gradients."""

    def test_divergence_and_its_gradient(self):
        student = torch.randn(3, 11, dtype=torch.double, requires_grad=True)
        teacher = torch.randn(3, 11, dtype=torch.double)
        value, grad = divergence(student.detach().clone(), teacher.clone())
        expected = torch.nn.functional.kl_div(
            torch.log_softmax(student, -1), torch.softmax(teacher, -1), reduction="sum"
        )
        expected.backward()
        self.assertAlmostEqual(value.item(), expected.item(), places=9)
        torch.testing.assert_close(grad, student.grad)

    def test_cross_entropy_and_its_gradient(self):
        logits = torch.randn(4, 9, dtype=torch.double, requires_grad=True)
        targets = torch.tensor([0, 8, 3, 3])
        value, grad = cross_entropy(logits.detach().clone(), targets)
        expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        expected.backward()
        self.assertAlmostEqual(value.item(), expected.item(), places=9)
        torch.testing.assert_close(grad, logits.grad)

    def test_flexrank_is_zero_at_the_full_level(self):
        model = open_model()
        model.train_factors(prefix_levels(model))
        objective = FlexRank(model.teacher(), [model.full_level])
        batch = Batch(torch.tensor([TOKENS]))
        with torch.no_grad():
            rows = model.teacher().hidden(batch.tokens)
        model.set_level(model.full_level)
        with torch.no_grad():
            torch.testing.assert_close(model.hidden(batch.tokens), rows)
        level = prefix_levels(model)[0]
        self.assertGreater(objective.step(model, level, [batch], 1.0, map)[0].item(), 1e-4)

    def test_nsn_weighs_by_variance_and_learns_it(self):
        model = open_model()
        levels = prefix_levels(model)
        model.train_factors(levels)
        objective = NestedSubspaces(model.teacher(), levels)
        with torch.no_grad():
            objective.log_variances.fill_(0.5)
        batch = Batch(torch.tensor([TOKENS]))
        objective.step(model, levels[0], [batch], 1.0, map)
        weight = math.exp(-0.5)
        for level in (levels[0], levels[-1]):
            model.set_level(level)
            with torch.no_grad():
                logits = model.logits(batch.tokens)[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, batch.tokens[0, 1:]).item()
            self.assertAlmostEqual(
                objective.log_variances.grad[level].item(), 1 - weight * loss, places=4
            )
        self.assertEqual(objective.log_variances.grad[model.full_level].item(), 0)


class Artifacts(unittest.TestCase):
    """Reading and writing."""

    def test_factors_that_were_read_are_written_with_the_same_bytes(self):
        artifact = Artifact(path("llama", "nested"))
        for layer in artifact.layers:
            for form in ("residual", "prefix"):
                for part, values in zip(("a", "bt"), artifact.factors(layer, form)):
                    if len(values) == 0:
                        continue
                    codes, scales = quantise_factor(values)
                    stem = f"{layer.name}.{form}.{part}"
                    again = dequantise_factor(codes, scales, values.shape[1])
                    self.assertEqual(codes.shape[1], padded(values.shape[1]))
                    # A scale is bf16, so a group's extreme may have moved by a code.
                    torch.testing.assert_close(again, values, rtol=0.02, atol=1e-6)
                    self.assertEqual(artifact.tensors[stem].shape, codes.shape)

    def test_terms_have_codes_of_4_bits(self):
        values = torch.randn(5, 70, generator=torch.Generator().manual_seed(2))
        values[1, 32:64] = 0
        values[2, 3] = 40  # beside which its group is nothing
        packed, scales = quantise_term(values)
        self.assertEqual((packed.dtype, list(packed.shape)), (torch.uint8, [5, 48]))
        codes = term_codes(packed)
        self.assertLessEqual(codes.abs().max().item(), 7)
        self.assertFalse(codes[:, 70:].any())
        again = dequantise_factor(codes, scales, 70)
        self.assertFalse(again[1, 32:64].any())
        ordinary = [0, 1, 3, 4]
        error = (again - values)[ordinary].norm()
        self.assertLess(error.item(), 0.11 * values[ordinary].norm().item())
        # Less than that of scales by which a group's extreme is 7, some of which are clipped.
        whole = values[ordinary][:, :64].reshape(-1, 32)
        steps = whole.abs().amax(1, keepdim=True).clamp(min=1e-9) / 7
        nearest = ((whole / steps).round() * steps - whole).norm()
        own = (again - values)[ordinary][:, :64].norm()
        self.assertLess(own.item(), 0.98 * nearest.item())
        self.assertTrue((scales[ordinary][:, :2].float().flatten() < 0.99 * steps[:, 0]).any())

    def test_an_artifact_written_here_is_read_by_the_engine(self):
        model = open_model()
        levels = prefix_levels(model)
        model.train_factors(levels)
        model.train_vectors()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.01)
        written = path("written.nested")
        model.write(written)
        self.addCleanup(shutil.rmtree, written)
        again = NestedModel(Artifact(written))
        for level, values in enumerate(engine_outputs(written)):
            again.set_level(level)
            with torch.no_grad():
                logits = again.logits(torch.tensor([TOKENS])).flatten()
            self.assertLess((logits - values).abs().max().item(), 1e-4 * values.abs().max().item())
        original = open_model()
        original.set_level(levels[0])
        again.set_level(levels[0])
        with torch.no_grad():
            tokens = torch.tensor([TOKENS])
            change = (again.logits(tokens) - original.logits(tokens)).abs().max().item()
        self.assertGreater(change, 1e-3)

    def test_what_is_no_artifact_is_refused(self):
        with self.assertRaisesRegex(ArtifactError, "nested.json: no such file"):
            Artifact(path("llama", "source"))
        copy = path("other_version")
        shutil.copytree(path("llama", "nested"), copy)
        self.addCleanup(shutil.rmtree, copy)
        description = json.loads((copy / "nested.json").read_text())
        description["version"] = 7
        (copy / "nested.json").write_text(json.dumps(description))
        with self.assertRaisesRegex(ArtifactError, "version: 7, expected 1"):
            Artifact(copy)

    def test_measured_qualities_are_put_into_the_artifact(self):
        copy = path("measured")
        shutil.copytree(path("llama", "nested"), copy)
        self.addCleanup(shutil.rmtree, copy)
        count = len(Artifact(copy).levels)
        program = fake_nestor(count)
        evaluate.measure(program, copy, path("llama", "text.txt"), 64)
        description = json.loads((copy / "nested.json").read_text())
        self.assertEqual(description["levels"][1]["metrics"]["quality"], 0.51)
        self.assertIsNone(description["levels"][1]["metrics"]["quality_vs_source"])
        self.assertEqual(len(engine_outputs(copy)), count)
        program.write_text("#!/bin/sh\necho no such text >&2\nexit 1\n")
        with self.assertRaisesRegex(RuntimeError, "nestor.sh evaluate .*: no such text"):
            evaluate.measure(program, copy, path("llama", "text.txt"), 64)


class Delta(unittest.TestCase):
    """The delta file, on both sides."""

    def setUp(self):
        self.model = open_model()
        self.levels = prefix_levels(self.model)
        add_random_delta(self.model)
        self.file = path("random.delta.safetensors")
        export_delta(self.model, self.levels, self.file)

    def take_stored_terms(self):
        """The model's terms are those of the file from here on, in 4 bits."""
        terms = delta.load(self.file, Artifact(path("llama", "nested")))
        for nested in self.model.nested:
            if nested.layer.name in terms:
                nested.delta_a.data, nested.delta_bt.data = terms[nested.layer.name]

    def test_it_says_what_it_was_trained_beside(self):
        stated = {
            name.removeprefix("calibration."): tensor
            for name, tensor in load_file(self.file).items()
            if name.startswith("calibration.")
        }
        self.assertEqual(set(stated), {"tokens", "lengths"})
        self.assertEqual(len(stated["tokens"]), stated["lengths"].sum())
        described = self.model.artifact.description["calibration"]
        self.assertEqual(len(stated["tokens"]), described["tokens"])
        for name, tensor in self.model.artifact.calibration().items():
            self.assertTrue(torch.equal(tensor, stated[name]), name)

    def test_terms_beside_factors_of_an_unknown_calibration_are_not_written(self):
        copy = path("uncalibrated")
        shutil.copytree(path("llama", "nested"), copy)
        self.addCleanup(shutil.rmtree, copy)
        (copy / "calibration.safetensors").unlink()
        model = NestedModel(Artifact(copy))
        add_random_delta(model)
        with self.assertRaisesRegex(ArtifactError, "calibration.safetensors: no such file"):
            export_delta(model, self.levels, path("unwritten.delta.safetensors"))
        self.assertFalse(path("unwritten.delta.safetensors").exists())

    def test_compress_applies_it_as_it_was_trained(self):
        out = path("with_delta.nested")
        fixture("delta", path("llama"), self.file, out)
        self.addCleanup(shutil.rmtree, out)
        applied = path("applied.nested")
        delta.apply(self.file, path("llama", "nested"), applied)
        self.addCleanup(shutil.rmtree, applied)
        tokens = torch.tensor([TOKENS])
        theirs, ours = (load_file(nested / "nested.safetensors") for nested in (out, applied))
        self.assertEqual(set(theirs), set(ours))
        for name, tensor in theirs.items():
            self.assertTrue(torch.equal(tensor, ours[name]), name)
        outputs, plain = engine_outputs(out), engine_outputs(path("llama", "nested"))
        self.take_stored_terms()
        for level in self.levels:
            self.model.set_level(level)
            with torch.no_grad():
                trained = self.model.logits(tokens).flatten()
            scale = trained.abs().max().item()
            self.assertLess((outputs[level] - trained).abs().max().item(), 1e-4 * scale)
            self.assertGreater((plain[level] - trained).abs().max().item(), 0.1 * scale)

    def test_factors_that_trained_are_all_that_a_level_runs(self):
        model = open_model()
        generator = torch.Generator().manual_seed(7)
        for nested in model.nested:
            for values in (nested.prefix_a, nested.prefix_bt):
                noise = torch.randn(values.shape, generator=generator)
                values.data *= 1 + 0.1 * noise
        file = path("factors.delta.safetensors")
        export_factors(model, self.levels, file)
        self.assertNotIn("calibration.tokens", load_file(file))
        out = path("with_factors.nested")
        fixture("delta", path("llama"), file, out)
        self.addCleanup(shutil.rmtree, out)
        outputs = engine_outputs(out)
        self.assertEqual(len(outputs), len(model.artifact.levels))
        tokens = torch.tensor([TOKENS])
        untrained = open_model()
        for level in self.levels:
            for each in (model, untrained):
                each.set_level(level)
            with torch.no_grad():
                trained, plain = (each.logits(tokens).flatten() for each in (model, untrained))
            error = (outputs[level] - trained).norm()
            self.assertLess(error.item(), 0.2 * (plain - trained).norm().item(), f"level {level}")

    def test_gar_levels_are_read_as_the_engine_runs_them(self):
        out = path("gar.nested")
        fixture("gar", path("llama"), self.file, out)
        self.addCleanup(shutil.rmtree, out)
        artifact = Artifact(out)
        self.assertLess(set(artifact.others()), set(artifact.tensors))
        self.assertFalse([name for name in artifact.others() if ".gar." in name])
        tokens = torch.tensor([TOKENS])
        outputs = engine_outputs(out)
        self.take_stored_terms()
        model = open_model()  # of the same source
        for level, (stated, values) in enumerate(zip(artifact.levels, outputs)):
            if stated.ladder == "prefix":
                self.assertIn("gar", stated.forms)
            for nested, form, rank in zip(model.nested, stated.forms, stated.ranks):
                nested.dense = artifact.weight(nested.layer, form, rank)
                nested.set_level("dense", 0)
            with torch.no_grad():
                logits = model.logits(tokens).flatten()
            scale = values.abs().max().item()
            self.assertLess((logits - values).abs().max().item(), 1e-4 * scale, f"level {level}")
            if level not in self.levels:
                continue
            self.model.set_level(level)
            with torch.no_grad():
                trained = self.model.logits(tokens).flatten()
            self.assertLess((trained - values).norm().item(), 0.05 * trained.norm().item())
        with self.assertRaisesRegex(ArtifactError, "is a gar pair, expected plain factors"):
            NestedModel(artifact)
        with self.assertRaisesRegex(ArtifactError, "is a gar pair"):
            delta.apply(self.file, out, path("not_written.nested"))
        self.assertFalse(path("not_written.nested").exists())

    def test_what_is_loaded_is_the_term_but_for_its_rounding(self):
        loaded = delta.load(self.file, Artifact(path("llama", "nested")))
        trained = {n.layer.name: n for n in self.model.nested if n.delta_rank > 0}
        self.assertEqual(set(loaded), set(trained))
        for name, (a, bt) in loaded.items():
            expected = trained[name].delta_bt.T @ trained[name].delta_a
            error = (bt.T @ a - expected).norm() / expected.norm()
            self.assertLess(error.item(), 0.15, name)  # 4 bits of both sides

    def test_its_size_is_as_planned(self):
        ranks = delta.largest_ranks(self.model.artifact, self.levels, 4000)
        size = delta.size_of(self.model.artifact, ranks)
        self.assertLessEqual(size, 4000)
        self.assertGreater(size, 2000)
        tensors = load_file(self.file)
        planned = delta.ranks_for(self.model.artifact, self.levels, 3)
        self.assertEqual(
            sum(
                tensor.numel() * tensor.element_size()
                for name, tensor in tensors.items()
                if not name.startswith("calibration.")
            ),
            delta.size_of(self.model.artifact, planned),
        )

    def test_what_does_not_fit_is_refused(self):
        artifact = Artifact(path("llama", "nested"))
        artifact.sha256 = "0" * 64
        with self.assertRaisesRegex(ArtifactError, "source_sha256: .*expected '000"):
            delta.load(self.file, artifact)
        with self.assertRaisesRegex(ArtifactError, "source_sha256"):
            delta.load(self.file, Artifact(path("bert", "nested")))
        artifact = Artifact(path("llama", "nested"))
        tensors = load_file(self.file)
        name = next(name for name in sorted(tensors) if name.endswith(".a"))

        def refusal(changed, version="3") -> str:
            damaged = path("damaged.safetensors")
            save_file(
                {k: t for k, t in (tensors | changed).items() if t is not None},
                damaged,
                {"format": "nestor-delta", "version": version, "source_sha256": artifact.sha256},
            )
            with self.assertRaises(ArtifactError) as caught:
                delta.load(damaged, artifact)
            return str(caught.exception)

        shape = list(tensors[name].shape)
        self.assertIn("version: '1', expected '3'", refusal({}, version="1"))
        self.assertIn(
            f"{name}: torch.uint8 {[shape[0], shape[1] - 1]}, expected torch.uint8 {shape}",
            refusal({name: tensors[name][:, :-1].contiguous()}),
        )
        self.assertIn("torch.bfloat16 ", refusal({name: tensors[name].to(torch.bfloat16)}))
        self.assertIn(f"{name}_scales: absent", refusal({f"{name}_scales": None}))
        infinite = tensors[f"{name}_scales"] * float("inf")
        self.assertIn("not finite", refusal({f"{name}_scales": infinite}))
        self.assertIn("other.a belongs to no layer", refusal({"other.a": tensors[name].clone()}))


class Training(unittest.TestCase):
    """The loop."""

    def setUp(self):
        self.work = pathlib.Path(tempfile.mkdtemp(dir=DIRECTORY.name))

    def quality(self, model, level) -> float:
        """KL to the full level on text that does not train."""
        text = Windows([path("llama", "text.txt")], load_tokenizer(model.artifact.directory), 32, 1)
        objective = FlexRank(self.teacher, [level])
        [batches] = text.held_out(8).values()
        model.set_level(level)
        return sum(objective.step(model, level, batches, 1.0, map)) / len(batches)

    def improvement(self, model, **settings) -> float:
        """The share of the lowest level's divergence that training takes away."""
        lowest = prefix_levels(model)[0]
        self.teacher = model.teacher()
        before = self.quality(model, lowest)
        model.zero_grad()
        trainer_of(model, self.work, **settings).run()
        return 1 - self.quality(model, lowest) / before

    def gradients(self, trains_term: bool, composes: bool):
        """Losses by level and gradients by name of one step at each prefix level."""
        model = open_model()
        levels = prefix_levels(model)
        if trains_term:
            generator = torch.Generator().manual_seed(1)
            for nested, rank in zip(model.nested, delta.ranks_for(model.artifact, levels, 4)):
                if rank > 0:
                    nested.add_delta(rank, generator)
                    with torch.no_grad():
                        nested.delta_bt.normal_(std=0.05, generator=generator)
        else:
            model.train_factors(levels)
        objective = FlexRank(model.teacher(), levels)
        if composes:
            model.compose(compiles=False)
        batches = [Batch(torch.tensor([TOKENS])), Batch(torch.tensor([TOKENS[::-1]]))]
        losses = [
            loss.item()
            for level in levels
            for loss in objective.step(model, level, batches, 0.5, map)
        ]
        return losses, {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }

    def test_composed_layers_learn_what_plain_ones_do(self):
        for trains_term in (False, True):
            losses, plain = self.gradients(trains_term, composes=False)
            composed_losses, composed = self.gradients(trains_term, composes=True)
            torch.testing.assert_close(composed_losses, losses, rtol=1e-5, atol=1e-6)
            self.assertEqual(composed.keys(), plain.keys())
            self.assertGreater(len(plain), 10)
            for name, gradient in plain.items():
                torch.testing.assert_close(composed[name], gradient, rtol=1e-3, atol=1e-5)

    def test_factors_improve_the_lowest_level_by_half(self):
        model = open_model()
        model.train_factors(prefix_levels(model))
        self.assertGreater(self.improvement(model, steps=60, learning_rate=1e-2), 0.5)

    def test_residual_factors_train_beside_a_middle_plane(self):
        model = open_model()
        levels = [
            i for i, level in enumerate(model.artifact.levels) if level.ladder == "residual"
        ]
        forms = [model.artifact.levels[i].forms for i in levels]
        self.assertTrue(any("middle" in of_level for of_level in forms))
        model.train_factors(levels)
        trained = [n for n, nested in enumerate(model.nested) if nested.residual_a.requires_grad]
        self.assertEqual(
            trained,
            [n for n in range(len(model.nested)) if any(f[n] == "residual" for f in forms)],
        )
        objective = FlexRank(model.teacher(), levels)
        for level, of_level in zip(levels, forms):
            model.zero_grad()
            model.set_level(level)
            [loss] = objective.step(model, level, [Batch(torch.tensor([TOKENS]))], 1.0, map)
            self.assertTrue(loss.isfinite())
            for n, nested in enumerate(model.nested):
                runs = of_level[n] == "residual" and model.artifact.levels[level].ranks[n] > 0
                gradient = nested.residual_a.grad
                has_one = gradient is not None and bool(gradient.any())
                self.assertEqual(has_one, runs, f"level {level}, layer {n}, {of_level[n]}")

    def test_a_delta_improves_the_lowest_level_by_a_quarter(self):
        model = open_model()
        ranks = delta.ranks_for(model.artifact, prefix_levels(model), 4)
        for nested, rank in zip(model.nested, ranks):
            if rank > 0:
                nested.add_delta(rank, torch.Generator().manual_seed(1))
        self.assertGreater(self.improvement(model, steps=60, learning_rate=1e-2, workers=2), 0.25)

    def test_a_run_that_resumes_ends_where_an_unbroken_one_does(self):
        unbroken = open_model()
        trainer_of(unbroken, self.work / "a", steps=10).run()
        first = trainer_of(open_model(), self.work / "b", steps=10)
        for _ in range(5):
            first._one_step()  # pylint: disable=protected-access
        first.save()
        second = open_model()
        trainer = trainer_of(second, self.work / "b", steps=10)
        self.assertTrue(trainer.resume())
        self.assertEqual(trainer.step, 5)
        trainer.run()
        for a, b in zip(unbroken.parameters(), second.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def test_a_diverging_loss_stops_and_keeps_the_last_good_state(self):
        model = open_model()
        trainer = trainer_of(model, self.work, steps=30, learning_rate=1e-3, checkpoint_steps=2)
        for _ in range(4):
            trainer._one_step()  # pylint: disable=protected-access
        trainer.save()
        good = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        with torch.no_grad():
            for parameter in trainer.parameters.values():
                parameter.mul_(30)
        with self.assertRaisesRegex(Diverged, "diverges; stopped, the last good state is .*checkp"):
            trainer.run()
        lines = (self.work / "log.jsonl").read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines]
        self.assertTrue(entries[-1]["diverged"])
        state = torch.load(trainer.checkpoint_path, weights_only=True)["parameters"]
        for name, value in good.items():
            torch.testing.assert_close(state[name], value)

    def test_a_loss_that_is_no_number_stops(self):
        model = open_model()
        trainer = trainer_of(model, self.work)
        with torch.no_grad():
            next(iter(trainer.parameters.values())).fill_(float("nan"))
        with self.assertRaisesRegex(Diverged, "before the first checkpoint"):
            trainer.run()

    def test_terms_start_with_the_steepest_inputs_of_one_variance(self):
        model = open_model()
        nested = next(n for n in model.nested if n.layer.prefix_rank >= 16)
        nested.add_delta(2, torch.Generator().manual_seed(1))
        nested.set_level("prefix", nested.layer.prefix_rank)
        # Inputs of very different energies; the loss depends on two of their directions alone.
        scales = torch.logspace(-0.5, 0.5, nested.layer.in_)
        x = torch.randn(20000, nested.layer.in_) * scales
        steep = torch.randn(2, nested.layer.in_) / scales
        nested.gather_gradients()
        z = x @ steep.T
        grads = z @ torch.randn(2, nested.layer.out)
        (nested(x) * grads).sum().backward()
        nested.start_delta()
        self.assertEqual(nested.delta_bt.abs().max().item(), 0)
        started = x @ nested.delta_a.detach().T
        correlation = torch.linalg.lstsq(started, z).solution
        residual = (z - started @ correlation).square().mean() / z.square().mean()
        self.assertLess(residual.item(), 0.05)
        energy = (x @ nested.dense.T).square().mean().item()
        for variance in started.square().mean(0).tolist():
            self.assertAlmostEqual(variance / energy, 1.0, delta=0.1)

    def test_the_start_of_terms_changes_nothing_yet(self):
        model = open_model()
        levels = prefix_levels(model)
        for nested, rank in zip(model.nested, delta.ranks_for(model.artifact, levels, 4)):
            if rank > 0:
                nested.add_delta(rank, torch.Generator().manual_seed(1))
        tokens = torch.tensor([TOKENS])
        model.set_level(levels[0])
        with torch.no_grad():
            before = model.logits(tokens)
        random_start = {id(n): n.delta_a.detach().clone() for n in model.nested if n.delta_rank}
        trainer_of(model, self.work).start_terms(3)
        model.set_level(levels[0])
        with torch.no_grad():
            torch.testing.assert_close(model.logits(tokens), before)
        changed = [
            not torch.allclose(n.delta_a, random_start[id(n)]) for n in model.nested if n.delta_rank
        ]
        self.assertTrue(all(changed))

    def test_recomputed_blocks_give_the_same_gradients(self):
        grads = []
        for recomputes in (False, True):
            model = open_model()
            levels = prefix_levels(model)
            model.train_factors(levels)
            objective = FlexRank(model.teacher(), levels)
            if recomputes:
                model.checkpoint_activations()
            objective.step(model, levels[0], [Batch(torch.tensor([TOKENS]))], 1.0, map)
            grads.append([p.grad for p in model.parameters() if p.grad is not None])
        self.assertEqual(len(grads[0]), len(grads[1]))
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    def test_norms_train_and_leave_the_teacher_alone(self):
        model = open_model()
        levels = prefix_levels(model)
        model.train_factors(levels)
        model.train_vectors()
        teacher = model.teacher()
        tokens = torch.tensor([TOKENS])
        with torch.no_grad():
            before = teacher.logits(tokens)
        norm = model.model.model.norm.weight
        old = norm.detach().clone()
        trainer_of(model, self.work, steps=3).run()
        self.assertGreater((norm - old).abs().max().item(), 1e-4)
        with torch.no_grad():
            torch.testing.assert_close(teacher.logits(tokens), before)

    def test_an_encoder_learns_the_full_levels_embeddings(self):
        model = open_model("bert")
        levels = prefix_levels(model)
        model.train_factors(levels)
        tokenizer = load_tokenizer(model.artifact.directory)
        text = Sentences([path("bert", "text.txt")], tokenizer, 48, 1)
        teacher = model.teacher()
        judge = Judge(teacher, text.held_out(32))
        before = judge.qualities(model, [levels[0]])
        objective = Embeddings(teacher, levels)
        [held_out] = text.held_out(32).values()
        first = sum(objective.step(model, levels[0], held_out, 1.0, map))
        model.zero_grad()
        settings = Settings(levels=levels, steps=40, batch=16, micro_batch=16, learning_rate=3e-3)
        Trainer(
            model, text, objective, SAMPLERS["uniform"](levels, 1), judge, settings, self.work
        ).run()
        self.assertLess(sum(objective.step(model, levels[0], held_out, 1.0, map)), 0.85 * first)
        after = judge.qualities(model, [levels[0]])
        name = str(path("bert", "text.txt"))
        self.assertGreater(after[name][levels[0]], before[name][levels[0]])

    def test_the_rate_warms_up_and_falls_to_its_last_share(self):
        settings = Settings(levels=[0], learning_rate=1.0, warm_up=10)
        self.assertAlmostEqual(learning_rate_at(settings, 0, 0.0), 0.1)
        self.assertAlmostEqual(learning_rate_at(settings, 9, 0.0), 1.0)
        self.assertAlmostEqual(learning_rate_at(settings, 500, 0.5), 0.525)
        self.assertAlmostEqual(learning_rate_at(settings, 999, 1.0), 0.05)


class Sampling(unittest.TestCase):
    """Of levels and of text."""

    def test_uniform_draws_permutations(self):
        sampler = SAMPLERS["uniform"]([4, 5, 6, 6], seed=2)
        drawn = [level for step in range(6) for level in sampler.draw(step, 2, 0.0)]
        for turn in range(3):
            self.assertEqual(sorted(drawn[4 * turn : 4 * turn + 4]), [4, 5, 6, 6])
        self.assertNotEqual(drawn[:4], drawn[4:8] if drawn[:4] != drawn[4:8] else drawn[8:])

    def test_sandwich_has_both_ends_in_every_step(self):
        sampler = SAMPLERS["sandwich"]([2, 3, 4, 5], seed=2)
        for step in range(8):
            levels = sampler.draw(step, 4, 0.0)
            self.assertEqual(levels[:2], [2, 5])
            self.assertEqual(len(levels), 4)

    def test_a_curriculum_begins_with_the_dearest_level(self):
        sampler = SAMPLERS["curriculum"]([2, 3, 4], seed=2)
        self.assertEqual(set(sampler.draw(0, 20, 0.0)), {4})
        self.assertEqual(set(sampler.draw(0, 40, 0.3)), {3, 4})
        self.assertEqual(set(sampler.draw(0, 60, 0.7)), {2, 3, 4})

    def test_windows_cover_a_text_once_in_an_epoch_and_spare_what_is_held_out(self):
        file = path("numbers.txt")
        file.write_text("".join(chr(97 + i % 26) for i in range(2000)))
        tokenizer = load_tokenizer(path("llama", "nested"))
        windows = Windows([file], tokenizer, 32, 1)
        per_epoch = (len(windows.texts[0]) - 32) // 32
        seen = [tuple(windows.batch(i, 1).tokens[0].tolist()) for i in range(per_epoch)]
        self.assertEqual(len(seen), per_epoch)
        begins = sorted(windows._order(0, 0, per_epoch))  # pylint: disable=protected-access
        self.assertEqual(begins, list(range(per_epoch)))
        [held_out] = windows.held_out(3).values()
        self.assertEqual(held_out[0].tokens.shape, (3, 32))
        self.assertTrue(torch.equal(windows.batch(7, 3).tokens, windows.batch(7, 3).tokens))

    def test_texts_that_do_not_serve_are_refused(self):
        tokenizer = load_tokenizer(path("llama", "nested"))
        short = path("short.txt")
        short.write_text("too short")
        with self.assertRaisesRegex(DataError, "short.txt: 9 tokens; expected at least 96"):
            Windows([short], tokenizer, 32, 1)
        with self.assertRaisesRegex(DataError, "absent.txt"):
            Windows([path("absent.txt")], tokenizer, 32, 1)
        binary = path("binary.txt")
        binary.write_bytes(b"\xff\xfe\x00")
        with self.assertRaisesRegex(DataError, "binary.txt"):
            Windows([binary], tokenizer, 32, 1)

    def test_a_long_text_is_encoded_in_pieces(self):
        tokenizer = load_tokenizer(path("llama", "nested"))
        counted = mock.Mock(wraps=tokenizer)
        text = path("llama", "text.txt")
        whole = Windows([text], tokenizer, 32, 1)
        with mock.patch.object(data, "PIECE", 100):
            pieces = Windows([text], counted, 32, 1)
        self.assertGreater(len(counted.encode_batch.call_args.args[0]), 10)
        self.assertTrue(torch.equal(whole.texts[0], pieces.texts[0]))

    def test_the_full_level_writes_text(self):
        model = open_model()
        model.model.generation_config.use_cache = False  # as some checkpoints say
        tokenizer = load_tokenizer(model.artifact.directory)
        starts = Windows([path("llama", "text.txt")], tokenizer, 32, 1)
        written = sampling._write(model, _begins(model, starts, 3, 1), 32)
        self.assertEqual([len(row) for row in written], [32] * 3)
        self.assertEqual([row[:4] for row in written], starts.batch(0, 3).tokens[:, :4].tolist())
        file = path("sampled.txt")
        sample_text(model, starts, 32 * 7, file, batch=4)
        self.assertGreater(len(file.read_text(errors="replace")), 100)
        with self.assertRaisesRegex(DataError, "windows of 4 tokens: expected more than 4"):
            sample_text(model, mock.Mock(length=4), 100, file)

    def test_every_second_window_answers_a_question(self):
        model = open_model()
        directory = path("chat.nested")
        shutil.copytree(model.artifact.directory, directory)
        self.addCleanup(shutil.rmtree, directory)

        def set_template(template):
            (directory / "tokenizer_config.json").write_text(
                json.dumps(
                    {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
                )
            )

        set_template("<user>{{ messages[0]['content'] }}<assistant>")
        model.artifact.directory = directory
        tokenizer = load_tokenizer(directory)
        starts = Windows([path("llama", "text.txt")], tokenizer, 256, 1)
        begins = _begins(model, starts, 9, 1)
        words = starts.batch(0, 9).tokens[:, :4].tolist()
        self.assertEqual(begins[::2], words[::2])
        for asked in begins[1::2]:
            text = tokenizer.decode(asked, skip_special_tokens=False)
            self.assertRegex(text, "<user>.*[.?]<assistant>")
        # Two of four answers stand alone, whatever the rounds.
        file = path("answered.txt")
        for batch in (2, 3, 8):
            with mock.patch.object(sampling, "_write", lambda _, begins, length: begins):
                sample_text(model, starts, 256 * 9, file, batch=batch)
            self.assertEqual(file.read_text(errors="replace").count("<assistant>"), 2)
        self.assertEqual(_begins(model, mock.Mock(length=20, batch=starts.batch), 9, 1), words)
        set_template("{{ raise_exception('no user') }}")
        with self.assertRaisesRegex(DataError, "chat.nested: its tokenizer's chat template"):
            _begins(model, starts, 9, 1)

    def test_rows_follow_what_they_begin_with(self):
        follow = _Follow([[1, 2, 3], [1], [1], [1, 2]], "cpu")
        scores = torch.randn(4, 8)
        temperatures = torch.tensor([[0.6], [0.6], [1.0], [1.0]])
        held = follow(torch.ones(4, 1, dtype=torch.long), scores)
        for row in (0, 3):
            self.assertEqual(held[row].argmax().item(), 2)
            self.assertEqual(held[row].isfinite().sum().item(), 1)
        torch.testing.assert_close(held[1:3], (scores / temperatures)[1:3])
        free = follow(torch.ones(4, 3, dtype=torch.long), scores)
        torch.testing.assert_close(free, scores / temperatures)

    def test_a_roomy_cache_holds_what_was_put_into_it(self):
        layer = _RoomyLayer(10)
        states = [torch.randn(2, 3, 10, 4) for _ in range(2)]
        for begin, end in ((0, 4), (4, 5), (5, 10)):
            held = layer.update(*(whole[:, :, begin:end] for whole in states))
            for found, whole in zip(held, states):
                self.assertTrue(torch.equal(found, whole[:, :, :end]))
            self.assertEqual(layer.get_seq_length(), end)

    def test_spearman_is_that_of_ranks(self):
        a = torch.tensor([0.1, 0.4, 0.2, 0.9])
        self.assertAlmostEqual(spearman(a, a.exp()), 1.0, places=6)
        self.assertAlmostEqual(spearman(a, -a), -1.0, places=6)


class CommandLine(unittest.TestCase):
    """The program as a person runs it."""

    def run_main(self, *arguments) -> int:
        return main([str(argument) for argument in arguments])

    def run_on_llama(self, out, *options) -> int:
        """Trains the tiny Llama on its text."""
        text = path("llama", "text.txt")
        common = ("--text", text, "--length", 32, "--out", out)
        return self.run_main(path("llama", "nested"), *common, *options)

    def test_a_delta_is_trained_and_exported_anew_from_its_checkpoint(self):
        out = path("command.delta.safetensors")
        size = ("--delta-bytes", 20000)
        self.assertEqual(self.run_on_llama(out, *size, "--steps", 3, "--held-out", 2), 0)
        first = load_file(out)
        self.assertTrue(first)
        out.unlink()
        self.assertEqual(self.run_on_llama(out, *size, "--export-only"), 0)
        for name, tensor in load_file(out).items():
            torch.testing.assert_close(tensor, first[name])

    def started(self, out, start, *options) -> int:
        """Goes on from a delta, so slowly that nothing changes."""
        slowly = ("--steps", 1, "--held-out-steps", 0, "--learning-rate", 1e-12)
        return self.run_on_llama(out, *slowly, "--start", start, *options)

    def products(self, file):
        """What each layer's term computes."""
        terms = delta.load(file, Artifact(path("llama", "nested")))
        return {name: bt.T @ a for name, (a, bt) in terms.items()}

    def test_a_run_starts_from_the_terms_of_another(self):
        model = open_model()
        add_random_delta(model)
        start, out = path("start.delta.safetensors"), path("went_on.delta.safetensors")
        export_delta(model, prefix_levels(model), start)
        self.assertEqual(self.started(out, start), 0)
        found, expected = self.products(out), self.products(start)
        self.assertEqual(found.keys(), expected.keys())
        for name, product in expected.items():
            # Codes of 4 bits, rounded once more.
            error = (found[name] - product).norm() / product.norm()
            self.assertLess(error.item(), 0.15, name)

    def test_a_run_starts_from_the_factors_of_another(self):
        model = open_model()
        levels = prefix_levels(model)
        generator = torch.Generator().manual_seed(5)
        for nested in model.nested:
            nested.prefix_bt.data.normal_(generator=generator)
        start, out = path("start.factors.safetensors"), path("went_on.factors.safetensors")
        export_factors(model, levels, start)
        self.assertEqual(self.started(out, start, "--train", "factors"), 0)
        found, expected = load_file(out), load_file(start)
        self.assertEqual(found.keys(), expected.keys())
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor)

    def test_a_checkpoint_of_another_start_is_refused(self):
        model = open_model()
        add_random_delta(model)
        start, out = path("one.delta.safetensors"), path("from_one.delta.safetensors")
        export_delta(model, prefix_levels(model), start)
        self.assertEqual(self.started(out, start), 0)
        self.assertEqual(self.started(out, start), 0)  # goes on, and is done
        self.assertEqual(self.started(out, out), 1)

    def test_factors_that_levels_run_further_than_they_reach_are_refused(self):
        model = open_model()
        levels = prefix_levels(model)
        start = path("short.factors.safetensors")
        export_factors(model, levels[:1], start)  # of the cheapest level alone
        out = path("unwritten.factors.safetensors")
        self.assertEqual(self.started(out, start, "--train", "factors"), 1)
        self.assertFalse(out.exists())

    def test_a_start_that_does_not_fit_is_refused(self):
        model = open_model()
        add_random_delta(model)
        start = path("other.delta.safetensors")
        export_delta(model, prefix_levels(model), start)
        options = ["artifact", "--text", "t", "--out", "o", "--steps", "1", "--start", str(start)]
        wrong = parse([*options, "--train", "factors", "--out", "o.safetensors"])
        with self.assertRaisesRegex(UsageError, "holds terms; expected --train delta"):
            start_from(model, wrong, [0])
        tensors, metadata = load_file(start), read_metadata(start)
        tensors["calibration.tokens"] = tensors["calibration.tokens"].flip(0)
        save_file(tensors, start, metadata)
        with self.assertRaisesRegex(UsageError, "another calibration than"):
            start_from(model, parse(options), [0])
        self.assertEqual(self.started(path("unwritten.safetensors"), start), 1)
        start.write_bytes(b"no safetensors")
        self.assertEqual(self.started(path("unwritten.safetensors"), start), 1)
        self.assertEqual(self.started(path("unwritten.safetensors"), path("absent")), 1)

    def test_an_artifact_is_written_and_measured(self):
        out = path("command.nested")
        count = len(Artifact(path("llama", "nested")).levels)
        common = (path("llama", "nested"), "--text", path("llama", "text.txt"), "--out", out)
        options = ("--length", 32, "--train", "all", "--steps", 2, "--sampler", "sandwich")
        more = ("--objective", "nsn", "--held-out", 2, "--nestor", fake_nestor(count))
        self.assertEqual(self.run_main(*common, *options, *more), 0)
        description = json.loads((out / "nested.json").read_text())
        self.assertEqual(description["levels"][0]["metrics"]["quality"], 0.5)
        self.assertEqual(len(engine_outputs(out)), count)
        self.assertFalse(out.with_name("command.nested.unmeasured").exists())

    def test_wrong_options_are_refused(self):
        common = ["artifact", "--text", "t", "--out", str(path("none"))]
        for arguments, said in (
            ([], "--steps or --minutes"),
            (["--steps", "0"], "--steps: must be positive; was 0"),
            (["--steps", "1", "--batch", "7"], "--batch: 7 is no multiple"),
            (["--steps", "1", "--train", "all", "--nestor", "/no/such"], "--nestor: /no/such"),
            (["--steps", "1", "--train", "all", "--out", "x.safetensors"], "no norms and biases"),
        ):
            with self.assertRaisesRegex(UsageError, said):
                parse(common + arguments)
        self.assertEqual(self.run_main(path("absent"), *common[1:], "--steps", 1), 1)
        self.assertEqual(self.run_on_llama(path("x"), "--steps", 1, "--levels", "0.01"), 1)


if __name__ == "__main__":
    unittest.main()
