#include "compress/sensitivity.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <utility>

#include "base/progress.h"
#include "base/status_macros.h"
#include "compress/forward.h"

namespace nestor {
namespace {

constexpr double kPrefixProbeShare = 0.4;

// The outputs of one level as one vector for each token or sentence.
using Outputs = std::vector<std::vector<float>>;

absl::StatusOr<Outputs> OutputsAt(Engine* engine, const TokenSequences& sequences, int level,
                                  Progress* progress) {
  if (engine->model().spec().is_encoder()) {
    return EmbedSentences(engine, sequences, level, progress);
  }
  Outputs outputs;
  for (const std::vector<int32_t>& window : sequences) {
    NESTOR_ASSIGN_OR_RETURN(const std::vector<double> values,
                            LogProbabilities(engine, window, level, /*stride=*/1));
    for (const double value : values) outputs.push_back({static_cast<float>(value)});
    progress->Advance(static_cast<int64_t>(window.size()));
  }
  return outputs;
}

// Half the mean squared difference of log-probabilities: KL to second order.
double LogProbabilityDivergence(const Outputs& a, const Outputs& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = static_cast<double>(a[i][0]) - b[i][0];
    sum += 0.5 * difference * difference;
  }
  return sum / static_cast<double>(a.size());
}

// Variance over all pairs of sentences of how much their similarity changes: what all pairs share
// does not change their order.
double SimilarityDivergence(const Outputs& a, const Outputs& b) {
  double sum = 0;
  double sum_of_squares = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      const double change = Cosine(a[i], a[j]) - Cosine(b[i], b[j]);
      sum += change;
      sum_of_squares += change * change;
    }
  }
  const double pairs = 0.5 * static_cast<double>(a.size()) * static_cast<double>(a.size() - 1);
  const double mean = sum / pairs;
  return std::max(0.0, sum_of_squares / pairs - mean * mean);
}

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
    // Dense has rank 0 too, so it is taken only where there is nothing else.
    const auto distance = [&](const LayerOption& option) {
      return std::pair(option.choice.form == Form::kDense, std::llabs(option.choice.rank - limit));
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
  const bool is_encoder = engine->model().spec().is_encoder();
  Progress progress("Measuring sensitivity", num_levels * CountTokens(sequences));
  std::vector<double> measured;
  Outputs before;
  for (int level = 0; level < num_levels; ++level) {
    NESTOR_ASSIGN_OR_RETURN(Outputs outputs, OutputsAt(engine, sequences, level, &progress));
    if (level > 0) {
      measured.push_back(is_encoder ? SimilarityDivergence(before, outputs)
                                    : LogProbabilityDivergence(before, outputs));
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
