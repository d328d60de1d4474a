#include "compress/forward.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <utility>

#include "base/status_macros.h"

namespace nestor {
namespace {

// A sequence that leaves the engine with its scope.
class ScopedSequence {
 public:
  static absl::StatusOr<ScopedSequence> Add(Engine* engine, int64_t length) {
    NESTOR_ASSIGN_OR_RETURN(const SequenceId id, engine->AddSequence(length));
    return ScopedSequence(engine, id);
  }
  ScopedSequence(ScopedSequence&& other) noexcept
      : engine_(std::exchange(other.engine_, nullptr)), id_(other.id_) {}
  ~ScopedSequence() {
    if (engine_ != nullptr) engine_->RemoveSequence(id_);
  }
  SequenceId id() const { return id_; }

 private:
  ScopedSequence(Engine* engine, SequenceId id) : engine_(engine), id_(id) {}
  Engine* engine_;
  SequenceId id_;
};

// Embeds sentences [begin, end) in one step.
absl::Status EmbedBatch(Engine* engine, const TokenSequences& sentences, size_t begin, size_t end,
                        int level, std::span<const size_t> second_texts,
                        std::vector<std::vector<float>>* embeddings) {
  std::vector<ScopedSequence> batch;
  StepPlan plan;
  for (size_t i = begin; i < end; ++i) {
    NESTOR_ASSIGN_OR_RETURN(ScopedSequence sequence,
                            ScopedSequence::Add(engine, static_cast<int64_t>(sentences[i].size())));
    plan.entries.push_back({.sequence = sequence.id(),
                            .tokens = sentences[i],
                            .level = level,
                            .output = StepEntry::Output::kEmbedding,
                            .targets = {}});
    if (!second_texts.empty()) plan.entries.back().second_text = second_texts[i];
    batch.push_back(std::move(sequence));
  }
  NESTOR_ASSIGN_OR_RETURN(const StepResult result, engine->Step(plan));
  for (const StepResult::Entry& entry : result.entries) {
    NESTOR_RETURN_IF_ERROR(entry.status);
    embeddings->emplace_back(entry.values.begin(), entry.values.end());
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> OpenEngine(std::unique_ptr<NestedModel> model,
                                                   const BackendFactory& make_backend,
                                                   int64_t positions, int64_t max_rows) {
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend, make_backend());
  EngineOptions options;
  options.max_step_rows = max_rows;
  const ModelSpec& spec = model->spec();
  options.kv_cache_bytes =
      backend->KvCacheBytes({.num_layers = spec.num_blocks,
                             .num_kv_heads = spec.num_kv_heads,
                             .head_dim = spec.head_dim,
                             .page_size = options.page_size,
                             .num_pages = (positions + options.page_size - 1) / options.page_size});
  return Engine::Create(std::move(model), std::move(backend), options);
}

absl::StatusOr<std::vector<double>> LogProbabilities(Engine* engine,
                                                     const std::vector<int32_t>& window,
                                                     int level) {
  std::vector<int32_t> targets(window.size(), -1);
  if (!window.empty()) std::copy(window.begin() + 1, window.end(), targets.begin());
  NESTOR_ASSIGN_OR_RETURN(const ScopedSequence sequence,
                          ScopedSequence::Add(engine, static_cast<int64_t>(window.size())));
  std::vector<double> values;
  const size_t chunk = static_cast<size_t>(engine->options().max_step_rows);
  for (size_t begin = 0; begin < window.size(); begin += chunk) {
    const size_t size = std::min(chunk, window.size() - begin);
    StepPlan plan;
    plan.entries.push_back({.sequence = sequence.id(),
                            .tokens = std::span(window).subspan(begin, size),
                            .level = level,
                            .output = StepEntry::Output::kLogProbabilities,
                            .targets = std::span(targets).subspan(begin, size)});
    NESTOR_ASSIGN_OR_RETURN(const StepResult result, engine->Step(plan));
    NESTOR_RETURN_IF_ERROR(result.entries[0].status);
    for (size_t i = 0; i < size; ++i) {
      if (targets[begin + i] >= 0) values.push_back(result.entries[0].log_probabilities[i]);
    }
  }
  return values;
}

absl::StatusOr<std::vector<WindowScore>> ScoreWindows(Engine* engine, const TokenSequences& windows,
                                                      int level, Progress* progress) {
  std::vector<WindowScore> scores;
  for (const std::vector<int32_t>& window : windows) {
    NESTOR_ASSIGN_OR_RETURN(const std::vector<double> values,
                            LogProbabilities(engine, window, level));
    scores.push_back({.log_likelihood = std::accumulate(values.begin(), values.end(), 0.0),
                      .tokens = static_cast<int64_t>(values.size())});
    if (progress != nullptr) progress->Advance(static_cast<int64_t>(window.size()));
  }
  return scores;
}

absl::StatusOr<std::vector<std::vector<float>>> EmbedSentences(
    Engine* engine, const TokenSequences& sentences, int level, Progress* progress,
    std::span<const size_t> second_texts) {
  const EngineOptions& options = engine->options();
  std::vector<std::vector<float>> embeddings;
  size_t begin = 0;
  while (begin < sentences.size()) {
    int64_t rows = static_cast<int64_t>(sentences[begin].size());
    size_t end = begin + 1;
    while (end < sentences.size() && static_cast<int64_t>(end - begin) < options.max_sequences &&
           rows + static_cast<int64_t>(sentences[end].size()) <= options.max_step_rows) {
      rows += static_cast<int64_t>(sentences[end++].size());
    }
    NESTOR_RETURN_IF_ERROR(
        EmbedBatch(engine, sentences, begin, end, level, second_texts, &embeddings));
    if (progress != nullptr) progress->Advance(rows);
    begin = end;
  }
  return embeddings;
}

double Cosine(const std::vector<float>& a, const std::vector<float>& b) {
  double dot = 0;
  double norm_a = 0;
  double norm_b = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    dot += static_cast<double>(a[i]) * b[i];
    norm_a += static_cast<double>(a[i]) * a[i];
    norm_b += static_cast<double>(b[i]) * b[i];
  }
  const double norm = std::sqrt(norm_a * norm_b);
  return norm > 0 ? dot / norm : 0;
}

}  // namespace nestor
