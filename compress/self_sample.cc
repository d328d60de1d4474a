#include "compress/self_sample.h"

#include <algorithm>
#include <random>
#include <span>
#include <vector>

#include "base/progress.h"
#include "base/status_macros.h"
#include "engine/sampler.h"

namespace nestor {
namespace {

constexpr size_t kPromptTokens = 8;

int64_t WindowLength(const Engine& engine) {
  return std::min(kWindowTokens, engine.max_sequence_length());
}

// One batch of windows, token by token.
absl::Status SampleBatch(Engine* engine, std::span<std::vector<int32_t>> windows, size_t length,
                         uint64_t seed, Progress* progress) {
  std::vector<SequenceId> ids;
  std::vector<Sampler> samplers;
  absl::Status status;
  for (size_t i = 0; i < windows.size() && status.ok(); ++i) {
    const absl::StatusOr<SequenceId> id = engine->AddSequence(static_cast<int64_t>(length));
    status = id.status();
    if (!status.ok()) break;
    ids.push_back(*id);
    samplers.emplace_back(SamplingOptions{.temperature = 1, .seed = seed + i});
  }
  std::vector<size_t> processed(windows.size(), 0);
  while (status.ok() && windows[0].size() < length) {
    StepPlan plan;
    for (size_t i = 0; i < windows.size(); ++i) {
      plan.entries.push_back({.sequence = ids[i],
                              .tokens = std::span(windows[i]).subspan(processed[i]),
                              .level = static_cast<int>(engine->model().levels().size()) - 1,
                              .output = StepEntry::Output::kLastLogits,
                              .targets = {}});
    }
    const absl::StatusOr<StepResult> result = engine->Step(plan);
    status = result.status();
    for (size_t i = 0; i < windows.size() && status.ok(); ++i) {
      status = result->entries[i].status;
      processed[i] = windows[i].size();
      if (status.ok()) windows[i].push_back(samplers[i].Sample(result->entries[i].values));
    }
    progress->Advance(static_cast<int64_t>(windows.size()));
  }
  for (const SequenceId id : ids) engine->RemoveSequence(id);
  return status;
}

}  // namespace

int64_t SampledSequences(const Engine& engine, const SelfSampleOptions& options) {
  const int64_t length = WindowLength(engine);
  return (options.tokens + length - 1) / length;
}

int64_t SampledTokens(const Engine& engine, const SelfSampleOptions& options) {
  return SampledSequences(engine, options) * WindowLength(engine);
}

absl::StatusOr<TokenSequences> SampleFromModel(Engine* engine, const TokenSequences& prompts,
                                               const SelfSampleOptions& options) {
  const int64_t length = WindowLength(*engine);
  const size_t count = static_cast<size_t>(SampledSequences(*engine, options));
  std::mt19937_64 random(options.seed);
  TokenSequences windows;
  for (size_t i = 0; i < count; ++i) {
    const std::vector<int32_t>& prompt = prompts[random() % prompts.size()];
    const size_t size = std::min(kPromptTokens, prompt.size());
    const size_t begin = random() % (prompt.size() - size + 1);
    windows.emplace_back(prompt.begin() + static_cast<ptrdiff_t>(begin),
                         prompt.begin() + static_cast<ptrdiff_t>(begin + size));
    // Batches step in lockstep, so prompts have one length.
    windows.back().resize(std::min(kPromptTokens, static_cast<size_t>(length)), prompt[begin]);
  }
  Progress progress("Sampling from the model", static_cast<int64_t>(count) * length);
  for (size_t begin = 0; begin < count; begin += kSelfSampleBatch) {
    const size_t size = std::min<size_t>(kSelfSampleBatch, count - begin);
    NESTOR_RETURN_IF_ERROR(SampleBatch(engine, std::span(windows).subspan(begin, size),
                                       static_cast<size_t>(length), random(), &progress));
  }
  return windows;
}

}  // namespace nestor
