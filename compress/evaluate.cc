#include "compress/evaluate.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <random>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/check.h"
#include "base/file.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

constexpr int kBootstrapSamples = 100;

// Ranks from 1, ties sharing the mean of theirs.
std::vector<double> Ranks(std::span<const double> values) {
  std::vector<size_t> order(values.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return values[a] < values[b]; });
  std::vector<double> ranks(values.size());
  for (size_t begin = 0; begin < order.size();) {
    size_t end = begin + 1;
    while (end < order.size() && values[order[end]] == values[order[begin]]) ++end;
    const double rank = 0.5 * static_cast<double>(begin + 1 + end);
    for (size_t i = begin; i < end; ++i) ranks[order[i]] = rank;
    begin = end;
  }
  return ranks;
}

double Pearson(std::span<const double> a, std::span<const double> b) {
  const double n = static_cast<double>(a.size());
  const double mean_a = std::accumulate(a.begin(), a.end(), 0.0) / n;
  const double mean_b = std::accumulate(b.begin(), b.end(), 0.0) / n;
  double covariance = 0;
  double variance_a = 0;
  double variance_b = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    covariance += (a[i] - mean_a) * (b[i] - mean_b);
    variance_a += (a[i] - mean_a) * (a[i] - mean_a);
    variance_b += (b[i] - mean_b) * (b[i] - mean_b);
  }
  const double norm = std::sqrt(variance_a * variance_b);
  return norm > 0 ? covariance / norm : 0;
}

// Of mean log-likelihood differences between two measurements of the same windows.
double StandardErrorOfDifference(std::span<const WindowScore> a, std::span<const WindowScore> b) {
  const size_t n = a.size();
  if (n < 2) return 0;
  double tokens = 0;
  double total = 0;
  for (size_t i = 0; i < n; ++i) {
    tokens += static_cast<double>(a[i].tokens);
    total += a[i].log_likelihood - b[i].log_likelihood;
  }
  const double mean = total / tokens;
  double variance = 0;  // of a ratio estimator, windows as clusters
  for (size_t i = 0; i < n; ++i) {
    const double residual =
        a[i].log_likelihood - b[i].log_likelihood - mean * static_cast<double>(a[i].tokens);
    variance += residual * residual;
  }
  variance *= static_cast<double>(n) / static_cast<double>(n - 1);
  return std::sqrt(variance) / tokens;
}

std::vector<double> Resample(std::span<const double> values, const std::vector<size_t>& chosen) {
  std::vector<double> resampled;
  resampled.reserve(chosen.size());
  for (const size_t i : chosen) resampled.push_back(values[i]);
  return resampled;
}

// Similarities against the labels as ratio to the reference's, or against the reference's own.
double SpearmanQuality(std::span<const double> level, std::span<const double> reference,
                       std::span<const double> labels) {
  if (labels.empty()) return Spearman(level, reference);
  const double best = Spearman(reference, labels);
  return best != 0 ? Spearman(level, labels) / best : 0;
}

double BootstrapError(std::span<const double> level, std::span<const double> reference,
                      std::span<const double> labels) {
  std::mt19937_64 random(1);
  double sum = 0;
  double sum_of_squares = 0;
  std::vector<size_t> chosen(level.size());
  for (int sample = 0; sample < kBootstrapSamples; ++sample) {
    for (size_t& index : chosen) index = random() % level.size();
    const std::vector<double> resampled_labels =
        labels.empty() ? std::vector<double>() : Resample(labels, chosen);
    const double quality =
        SpearmanQuality(Resample(level, chosen), Resample(reference, chosen), resampled_labels);
    sum += quality;
    sum_of_squares += quality * quality;
  }
  const double mean = sum / kBootstrapSamples;
  return std::sqrt(std::max(0.0, sum_of_squares / kBootstrapSamples - mean * mean));
}

size_t LabelOf(const std::vector<float>& logits) {
  return static_cast<size_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// Texts that get the label `expected` of them.
std::vector<double> Hits(const std::vector<std::vector<float>>& logits,
                         const std::vector<size_t>& expected) {
  std::vector<double> hits;
  for (size_t i = 0; i < logits.size(); ++i) {
    hits.push_back(LabelOf(logits[i]) == expected[i] ? 1 : 0);
  }
  return hits;
}

std::vector<size_t> LabelsOf(const std::vector<std::vector<float>>& logits) {
  std::vector<size_t> labels;
  for (const std::vector<float>& of_text : logits) labels.push_back(LabelOf(of_text));
  return labels;
}

double Mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

// Of the mean difference of two series, paired.
double StandardErrorOfMeanDifference(const std::vector<double>& a, const std::vector<double>& b) {
  const auto n = static_cast<double>(a.size());
  if (n < 2) return 0;
  const double mean = Mean(a) - Mean(b);
  double variance = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    variance += (a[i] - b[i] - mean) * (a[i] - b[i] - mean);
  }
  return std::sqrt(variance / (n - 1) / n);
}

LevelMetrics ClassifierMetrics(const EvaluationSet& set, const Measurement& level,
                               const Measurement& full, const Measurement* source) {
  // What texts are held against: their classes, or the labels that another model gives them.
  const auto hits = [&](const Measurement& measured, const Measurement& reference) {
    return Hits(measured.logits, set.classes.empty() ? LabelsOf(reference.logits) : set.classes);
  };
  const auto ratio = [&](const Measurement& reference) {
    const double best = Mean(hits(reference, reference));
    return best > 0 ? Mean(hits(level, reference)) / best : 0;
  };
  LevelMetrics metrics;
  metrics.agreement = Mean(Hits(level.logits, LabelsOf(full.logits)));
  if (!set.classes.empty()) metrics.accuracy = Mean(Hits(level.logits, set.classes));
  metrics.quality = ratio(full);
  const double best = Mean(hits(full, full));
  metrics.standard_error =
      best > 0 ? StandardErrorOfMeanDifference(hits(level, full), hits(full, full)) / best : 0;
  if (source != nullptr) metrics.quality_vs_source = ratio(*source);
  return metrics;
}

}  // namespace

EvaluationSet SplicedPairs(const TokenSequences& lines) {
  constexpr double kGoldenRatio = 0.6180339887498949;  // its multiples fill [0, 1) evenly
  EvaluationSet set;
  for (size_t i = 0; i + 1 < lines.size(); i += 2) {
    const std::vector<int32_t>& first = lines[i];
    const std::vector<int32_t>& second = lines[i + 1];
    const double share = std::fmod(static_cast<double>(i / 2) * kGoldenRatio, 1.0);
    const auto part_of = [](const std::vector<int32_t>& line, double part) {
      return std::clamp<int64_t>(std::llround(part * static_cast<double>(line.size())), 1,
                                 std::max<int64_t>(1, std::ssize(line) - 1));
    };
    std::vector<int32_t> splice(first.begin(), first.begin() + part_of(first, 1 - share));
    splice.insert(splice.end(), second.end() - part_of(second, share), second.end());
    set.pairs.emplace_back(set.sequences.size(), set.sequences.size() + 1);
    set.sequences.push_back(first);
    set.sequences.push_back(std::move(splice));
  }
  return set;
}

absl::StatusOr<EvaluationSet> ReadLabelledPairs(const std::string& path, const Tokenizer& tokenizer,
                                                const ModelSpec& spec) {
  constexpr size_t kLabelColumn = 4;
  constexpr size_t kSentenceColumn = 5;
  NESTOR_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  EvaluationSet set;
  int64_t number = 0;
  for (const auto& line : absl::StrSplit(text, '\n')) {
    ++number;
    if (line.empty()) continue;
    const std::vector<std::string> columns = absl::StrSplit(line, '\t');
    double label = 0;
    if (columns.size() < kSentenceColumn + 2 || !absl::SimpleAtod(columns[kLabelColumn], &label) ||
        !std::isfinite(label)) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": line ", number,
                       ": expected tab-separated columns, the fifth a score, the "
                       "sixth and seventh sentences"));
    }
    for (size_t i = 0; i < 2; ++i) {
      NESTOR_ASSIGN_OR_RETURN(
          TokenSequences sentence,
          SequencesOf(columns[kSentenceColumn + i], tokenizer, spec, /*max_tokens=*/0));
      if (sentence.size() != 1) {
        return absl::InvalidArgumentError(
            absl::StrCat(path, ": line ", number, ": sentence ", i + 1, " is empty"));
      }
      set.sequences.push_back(std::move(sentence[0]));
    }
    set.pairs.emplace_back(set.sequences.size() - 2, set.sequences.size() - 1);
    set.labels.push_back(label);
  }
  if (set.pairs.size() < 2) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": ", set.pairs.size(), " sentence pairs, at least 2 are needed"));
  }
  return set;
}

int64_t MeasuredTokens(const EvaluationSet& set) { return CountTokens(set.sequences); }

absl::StatusOr<Measurement> Measure(Engine* engine, int level, const EvaluationSet& set,
                                    Progress* progress) {
  Measurement measurement;
  const auto begin = std::chrono::steady_clock::now();
  const auto stop = [&] {
    measurement.seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  const ModelSpec& spec = engine->model().spec();
  if (!spec.is_encoder()) {
    NESTOR_ASSIGN_OR_RETURN(measurement.windows,
                            ScoreWindows(engine, set.sequences, level, progress));
    stop();
    return measurement;
  }
  NESTOR_ASSIGN_OR_RETURN(std::vector<std::vector<float>> embeddings,
                          EmbedSentences(engine, set.sequences, level, progress, set.second_texts));
  stop();
  if (spec.is_classifier()) {
    measurement.logits = std::move(embeddings);
    return measurement;
  }
  for (const auto& [first, second] : set.pairs) {
    measurement.similarities.push_back(Cosine(embeddings[first], embeddings[second]));
  }
  return measurement;
}

double Perplexity(std::span<const WindowScore> windows) {
  double log_likelihood = 0;
  double tokens = 0;
  for (const WindowScore& window : windows) {
    log_likelihood += window.log_likelihood;
    tokens += static_cast<double>(window.tokens);
  }
  return std::exp(-log_likelihood / tokens);
}

double Spearman(std::span<const double> a, std::span<const double> b) {
  NESTOR_CHECK(a.size() == b.size());
  return Pearson(Ranks(a), Ranks(b));
}

LevelMetrics MetricsOf(const EvaluationSet& set, const Measurement& level, const Measurement& full,
                       const Measurement* source) {
  if (!level.logits.empty()) return ClassifierMetrics(set, level, full, source);
  LevelMetrics metrics;
  if (!level.windows.empty()) {
    metrics.perplexity = Perplexity(level.windows);
    metrics.quality = Perplexity(full.windows) / *metrics.perplexity;
    metrics.standard_error =
        metrics.quality * StandardErrorOfDifference(level.windows, full.windows);
    if (source != nullptr) {
      metrics.quality_vs_source = Perplexity(source->windows) / *metrics.perplexity;
    }
    return metrics;
  }
  metrics.spearman =
      Spearman(level.similarities, set.labels.empty() ? full.similarities : set.labels);
  metrics.quality = SpearmanQuality(level.similarities, full.similarities, set.labels);
  metrics.standard_error = BootstrapError(level.similarities, full.similarities, set.labels);
  if (source != nullptr) {
    metrics.quality_vs_source =
        SpearmanQuality(level.similarities, source->similarities, set.labels);
  }
  return metrics;
}

absl::StatusOr<std::vector<LevelMetrics>> EvaluateLevels(Engine* engine, const EvaluationSet& set,
                                                         const Measurement* source) {
  const int num_levels = static_cast<int>(engine->model().levels().size());
  std::vector<Measurement> measurements;
  for (int level = 0; level < num_levels; ++level) {
    Progress progress(absl::StrCat("Evaluating level ", level, " of 0-", num_levels - 1),
                      MeasuredTokens(set));
    NESTOR_ASSIGN_OR_RETURN(measurements.emplace_back(), Measure(engine, level, set, &progress));
  }
  std::vector<LevelMetrics> metrics;
  for (const Measurement& measurement : measurements) {
    metrics.push_back(MetricsOf(set, measurement, measurements.back(), source));
    metrics.back().seconds_per_token =
        measurement.seconds / static_cast<double>(MeasuredTokens(set));
  }
  return metrics;
}

}  // namespace nestor
