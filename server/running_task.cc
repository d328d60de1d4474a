#include "server/running_task.h"

#include <algorithm>
#include <span>
#include <utility>

namespace nestor {

RunningTask::RunningTask(TaskId id, std::unique_ptr<Task> task, SequenceId sequence,
                         const Tokenizer* tokenizer, TimePoint now)
    : id_(id), task_(std::move(task)), sequence_(sequence), started_(now) {
  if (task_->kind != TaskKind::kGenerate) return;
  generation_ = std::make_unique<Generation>(Generation{
      Sampler(task_->sampling), StreamingDecoder(tokenizer), StopMatcher(task_->stops), {}});
  generation_->tokens.reserve(static_cast<size_t>(task_->max_tokens));
  generation_->sampler.AddContext(task_->tokens);
}

TaskView RunningTask::View() const {
  TaskView view;
  view.id = id_;
  view.sla = &task_->sla;
  view.arrival = task_->arrival;
  view.last_token = last_token_;
  view.prompt_left = NumPromptTokens() - prompt_done_;
  if (generation_ != nullptr) {
    view.tokens_left = task_->max_tokens - static_cast<int64_t>(generation_->tokens.size());
  }
  return view;
}

StepEntry RunningTask::Entry(int64_t rows, int level) {
  StepEntry entry;
  entry.sequence = sequence_;
  entry.level = level;
  if (is_prompt_done()) {
    entry.tokens = std::span(generation_->tokens).last(1);
    entry.output = StepEntry::Output::kLastLogits;
    return entry;
  }
  entry.tokens = std::span<const int32_t>(task_->tokens).subspan(prompt_done_, rows);
  const bool is_last = prompt_done_ + rows == NumPromptTokens();
  switch (task_->kind) {
    case TaskKind::kGenerate:
      entry.output = is_last ? StepEntry::Output::kLastLogits : StepEntry::Output::kNone;
      break;
    case TaskKind::kEmbed:
      entry.output = StepEntry::Output::kEmbedding;
      break;
    case TaskKind::kScore:
      entry.output = StepEntry::Output::kLogProbabilities;
      targets_.assign(task_->tokens.begin() + prompt_done_ + 1,
                      task_->tokens.begin() + prompt_done_ + rows + (is_last ? 0 : 1));
      if (is_last) targets_.push_back(-1);
      entry.targets = targets_;
      break;
  }
  return entry;
}

void RunningTask::AddRows(int64_t rows, int level, const LevelView& view, Degradation degradation) {
  if (is_prompt_done()) {
    usage_.AddDecodeRow(view);
  } else {
    usage_.AddPromptRows(level, rows, view);
    prompt_done_ += rows;
  }
  if (usage_.degradation == Degradation::kNone) usage_.degradation = degradation;
}

SpeculativeRound::Shape RunningTask::RoundShape(const SpeculationChoice& choice,
                                                int verify_level) const {
  return {.sequence = sequence_,
          .token = generation_->tokens.back(),
          .draft_level = choice.draft_level,
          .verify_level = verify_level,
          .num_drafts = choice.num_drafts};
}

void RunningTask::AddRound(const SpeculativeRound& round, const Ladder& ladder) {
  for (const SpeculativeRound::RanStep& step : round.steps()) {
    // The last step verified, and gave the tokens drawn a row each.
    const int64_t kept = &step == &round.steps().back() ? round.num_drawn() : 0;
    usage_.AddDiscardedRows(step.rows - kept, ladder[static_cast<size_t>(step.level)]);
  }
  usage_.drafted_tokens += round.num_drafted();
  usage_.accepted_tokens += round.num_accepted();
}

void RunningTask::AddLogProbabilities(std::span<const double> values) {
  // The last row has nothing to score.
  const size_t scored = values.size() - (is_prompt_done() ? 1 : 0);
  log_probabilities_.insert(log_probabilities_.end(), values.begin(), values.begin() + scored);
}

GeneratedToken RunningTask::DrawToken(std::span<const float> logits, int level, TimePoint now) {
  GeneratedToken token;
  token.id = generation_->sampler.Sample(logits);
  generation_->tokens.push_back(token.id);
  token.text = generation_->stops.Push(generation_->decoder.Push(token.id));
  usage_.AddGeneratedToken(level);
  if (!first_token_.has_value()) first_token_ = now;
  last_token_ = now;
  return token;
}

std::optional<FinishReason> RunningTask::GenerationEnd(
    const std::vector<int32_t>& end_tokens) const {
  if (generation_->stops.matched()) return FinishReason::kStop;
  const int32_t last = generation_->tokens.back();
  if (!task_->ignores_end_tokens &&
      std::find(end_tokens.begin(), end_tokens.end(), last) != end_tokens.end()) {
    return FinishReason::kStop;
  }
  if (static_cast<int64_t>(generation_->tokens.size()) == task_->max_tokens) {
    return FinishReason::kLength;
  }
  return std::nullopt;
}

std::string RunningTask::TakeHeldText() {
  if (generation_ == nullptr || generation_->stops.matched()) return "";
  std::string text = generation_->stops.Push(generation_->decoder.Flush());
  if (!generation_->stops.matched()) text += generation_->stops.Flush();
  return text;
}

Usage RunningTask::UsageAt(TimePoint now) const {
  const Sla& sla = task_->sla;
  Usage usage = usage_;
  const TimePoint prefill_end = first_token_.value_or(now);
  usage.queue_time = started_ - task_->arrival;
  usage.prefill_time = prefill_end - started_;
  usage.decode_time = now - prefill_end;
  usage.has_target = sla.has_target();
  if (sla.latency_target.has_value() && now - task_->arrival > *sla.latency_target) {
    usage.target_met = false;
  }
  if (sla.first_token_target.has_value() &&
      prefill_end - task_->arrival > *sla.first_token_target) {
    usage.target_met = false;
  }
  // Judged by the mean: a single gap is at the mercy of the machine.
  if (sla.per_token_target.has_value() && usage.completion_tokens > 1 &&
      *last_token_ - *first_token_ > *sla.per_token_target * (usage.completion_tokens - 1)) {
    usage.target_met = false;
  }
  return usage;
}

}  // namespace nestor
