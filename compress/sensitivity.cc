#include "compress/sensitivity.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <utility>

#include "base/progress.h"
#include "base/status_macros.h"
#include "compress/divergence.h"

namespace nestor {
namespace {

constexpr double kPrefixProbeShare = 0.4;

}  // namespace

std::vector<size_t> SensitivityGroups(const std::vector<LinearSpec>& layers, int64_t depths) {
  int64_t num_blocks = 1;
  for (const LinearSpec& layer : layers)
    num_blocks = std::max<int64_t>(num_blocks, layer.block + 1);
  depths = std::min(depths, num_blocks);
  std::map<std::pair<LinearRole, int64_t>, size_t> numbers;
  std::vector<size_t> groups;
  for (const LinearSpec& layer : layers) {
    const int64_t depth = layer.role == LinearRole::kHead ? 0 : layer.block * depths / num_blocks;
    groups.push_back(numbers.emplace(std::pair(layer.role, depth), numbers.size()).first->second);
  }
  return groups;
}

std::vector<LayerOption> ProbeOptions(const LayerOptions& options, int64_t rank_limit) {
  std::vector<LayerOption> probes;
  for (const std::vector<LayerOption>& layer : options) {
    int64_t limit = rank_limit;
    if (limit == 0) {
      for (const LayerOption& option : layer) limit = std::max(limit, option.choice.rank);
      limit = std::llround(kPrefixProbeShare * static_cast<double>(limit));
    }
    // Dense and middle have rank 0 too, so they are taken only where there is nothing else.
    const auto distance = [&](const LayerOption& option) {
      const Form form = option.choice.form;
      return std::pair(!HasRanks(form), std::llabs(option.choice.rank - limit));
    };
    probes.push_back(*std::min_element(
        layer.begin(), layer.end(),
        [&](const LayerOption& a, const LayerOption& b) { return distance(a) < distance(b); }));
  }
  return probes;
}

std::vector<Level> ProbeChain(const std::vector<LayerOption>& probes,
                              const std::vector<size_t>& groups, const std::string& ladder) {
  const size_t num_groups = *std::max_element(groups.begin(), groups.end()) + 1;
  std::vector<Level> chain(num_groups + 1);
  for (size_t i = 0; i < chain.size(); ++i) {
    chain[i].ladder = i == num_groups ? "full" : ladder;
    for (size_t layer = 0; layer < probes.size(); ++layer) {
      chain[i].profile.push_back(groups[layer] < i ? FormAndRank() : probes[layer].choice);
    }
  }
  return chain;
}

absl::StatusOr<std::vector<double>> MeasureGroups(Engine* engine, const TokenSequences& sequences) {
  const int num_levels = static_cast<int>(engine->model().levels().size());
  Progress progress("Measuring sensitivity", num_levels * CountTokens(sequences));
  std::vector<double> measured;
  Outputs before;
  for (int level = 0; level < num_levels; ++level) {
    NESTOR_ASSIGN_OR_RETURN(Outputs outputs, OutputsAt(engine, sequences, level, &progress));
    if (level > 0) {
      measured.push_back(DivergenceOf(engine->model().spec(), before, outputs));
    }
    before = std::move(outputs);
  }
  return measured;
}

void WeightErrors(const std::vector<double>& measured, const std::vector<size_t>& groups,
                  const std::vector<LayerOption>& probes, LayerOptions* options) {
  std::vector<double> errors(measured.size(), 0.0);
  for (size_t layer = 0; layer < groups.size(); ++layer) {
    errors[groups[layer]] += probes[layer].error;
  }
  for (size_t layer = 0; layer < groups.size(); ++layer) {
    const size_t group = groups[layer];
    if (errors[group] <= 0) continue;
    for (LayerOption& option : (*options)[layer]) option.error *= measured[group] / errors[group];
  }
}

}  // namespace nestor
