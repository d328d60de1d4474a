#pragma once

#include <cstdint>
#include <vector>

#include "server/scheduler/cost_model.h"
#include "server/scheduler/ladder.h"
#include "server/scheduler/time.h"

namespace nestor {

// How the next tokens of a single stream are decoded.
struct SpeculationChoice {
  int draft_level = 0;
  int num_drafts = 0;  // 0: a plain step
  bool operator==(const SpeculationChoice&) const = default;
};

// A round that has run, or a plain step: no drafts, one token.
struct SpeculationRound {
  int verify_level = 0;
  SpeculationChoice choice;
  int64_t num_examined = 0;  // drafts that were held against what was drawn
  int64_t num_accepted = 0;
  int64_t num_tokens = 0;  // handed on
  Duration time{};         // of all of it, sampling included
};

// Decides when drafting at a lower level pays, and how far to draft.
//
// Of every draft level that is cheaper than the verifying one and every number of drafts it
// estimates the tokens per time against plain steps (SpeculativeGain), from the acceptance so far
// and the cost model's times, and takes the best; a plain step where none gains enough. What rounds
// and plain steps really gave, against what was expected, corrects the estimate, so that neither a
// wrong cost model nor drafts that are accepted in clusters keep a losing setting on. Acceptance
// starts at the draft level's quality relative to the verifying level's. Old measurements fade.
// While plain steps win, one round in many probes whether that still holds, and the reverse.
//
// Not thread-safe; no clock: times come with what is observed.
class SpeculationPolicy {
 public:
  // `max_drafts` 0: plain steps always.
  SpeculationPolicy(Ladder ladder, int max_drafts);

  // A round may give `most_tokens` at most: what is left of the stream, or of a step's rows.
  // Changes nothing.
  SpeculationChoice Choose(int verify_level, int64_t most_tokens,
                           const CostModel& cost_model) const;
  void Observe(const SpeculationRound& round, const CostModel& cost_model);

  // The estimate of how often a draft is accepted.
  double AcceptanceOf(int draft_level, int verify_level) const;

 private:
  // The ratio of two sums whose old parts fade: with every addition, and slowly with every round
  // and step, since the next text is another one.
  struct FadingRatio {
    double numerator = 0;
    double denominator = 0;
    int64_t updated = 0;  // in observations
    void Add(double to_numerator, double to_denominator, int64_t now);
    // Denominators add up to observations; the fewer are remembered, the more `prior` counts.
    double Value(double prior, int64_t now) const;
  };
  // Against what was expected.
  struct Correction {
    FadingRatio plain_time;
    FadingRatio round_time;
    FadingRatio round_tokens;
  };
  struct Estimate {
    SpeculationChoice choice;
    double gain = 0;
  };

  double RoundSeconds(int verify_level, const SpeculationChoice& choice,
                      const CostModel& cost_model) const;
  Estimate BestRound(int verify_level, int max_drafts, const CostModel& cost_model) const;

  const Ladder ladder_;
  const int max_drafts_;
  std::vector<FadingRatio> acceptance_;  // [draft level, verifying level]
  std::vector<Correction> corrections_;  // by verifying level
  int64_t num_observed_ = 0;
  int64_t steps_since_round_ = 0;
  int64_t rounds_since_step_ = 0;
};

}  // namespace nestor
