#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "compress/corpus.h"
#include "compress/forward.h"
#include "engine/engine.h"

namespace nestor {

// What levels are measured on: windows for a language model; for an encoder sentences, pairs of
// them, and labels of the pairs where there are any; for a classifier texts, and their classes
// where they are known.
struct EvaluationSet {
  TokenSequences sequences;
  std::vector<std::pair<size_t, size_t>> pairs;
  std::vector<double> labels;        // parallel to `pairs`, or empty
  std::vector<size_t> classes;       // parallel to `sequences`, or empty
  std::vector<size_t> second_texts;  // StepEntry::second_text; parallel to `sequences`, or empty
};

// Pairs of every similarity, without labels: every other line with a splice of its beginning and
// the next line's end, whose share of the second goes evenly from nothing to everything. REQUIRES:
// lines with the encoder's special tokens at both ends, or without any.
EvaluationSet SplicedPairs(const TokenSequences& lines);
// Reads STS-B's format: tab-separated, label in column 5, sentences in columns 6 and 7.
// INVALID_ARGUMENT names the file and the line.
absl::StatusOr<EvaluationSet> ReadLabelledPairs(const std::string& path, const Tokenizer& tokenizer,
                                                const ModelSpec& spec);

// What one level did on the set.
struct Measurement {
  std::vector<WindowScore> windows;             // language models
  std::vector<double> similarities;             // encoders: cosine of each pair
  std::vector<std::vector<float>> logits = {};  // classifiers: of each text
  double seconds = 0;
};
absl::StatusOr<Measurement> Measure(Engine* engine, int level, const EvaluationSet& set,
                                    Progress* progress);
// What Measure advances `progress` by.
int64_t MeasuredTokens(const EvaluationSet& set);

double Perplexity(std::span<const WindowScore> windows);
// Rank correlation; ties get the mean of their ranks. 0 where either side is constant.
double Spearman(std::span<const double> a, std::span<const double> b);

// Metrics of a level by the definitions of `quality`: perplexity(full) / perplexity(level), or the
// level's Spearman as ratio to the full level's. Without labels Spearman is to the full level's
// own similarities. Of a classifier's level it is the accuracy as ratio to the full level's, or
// without classes the share of texts that get the label that the full level gives them. `source`
// (may be null) is the source checkpoint's measurement. The standard error is that of paired
// differences between windows, or a bootstrap over pairs (fixed seed).
LevelMetrics MetricsOf(const EvaluationSet& set, const Measurement& level, const Measurement& full,
                       const Measurement* source);

// Measures every level of the engine's model, with a progress bar each.
absl::StatusOr<std::vector<LevelMetrics>> EvaluateLevels(Engine* engine, const EvaluationSet& set,
                                                         const Measurement* source);

}  // namespace nestor
