#include "server/scheduler/speculation.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/check.h"
#include "base/speculative_gain.h"

namespace nestor {
namespace {

double StepSeconds(int level, int64_t rows, const CostModel& cost_model) {
  return SecondsOf(cost_model.Predict(level, rows));
}

// Below it a round is not worth the bursts in which its tokens come.
constexpr double kLeastGain = 1.05;
// Observations that an estimate remembers: a change of text is followed within two sentences.
constexpr double kMemory = 48;
// Rounds and steps after which an estimate that nobody has added to falls back to its prior.
constexpr double kForgetting = 512;
// Observations that a prior counts for where there are none yet.
constexpr double kPriorWeight = 8;
constexpr double kHighestPrior = 0.95;
constexpr double kLargestSurprise = 4;
// Plain steps between two probes, which cost a step's time at most: less than 1 %.
constexpr int64_t kProbeInterval = 128;
// Rounds between two plain steps that measure what rounds are held against.
constexpr int64_t kPlainInterval = 64;

}  // namespace

void SpeculationPolicy::FadingRatio::Add(double to_numerator, double to_denominator, int64_t now) {
  const double kept = std::exp(-static_cast<double>(now - updated) / kForgetting) - 1 / kMemory;
  numerator = numerator * std::max(kept, 0.0) + to_numerator;
  denominator = denominator * std::max(kept, 0.0) + to_denominator;
  updated = now;
}

double SpeculationPolicy::FadingRatio::Value(double prior, int64_t now) const {
  const double kept = std::exp(-static_cast<double>(now - updated) / kForgetting);
  // The denominator of a memory that is full is kMemory: then the prior is gone.
  const double weight = kPriorWeight * std::max(0.0, 1 - kept * denominator / kMemory);
  return (kept * numerator + weight * prior) / (kept * denominator + weight);
}

SpeculationPolicy::SpeculationPolicy(Ladder ladder, int max_drafts)
    : ladder_(std::move(ladder)),
      max_drafts_(max_drafts),
      acceptance_(ladder_.size() * ladder_.size()),
      corrections_(ladder_.size()) {}

double SpeculationPolicy::AcceptanceOf(int draft_level, int verify_level) const {
  const size_t draft = static_cast<size_t>(draft_level);
  const size_t verify = static_cast<size_t>(verify_level);
  const double quality = ladder_[verify].quality;
  const double prior =
      quality > 0 ? std::clamp(ladder_[draft].quality / quality, 0.0, kHighestPrior) : 0;
  return acceptance_[draft * ladder_.size() + verify].Value(prior, num_observed_);
}

double SpeculationPolicy::RoundSeconds(int verify_level, const SpeculationChoice& choice,
                                       const CostModel& cost_model) const {
  return choice.num_drafts * StepSeconds(choice.draft_level, 1, cost_model) +
         StepSeconds(verify_level, choice.num_drafts + 1, cost_model);
}

SpeculationPolicy::Estimate SpeculationPolicy::BestRound(int verify_level, int max_drafts,
                                                         const CostModel& cost_model) const {
  const double plain = StepSeconds(verify_level, 1, cost_model);
  if (plain <= 0) return {};
  const Correction& correction = corrections_[static_cast<size_t>(verify_level)];
  const double factor = correction.round_tokens.Value(1, num_observed_) *
                        correction.plain_time.Value(1, num_observed_) /
                        correction.round_time.Value(1, num_observed_);
  Estimate best;
  for (size_t level = 0; level < ladder_.size(); ++level) {
    const int draft_level = static_cast<int>(level);
    if (ladder_[level].relative_cost >= ladder_[static_cast<size_t>(verify_level)].relative_cost) {
      continue;
    }
    const double acceptance = AcceptanceOf(draft_level, verify_level);
    const double draft_time = StepSeconds(draft_level, 1, cost_model) / plain;
    for (int num_drafts = 1; num_drafts <= max_drafts; ++num_drafts) {
      const double verify_time = StepSeconds(verify_level, num_drafts + 1, cost_model) / plain;
      const double gain = factor * SpeculativeGain(acceptance, num_drafts, draft_time, verify_time);
      if (gain > best.gain) best = {{draft_level, num_drafts}, gain};
    }
  }
  return best;
}

SpeculationChoice SpeculationPolicy::Choose(int verify_level, int64_t most_tokens,
                                            const CostModel& cost_model) const {
  // A round gives one token more than it drafts.
  const int max_drafts = static_cast<int>(std::min<int64_t>(max_drafts_, most_tokens - 1));
  const Estimate best = BestRound(verify_level, max_drafts, cost_model);
  if (best.choice.num_drafts == 0) return {};
  if (best.gain >= kLeastGain) {
    return rounds_since_step_ < kPlainInterval ? best.choice : SpeculationChoice{};
  }
  const SpeculationChoice probe = {.draft_level = best.choice.draft_level, .num_drafts = 1};
  const double probe_steps =
      RoundSeconds(verify_level, probe, cost_model) / StepSeconds(verify_level, 1, cost_model);
  const bool is_due = static_cast<double>(steps_since_round_) >=
                      static_cast<double>(kProbeInterval) * std::max(1.0, probe_steps - 1);
  return is_due ? probe : SpeculationChoice{};
}

void SpeculationPolicy::Observe(const SpeculationRound& round, const CostModel& cost_model) {
  NESTOR_CHECK(round.num_accepted <= round.num_examined);
  ++num_observed_;
  const SpeculationChoice& choice = round.choice;
  const size_t verify = static_cast<size_t>(round.verify_level);
  Correction& correction = corrections_[verify];
  const double expected = RoundSeconds(round.verify_level, choice, cost_model);
  // A stalled machine says no more than kLargestSurprise about the rounds that follow.
  const double surprise = expected > 0 ? std::clamp(SecondsOf(round.time) / expected,
                                                    1 / kLargestSurprise, kLargestSurprise)
                                       : 1;
  if (choice.num_drafts == 0) {
    ++steps_since_round_;
    rounds_since_step_ = 0;
    correction.plain_time.Add(surprise, 1, num_observed_);
    return;
  }
  ++rounds_since_step_;
  steps_since_round_ = 0;
  correction.round_time.Add(surprise, 1, num_observed_);
  // One that the end of its stream cut short says nothing of the tokens that rounds give.
  if (round.num_tokens > round.num_accepted) {
    const double acceptance = AcceptanceOf(choice.draft_level, round.verify_level);
    const double expected_tokens = ExpectedTokens(acceptance, choice.num_drafts);
    correction.round_tokens.Add(static_cast<double>(round.num_tokens) / expected_tokens, 1,
                                num_observed_);
  }
  FadingRatio& accepted =
      acceptance_[static_cast<size_t>(choice.draft_level) * ladder_.size() + verify];
  for (int64_t i = 0; i < round.num_examined; ++i) {
    accepted.Add(i < round.num_accepted ? 1 : 0, 1, num_observed_);
  }
}

}  // namespace nestor
