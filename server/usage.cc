#include "server/usage.h"

#include <algorithm>

namespace nestor {
namespace {

void Append(int level, int64_t tokens, std::vector<LevelRun>* runs) {
  if (!runs->empty() && runs->back().level == level) {
    runs->back().tokens += tokens;
  } else {
    runs->push_back({level, tokens});
  }
}

}  // namespace

void Usage::AddDiscardedRows(int64_t num_rows, const LevelView& view) {
  const double count = static_cast<double>(num_rows);
  rows += num_rows;
  relative_cost += count * view.relative_cost;
  relative_flops += count * view.relative_flops;
  flops += count * view.flops_per_token;
}

void Usage::AddKeptRows(int64_t num_rows, const LevelView& view) {
  AddDiscardedRows(num_rows, view);
  kept_rows += num_rows;
  quality += static_cast<double>(num_rows) * view.quality;
}

void Usage::AddPromptRows(int level, int64_t num_rows, const LevelView& view) {
  Append(level, num_rows, &prompt_levels);
  prompt_tokens += num_rows;
  AddKeptRows(num_rows, view);
}

void Usage::AddDecodeRow(const LevelView& view) { AddKeptRows(1, view); }

void Usage::AddGeneratedToken(int level) {
  Append(level, 1, &completion_levels);
  ++completion_tokens;
}

void Usage::Merge(const Usage& other) {
  for (const LevelRun& run : other.prompt_levels) Append(run.level, run.tokens, &prompt_levels);
  for (const LevelRun& run : other.completion_levels) {
    Append(run.level, run.tokens, &completion_levels);
  }
  prompt_tokens += other.prompt_tokens;
  completion_tokens += other.completion_tokens;
  rows += other.rows;
  relative_cost += other.relative_cost;
  relative_flops += other.relative_flops;
  flops += other.flops;
  kept_rows += other.kept_rows;
  quality += other.quality;
  drafted_tokens += other.drafted_tokens;
  accepted_tokens += other.accepted_tokens;
  queue_time = std::max(queue_time, other.queue_time);
  prefill_time = std::max(prefill_time, other.prefill_time);
  decode_time = std::max(decode_time, other.decode_time);
  if (degradation == Degradation::kNone) degradation = other.degradation;
  has_target = has_target || other.has_target;
  target_met = target_met && other.target_met;
}

}  // namespace nestor
