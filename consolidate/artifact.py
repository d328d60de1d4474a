"""Reads and writes nested artifacts (docs/artifact_format.md), and quantises as compress/ does."""

import dataclasses
import hashlib
import json
import pathlib
import shutil

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

GROUP = 32
FORMS = ("dense", "residual", "middle", "prefix", "gar")
LARGEST_FACTOR_CODE = 127
LARGEST_TERM_CODE = 7
CLIPPED_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a group's extreme that a scale may reach
CALIBRATION_FILE = "calibration.safetensors"


class ArtifactError(ValueError):
    """Names the file and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Layer:
    name: str
    out: int
    in_: int
    residual_rank: int
    prefix_rank: int


@dataclasses.dataclass(frozen=True)
class Level:
    ladder: str
    forms: tuple[str, ...]
    ranks: tuple[int, ...]
    relative_flops: float
    relative_cost: float


def groups_of(size: int) -> int:
    return (size + GROUP - 1) // GROUP


def padded(size: int) -> int:
    return GROUP * groups_of(size)


def _grouped(values: torch.Tensor) -> torch.Tensor:
    """[rows, size] to [rows, groups, 32], padded with zeros."""
    rows, size = values.shape
    return torch.nn.functional.pad(values, (0, padded(size) - size)).view(rows, -1, GROUP)


def quantise_factor(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rank, size] to int8 codes [rank, padded] and bf16 scales [rank, groups], bit for bit as
    QuantiseFactor does."""
    grouped = _grouped(values.detach().float().cpu())
    scales = (grouped.abs().amax(-1) / LARGEST_FACTOR_CODE).to(torch.bfloat16)
    divisor = scales.float().unsqueeze(-1)
    codes = torch.where(divisor == 0, torch.zeros(()), grouped / divisor)
    codes = codes.round().clamp(-LARGEST_FACTOR_CODE, LARGEST_FACTOR_CODE).to(torch.int8)
    return codes.flatten(1), scales


def quantise_term(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rank, size] to codes of 4 bits [rank, padded / 2], laid out as a coarse plane is, and bf16
    scales [rank, groups], each the one of several with the least squared error."""
    grouped = _grouped(values.detach().float().cpu())
    best_error = torch.full(grouped.shape[:2], torch.inf)
    best_scales = torch.zeros(grouped.shape[:2], dtype=torch.bfloat16)
    best_codes = torch.zeros_like(grouped)
    for share in CLIPPED_SHARES:
        scales = (share * grouped.abs().amax(-1) / LARGEST_TERM_CODE).to(torch.bfloat16)
        divisor = scales.float().unsqueeze(-1)
        codes = torch.where(divisor == 0, torch.zeros(()), grouped / divisor)
        codes = codes.round().clamp(-LARGEST_TERM_CODE, LARGEST_TERM_CODE)
        error = (codes * divisor - grouped).square().sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        best_codes = torch.where(better.unsqueeze(-1), codes, best_codes)
    offset = (best_codes.flatten(1) + 8).to(torch.uint8)
    return offset[:, 0::2] | offset[:, 1::2] << 4, best_scales


def term_codes(packed: torch.Tensor) -> torch.Tensor:
    """The int8 codes [rank, padded] of codes of 4 bits: with their scales a factor's."""
    return _nibbles(packed).to(torch.int8)


def dequantise_factor(codes: torch.Tensor, scales: torch.Tensor, size: int) -> torch.Tensor:
    """The [rank, size] floats of int8 codes and their scales."""
    values = codes.float().view(codes.shape[0], -1, GROUP) * scales.float().unsqueeze(-1)
    return values.flatten(1)[:, :size].contiguous()


def _nibbles(plane: torch.Tensor) -> torch.Tensor:
    """Codes of a plane [m, p / 2] as floats [m, p]: input 2j is in the low nibble."""
    low, high = plane & 15, plane >> 4
    return torch.stack((low, high), -1).flatten(1).float() - 8


class Artifact:
    """An artifact in its directory: what nested.json says, and the parts of every layer as floats.

    Raises ArtifactError for a directory that holds no artifact of a known version.
    """

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        path = self.directory / "nested.json"
        if not path.is_file():
            raise ArtifactError(f"{path}: no such file; expected an artifact of nestor compress")
        try:
            self.description = json.loads(path.read_text())
        except ValueError as error:
            raise ArtifactError(f"{path}: {error}") from None
        for key, expected in (("format", "nestor-nested"), ("version", 1), ("group_size", GROUP)):
            value = self.description.get(key)
            if value != expected:
                raise ArtifactError(f"{path}: {key}: {value!r}, expected {expected!r}")
        self.layers = [
            Layer(x["name"], x["out"], x["in"], x["residual_rank"], x["prefix_rank"])
            for x in self.description["layers"]
        ]
        self.levels = [
            Level(
                x["ladder"],
                tuple(x["forms"]),
                tuple(x["ranks"]),
                x["relative_flops"],
                x["relative_cost"],
            )
            for x in self.description["levels"]
        ]
        for i, level in enumerate(self.levels):
            unknown = set(level.forms) - set(FORMS)
            if unknown:
                raise ArtifactError(
                    f"{path}: levels[{i}].forms: {sorted(unknown)[0]!r}, "
                    f"expected one of {', '.join(FORMS)}"
                )
        self.sha256 = self.description["source"]["sha256"]
        self.tensors = load_file(self.directory / "nested.safetensors")

    @property
    def is_encoder(self) -> bool:
        return json.loads((self.directory / "config.json").read_text())["model_type"] == "bert"

    def _scaled(self, layer: Layer, codes: torch.Tensor) -> torch.Tensor:
        scales = self.tensors[f"{layer.name}.scales"].float().unsqueeze(-1)
        values = codes.view(layer.out, -1, GROUP) * scales
        return values.flatten(1)[:, : layer.in_].contiguous()

    def dense(self, layer: Layer) -> torch.Tensor:
        """The full weight [out, in]."""
        if self.description["dtype"] == "bf16":
            return self.tensors[f"{layer.name}.dense"].float()
        coarse = _nibbles(self.tensors[f"{layer.name}.coarse"])
        fine = _nibbles(self.tensors[f"{layer.name}.fine"])
        return self._scaled(layer, 16 * coarse + fine)

    def coarse(self, layer: Layer) -> torch.Tensor:
        """The coarse plane [out, in]."""
        return self._scaled(layer, 16 * _nibbles(self.tensors[f"{layer.name}.coarse"]))

    def middle(self, layer: Layer) -> torch.Tensor:
        """The coarse and the middle plane together [out, in]."""
        packed = self.tensors[f"{layer.name}.middle"]
        codes = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(1).float()
        coarse = _nibbles(self.tensors[f"{layer.name}.coarse"])
        return self._scaled(layer, 16 * coarse + 4 * codes - 6)

    def factors(self, layer: Layer, form: str) -> tuple[torch.Tensor, torch.Tensor]:
        """a [R, in] and bt [R, out] of a layer, R its stored rank (0 rows where it has none).
        ArtifactError for the prefix of a layer that is a gar pair on some level."""
        if form == "prefix":
            self.check_has_no_gar(layer)
        return self._pair(f"{layer.name}.{form}.", layer.in_, layer.out)

    def weight(self, layer: Layer, form: str, rank: int) -> torch.Tensor:
        """The matrix [out, in] that a form and a rank stand for."""
        if form == "dense":
            return self.dense(layer)
        if form == "middle":
            return self.middle(layer)
        if form == "gar":
            return self._gar(layer, rank)
        a, bt = self._pair(f"{layer.name}.{form}.", layer.in_, layer.out)
        product = bt[:rank].T @ a[:rank]
        return product if form == "prefix" else self.coarse(layer) + product

    def _gar(self, layer: Layer, rank: int) -> torch.Tensor:
        """z = A x and B z, each in its place of the outputs."""
        stem = f"{layer.name}.gar.{rank}."
        a, bt = self._pair(stem, layer.in_, layer.out - rank)
        weight = torch.empty(layer.out, layer.in_)
        weight[self.tensors[f"{stem}rows"].long()] = torch.cat((a, bt.T @ a))
        return weight

    def _pair(self, stem: str, in_: int, out: int) -> tuple[torch.Tensor, torch.Tensor]:
        if f"{stem}a" not in self.tensors:
            return torch.zeros(0, in_), torch.zeros(0, out)
        return tuple(
            dequantise_factor(self.tensors[stem + part], self.tensors[f"{stem}{part}_scales"], size)
            for part, size in (("a", in_), ("bt", out))
        )

    def check_has_no_gar(self, layer: Layer):
        """ArtifactError where a layer is a gar pair on some level."""
        for i, level in enumerate(self.levels):
            if level.forms[self.layers.index(layer)] == "gar":
                raise ArtifactError(
                    f"{self.directory / 'nested.json'}: levels[{i}]: {layer.name} is a gar pair, "
                    "expected plain factors: compress with --gar-levels later"
                )

    def bias(self, layer: Layer):
        return self.tensors.get(f"{layer.name}.bias")

    def calibration(self) -> dict[str, torch.Tensor]:
        """What the factors were calibrated on: `tokens` of all sequences one after the other, and
        their `lengths`. ArtifactError where that is not there."""
        path = self.directory / CALIBRATION_FILE
        if not path.is_file():
            raise ArtifactError(
                f"{path}: no such file; expected of an artifact that terms are trained beside: "
                "compress it anew with --gar-levels later --refit-tokens 0"
            )
        return load_file(path)

    def others(self) -> dict[str, torch.Tensor]:
        """What the model reads beside its linear layers, by checkpoint name."""
        stems = {layer.name for layer in self.layers}
        parts = (".dense", ".coarse", ".fine", ".middle", ".scales", ".bias")

        def is_part(name):
            stem = name.split(".residual.")[0].split(".prefix.")[0].split(".gar.")[0]
            return stem in stems or any(
                name.endswith(part) and name[: -len(part)] in stems for part in parts
            )

        return {name: tensor for name, tensor in self.tensors.items() if not is_part(name)}

    def write(self, directory, tensors: dict[str, torch.Tensor], description=None):
        """Writes a copy with `tensors` in place of its own, by way of DIRECTORY.partial."""
        directory = pathlib.Path(directory)
        if directory.exists():
            raise ArtifactError(f"{directory}: exists already")
        partial = directory.with_name(directory.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(
            self.directory,
            partial,
            ignore=shutil.ignore_patterns("nested.json", "nested.safetensors", CALIBRATION_FILE),
        )
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, partial / "nested.safetensors")
        described = dict(self.description if description is None else description)
        described["checksums"] = {
            name: hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in sorted(tensors.items())
        }
        (partial / "nested.json").write_text(json.dumps(described, indent=1, sort_keys=True))
        partial.rename(directory)


def read_metadata(path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}
