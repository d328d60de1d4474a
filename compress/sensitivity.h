#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "compress/allocate.h"
#include "compress/corpus.h"
#include "engine/engine.h"

namespace nestor {

// What a layer's relative output error does to the model's output differs by orders of magnitude
// between layers (a query's hardly shows, a head's is the output), so errors are weighted by a
// measured sensitivity before ranks are allocated. Layers are measured in groups.

// The group of each layer, numbered from 0 in order of first appearance: one role in one of
// `depths` equal runs of blocks, the head alone.
std::vector<size_t> SensitivityGroups(const std::vector<LinearSpec>& layers, int64_t depths);

// One option of each layer near where a ladder will use it: the largest rank up to `rank_limit`
// (a residual ladder), or, with 0, the one nearest to two fifths of the largest (a prefix ladder).
std::vector<LayerOption> ProbeOptions(const LayerOptions& options, int64_t rank_limit);

// A nested chain of levels: the first has every layer at its probe, each next one has one more
// group dense, the last is the full level.
std::vector<Level> ProbeChain(const std::vector<LayerOption>& probes,
                              const std::vector<size_t>& groups, const std::string& ladder);

// By group, how far apart the model's outputs are with and without the group's error, the groups
// behind it still at their probes (DivergenceOf). `engine` has the levels of ProbeChain.
absl::StatusOr<std::vector<double>> MeasureGroups(Engine* engine, const TokenSequences& sequences);

// Multiplies the errors of `options` so that each group's probes add up to what was measured.
void WeightErrors(const std::vector<double>& measured, const std::vector<size_t>& groups,
                  const std::vector<LayerOption>& probes, LayerOptions* options);

}  // namespace nestor
