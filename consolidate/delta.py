"""The delta file: low-rank terms in the layers' own input and output spaces, or whole factors in
their place, and the profiles that they were trained for (docs/ladders.md)."""

import json
import os

import torch
from safetensors.torch import load_file, save_file

from consolidate.artifact import (
    Artifact,
    ArtifactError,
    Layer,
    dequantise_factor,
    groups_of,
    padded,
    quantise_factor,
    quantise_term,
    read_metadata,
    term_codes,
)

FORMAT = "nestor-delta"
VERSION = "3"
CALIBRATION = "calibration."  # what the tensors' names begin with that state one

# Of the components that the cheapest level runs, a term takes the place of one in so many at most.
COMPONENTS_PER_TERM_COMPONENT = 3


def ranks_for(artifact: Artifact, levels: list[int], rank: int) -> list[int]:
    """Components of each layer's term: `rank`, less where a level's own rank is small, none where
    the layer is dense at all of `levels`, and none for a head, whose outputs would fill the file.
    """
    ranks = []
    head = None if artifact.is_encoder else len(artifact.layers) - 1
    for i in range(len(artifact.layers)):
        runs = [
            artifact.levels[level].ranks[i]
            for level in levels
            if artifact.levels[level].forms[i] == "prefix"
        ]
        most = min(runs) // COMPONENTS_PER_TERM_COMPONENT if runs and i != head else 0
        ranks.append(min(rank, most))
    return ranks


def largest_ranks(artifact: Artifact, levels: list[int], limit: int) -> list[int]:
    """ranks_for the largest rank whose terms take at most `limit` bytes."""
    rank = 0
    while rank < 256 and size_of(artifact, ranks_for(artifact, levels, rank + 1)) <= limit:
        rank += 1
    return ranks_for(artifact, levels, rank)


def size_of(artifact: Artifact, ranks: list[int]) -> int:
    """Bytes of the terms of these ranks: codes of 4 bits with their padding, and scales."""

    def of_component(size: int) -> int:
        return padded(size) // 2 + 2 * groups_of(size)

    return sum(
        rank * (of_component(layer.out) + of_component(layer.in_))
        for rank, layer in zip(ranks, artifact.layers)
    )


def _balanced(a: torch.Tensor, bt: torch.Tensor):
    """The same sum of components, in the order of their size and with equal norms on both sides."""
    qa, ra = torch.linalg.qr(a.double().T)
    qb, rb = torch.linalg.qr(bt.double().T)
    u, s, vt = torch.linalg.svd(rb @ ra.T)
    root = s.sqrt()
    return ((qa @ vt.T) * root).T, ((qb @ u) * root).T


def save(
    path, artifact: Artifact, levels: list[int], terms: dict[str, tuple], keeps_components=False
):
    """Writes the terms (a [k, in], bt [k, out] by layer name) in 4 bits, by way of PATH.partial.
    Terms that are whole factors, of which a level may run a prefix, keep their components as they
    are, in int8 as an artifact has them. Beside others goes what the artifact was calibrated on,
    since they fit what its factors leave out."""
    tensors = {}
    quantise = quantise_factor if keeps_components else quantise_term
    for name, (a, bt) in terms.items():
        if a.shape[0] == 0:
            continue
        a, bt = a.detach().cpu(), bt.detach().cpu()
        if not keeps_components:
            a, bt = _balanced(a, bt)
        for part, values in (("a", a), ("bt", bt)):
            stem = f"{name}.{part}"
            tensors[stem], tensors[f"{stem}_scales"] = quantise(values)
    profiles = [
        {
            "relative_flops": artifact.levels[level].relative_flops,
            "forms": artifact.levels[level].forms,
            "ranks": artifact.levels[level].ranks,
        }
        for level in sorted(levels, key=lambda level: artifact.levels[level].relative_flops)
    ]
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "source_sha256": artifact.sha256,
        "layers": json.dumps([layer.name for layer in artifact.layers], separators=(",", ":")),
        "levels": json.dumps(profiles, separators=(",", ":")),
    }
    if not keeps_components:  # whole factors leave nothing to those that are calibrated
        calibration = artifact.calibration()
        tensors |= {CALIBRATION + name: tensor for name, tensor in calibration.items()}
    partial = f"{path}.partial"
    save_file(tensors, partial, metadata)
    os.replace(partial, path)


def load(path, artifact: Artifact) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The terms (a, bt as floats) by layer name. ArtifactError where the delta was made for
    another checkpoint or does not fit."""
    stored = _stored(path, artifact)
    sizes = {layer.name: (layer.in_, layer.out) for layer in artifact.layers}
    return {
        name: tuple(dequantise_factor(*part, size) for part, size in zip(term, sizes[name]))
        for name, term in stored.items()
    }


def calibration(path) -> dict[str, torch.Tensor]:
    """What the factors beside its terms were calibrated on, as Artifact.calibration; empty for
    whole factors."""
    return {
        name.removeprefix(CALIBRATION): tensor
        for name, tensor in load_file(path).items()
        if name.startswith(CALIBRATION)
    }


def _stored(path, artifact: Artifact) -> dict[str, tuple[tuple, tuple]]:
    """The codes and scales of a, and those of bt, by layer name."""
    metadata = read_metadata(path)
    for key, expected in (
        ("format", FORMAT),
        ("version", VERSION),
        ("source_sha256", artifact.sha256),
    ):
        if metadata.get(key) != expected:
            raise ArtifactError(f"{path}: {key}: {metadata.get(key)!r}, expected {expected!r}")
    tensors = {
        name: tensor
        for name, tensor in load_file(path).items()
        if not name.startswith(CALIBRATION)
    }
    terms = {}
    for layer in artifact.layers:
        if f"{layer.name}.a" in tensors:
            terms[layer.name] = _take_term(path, tensors, layer)
    if tensors:
        raise ArtifactError(
            f"{path}: tensor {sorted(tensors)[0]} belongs to no layer of {artifact.directory}"
        )
    return terms


def _take_term(path, tensors: dict[str, torch.Tensor], layer: Layer) -> tuple[tuple, tuple]:
    rank = len(tensors[f"{layer.name}.a"])
    term = []
    for part, size in (("a", layer.in_), ("bt", layer.out)):
        stem = f"{layer.name}.{part}"
        taken = []
        has_4_bits = stem in tensors and tensors[stem].dtype == torch.uint8
        codes = (torch.uint8, padded(size) // 2) if has_4_bits else (torch.int8, padded(size))
        for name, dtype, columns in (
            (stem, *codes),
            (f"{stem}_scales", torch.bfloat16, groups_of(size)),
        ):
            tensor = tensors.pop(name, None)
            found = None if tensor is None else (tensor.dtype, list(tensor.shape))
            if found != (dtype, [rank, columns]):
                is_ = "absent" if found is None else f"{found[0]} {found[1]}"
                raise ArtifactError(
                    f"{path}: tensor {name}: {is_}, expected {dtype} {[rank, columns]} for a layer "
                    f"[{layer.out}, {layer.in_}]"
                )
            taken.append(term_codes(tensor) if dtype == torch.uint8 else tensor)
        if not taken[1].isfinite().all():
            raise ArtifactError(f"{path}: tensor {stem}_scales: holds a value that is not finite")
        term.append(tuple(taken))
    return tuple(term)


def apply(path, directory, output):
    """Writes the artifact in `directory` with a delta in its prefix factors, as nestor compress
    --delta puts it there. Its stated qualities are then to be measured anew. ArtifactError where a
    layer with a term is a gar pair."""
    artifact = Artifact(directory)
    tensors = dict(artifact.tensors)
    terms = _stored(path, artifact)
    for layer in artifact.layers:
        if layer.name in terms:
            artifact.check_has_no_gar(layer)
            tensors.update(_with_term(tensors, layer.name, terms[layer.name]))
    artifact.write(output, tensors)


def _with_term(tensors, name: str, term) -> dict[str, torch.Tensor]:
    """A layer's prefix tensors with the term's components first and as many fewer at the end."""
    joined = {}
    for part, (codes, scales) in zip(("a", "bt"), term):
        stem = f"{name}.prefix.{part}"
        for tensor, first in ((stem, codes), (f"{stem}_scales", scales)):
            joined[tensor] = torch.cat((first, tensors[tensor]))[: len(tensors[tensor])]
    return joined
