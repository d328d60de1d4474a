#include "compress/divergence.h"

#include <algorithm>
#include <cmath>

#include "base/status_macros.h"
#include "compress/forward.h"

namespace nestor {
namespace {

double LogProbabilityDivergence(const Outputs& a, const Outputs& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = static_cast<double>(a[i][0]) - b[i][0];
    sum += 0.5 * difference * difference;
  }
  return sum / static_cast<double>(a.size());
}

// What all pairs share does not change their order.
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

double LabelDivergence(const Outputs& a, const Outputs& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const std::vector<double> of_a = LabelLogProbabilities(a[i]);
    const std::vector<double> of_b = LabelLogProbabilities(b[i]);
    for (size_t label = 0; label < of_a.size(); ++label) {
      const double difference = of_a[label] - of_b[label];
      sum += 0.5 * std::exp(of_a[label]) * difference * difference;
    }
  }
  return sum / static_cast<double>(a.size());
}

}  // namespace

std::vector<double> LabelLogProbabilities(const std::vector<float>& logits) {
  const double highest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - highest);
  std::vector<double> result;
  for (const float logit : logits) result.push_back(logit - highest - std::log(sum));
  return result;
}

absl::StatusOr<Outputs> OutputsAt(Engine* engine, const TokenSequences& sequences, int level,
                                  Progress* progress) {
  if (engine->model().spec().is_encoder()) {
    return EmbedSentences(engine, sequences, level, progress);
  }
  Outputs outputs;
  for (const std::vector<int32_t>& window : sequences) {
    NESTOR_ASSIGN_OR_RETURN(const std::vector<double> values,
                            LogProbabilities(engine, window, level));
    for (const double value : values) outputs.push_back({static_cast<float>(value)});
    if (progress != nullptr) progress->Advance(static_cast<int64_t>(window.size()));
  }
  return outputs;
}

double DivergenceOf(const ModelSpec& spec, const Outputs& a, const Outputs& b) {
  if (spec.is_classifier()) return LabelDivergence(a, b);
  return spec.is_encoder() ? SimilarityDivergence(a, b) : LogProbabilityDivergence(a, b);
}

}  // namespace nestor
