#pragma once

#include <chrono>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "engine/sampler.h"

namespace nestor {

// Verifying runs up to this many rows more than a plain step: 16 rows together give each row
// exactly what it gives alone.
inline constexpr int64_t kMaxDrafts = 8;

// One round of self-speculative decoding (Leviathan, Kalman, Matias 2023, arXiv 2211.17192; with
// one model as its own drafter: Zhang et al. 2023, arXiv 2309.08168): a low level of the nested
// model drafts tokens one by one, then one step at the level that is asked for runs them all, on
// the same weights and in the same KV cache, whose draft keys it overwrites. Tokens are drawn from
// that step's logits as plain decoding draws them, while they agree with the draft; so they are
// token for token those of plain decoding.
//
//   round.Run(shape, &sampler);
//   while (round.Accept(sampler.Sample(round.logits()))) {}
//   round.Settle();
//
// Not thread-safe; `engine` is borrowed. Kept between rounds, so that a steady round does not
// allocate.
class SpeculativeRound {
 public:
  struct Shape {
    SequenceId sequence = 0;
    int32_t token = 0;  // the last one drawn, which has not run yet
    int draft_level = 0;
    int verify_level = 0;
    int64_t num_drafts = 0;  // at most kMaxDrafts
  };
  // A step that the round took.
  struct RanStep {
    int level = 0;
    int64_t rows = 0;
    std::chrono::steady_clock::duration time{};
    int64_t weight_bytes = 0;
  };

  explicit SpeculativeRound(Engine* engine);

  // Drafts with `sampler`'s Peek, and verifies. Errors are Engine::Step's: one is a sequence
  // reserved for fewer than num_drafts + 1 positions more.
  absl::Status Run(const Shape& shape, Sampler* sampler);

  // Not OK: the sequence failed, as plain decoding would have (StepResult::Entry::status). A draft
  // that is not finite ends the drafting; where a drafted row makes verifying so, the token runs
  // alone.
  const absl::Status& sequence_status() const { return sequence_status_; }
  // What to draw the next token from. Lives until the engine's next step. REQUIRES: the sequence
  // has not failed, and Accept has not returned false since Run.
  std::span<const float> logits() const;
  // `token` was drawn from logits(). True where it is what was drafted there, so that logits() are
  // now those after it; false ends the round.
  bool Accept(int32_t token);
  // Forgets what was run beyond the tokens drawn, of which the last has not run. Call it where the
  // sequence lives on, however many tokens were taken.
  void Settle();

  // Of the round so far. Where verifying was not finite, nothing counts as drafted.
  std::span<const RanStep> steps() const { return steps_; }
  int64_t num_drafted() const { return static_cast<int64_t>(drafts().size()); }
  int64_t num_drawn() const { return num_drawn_; }
  int64_t num_accepted() const { return num_accepted_; }

 private:
  std::span<const int32_t> drafts() const { return std::span(tokens_).subspan(1); }
  absl::Status Draft(Sampler* sampler);
  // Runs the token and what was drafted.
  absl::Status Verify();
  // One step of `tokens`; its entry's status is for the caller to judge.
  absl::StatusOr<StepResult::Entry> Step(std::span<const int32_t> tokens, int level,
                                         StepEntry::Output output);

  Engine* const engine_;
  StepPlan plan_;
  StepResult result_;
  Shape shape_;
  int64_t length_ = 0;           // of the sequence, before the round
  std::vector<int32_t> tokens_;  // the token, and what was drafted after it
  absl::Status sequence_status_;
  std::span<const float> logits_;  // [drafts + 1, vocabulary]
  int64_t num_drawn_ = 0;
  int64_t num_accepted_ = 0;
  std::vector<RanStep> steps_;
};

}  // namespace nestor
