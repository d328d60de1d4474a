#include "engine/speculation.h"

#include "base/check.h"
#include "base/status_macros.h"

namespace nestor {

using Clock = std::chrono::steady_clock;

SpeculativeRound::SpeculativeRound(Engine* engine) : engine_(engine), plan_{{StepEntry()}} {
  tokens_.reserve(1 + kMaxDrafts);
  steps_.reserve(kMaxDrafts + 2);
}

absl::StatusOr<StepResult::Entry> SpeculativeRound::Step(std::span<const int32_t> tokens, int level,
                                                         StepEntry::Output output) {
  plan_.entries.front() = {
      .sequence = shape_.sequence, .tokens = tokens, .level = level, .output = output};
  const Clock::time_point begin = Clock::now();
  NESTOR_RETURN_IF_ERROR(engine_->Step(plan_, &result_));
  steps_.push_back({.level = level,
                    .rows = static_cast<int64_t>(tokens.size()),
                    .time = Clock::now() - begin,
                    .weight_bytes = result_.executed.weight_bytes});
  return result_.entries.front();
}

absl::Status SpeculativeRound::Run(const Shape& shape, Sampler* sampler) {
  NESTOR_CHECK(shape.num_drafts >= 0 && shape.num_drafts <= kMaxDrafts);
  shape_ = shape;
  length_ = engine_->LengthOf(shape.sequence);
  tokens_.clear();
  tokens_.push_back(shape.token);
  num_drawn_ = 0;
  num_accepted_ = 0;
  steps_.clear();
  NESTOR_RETURN_IF_ERROR(Draft(sampler));
  return Verify();
}

absl::Status SpeculativeRound::Draft(Sampler* sampler) {
  while (num_drafted() < shape_.num_drafts) {
    NESTOR_ASSIGN_OR_RETURN(
        const StepResult::Entry ran,
        Step({&tokens_.back(), 1}, shape_.draft_level, StepEntry::Output::kLastLogits));
    if (!ran.status.ok()) break;
    tokens_.push_back(sampler->Peek(ran.values, drafts()));
  }
  engine_->Truncate(shape_.sequence, length_);
  return absl::OkStatus();
}

absl::Status SpeculativeRound::Verify() {
  NESTOR_ASSIGN_OR_RETURN(StepResult::Entry ran,
                          Step(tokens_, shape_.verify_level, StepEntry::Output::kAllLogits));
  if (!ran.status.ok() && tokens_.size() > 1) {
    tokens_.erase(tokens_.begin() + 1, tokens_.end());
    engine_->Truncate(shape_.sequence, length_);
    NESTOR_ASSIGN_OR_RETURN(ran, Step(tokens_, shape_.verify_level, StepEntry::Output::kAllLogits));
  }
  logits_ = ran.values;
  sequence_status_ = ran.status;
  return absl::OkStatus();
}

std::span<const float> SpeculativeRound::logits() const {
  const size_t vocabulary = logits_.size() / tokens_.size();
  return logits_.subspan(static_cast<size_t>(num_drawn_) * vocabulary, vocabulary);
}

bool SpeculativeRound::Accept(int32_t token) {
  const std::span<const int32_t> drafted = drafts();
  const size_t index = static_cast<size_t>(num_drawn_++);
  if (index >= drafted.size() || drafted[index] != token) return false;
  ++num_accepted_;
  return true;
}

void SpeculativeRound::Settle() { engine_->Truncate(shape_.sequence, length_ + num_drawn_); }

}  // namespace nestor
