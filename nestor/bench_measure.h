#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <random>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "base/progress.h"
#include "engine/engine.h"

namespace nestor {

// What one timed run of the engine did.
struct Timing {
  double seconds = 0;
  int64_t tokens = 0;
  int64_t weight_bytes = 0;              // counted by the backend during the run, as is the next
  int64_t flops = 0;                     // of linear layers: attention is left out
  std::map<int, int64_t> rows_by_level;  // as executed; of Decode alone

  double tokens_per_second() const { return static_cast<double>(tokens) / seconds; }
  double weight_gbps() const { return static_cast<double>(weight_bytes) / seconds / 1e9; }
  double gflops() const { return static_cast<double>(flops) / seconds / 1e9; }
};

// What decoding in rounds of speculation did; with no drafts, in plain steps.
struct SpeculationMeasurement {
  Timing decoding;
  int64_t num_examined = 0;  // drafts that were held against what was drawn
  int64_t num_accepted = 0;
  double draft_seconds = 0;
  int64_t draft_steps = 0;
  double verify_seconds = 0;  // of plain steps too
  int64_t verify_steps = 0;

  // 0 where there is none.
  double acceptance() const;
  double draft_step_seconds() const;
  double verify_step_seconds() const;
};

// Runs `jobs` one after the other, `rounds` times over and once before that uncounted, so that a
// machine's slow moments fall on all of them alike; gives each job's median time. Every job must
// do the same work in each round. REQUIRES: rounds >= 1.
absl::StatusOr<std::vector<Timing>> MedianOfRounds(
    const std::vector<std::function<absl::StatusOr<Timing>()>>& jobs, int rounds,
    Progress* progress);

// Times the engine's steps, with random prompts and greedy sampling, as a daemon with nothing else
// to do would run them. What it adds to the engine it removes again. Not thread-safe; `engine` is
// borrowed. Errors are the engine's own.
class EngineTimer {
 public:
  explicit EngineTimer(Engine* engine) : engine_(engine) {}

  // How a step with rows at several levels runs.
  enum class Mix {
    kAsAsked,        // in one pass
    kEngineChooses,  // in one pass; the engine may raise rows to any level of the step
    kPassPerLevel,   // in one pass for every level
  };
  struct DecodeShape {
    std::vector<int> levels;  // one for each row
    int64_t context = 16;     // random tokens before the first step, not timed
    int64_t steps = 64;
    Mix mix = Mix::kAsAsked;
  };
  // One token for every row in each of the steps. REQUIRES: context >= 1.
  absl::StatusOr<Timing> Decode(const DecodeShape& shape);
  struct SpeculationShape {
    std::span<const std::vector<int32_t>> prompts;  // token ids, decoded one after the other
    int draft_level = 0;
    int verify_level = 0;
    int64_t num_drafts = 0;  // of each round, at most kMaxDrafts; 0: plain steps
    int64_t tokens = 64;     // of each prompt, fewer where the model ends its text
  };
  // One stream that decodes greedily, in rounds as a daemon runs them. Prompts are not timed.
  absl::StatusOr<SpeculationMeasurement> Speculate(const SpeculationShape& shape);
  // A prompt of `tokens`, in chunks of the engine's max_step_rows, up to its last logits.
  absl::StatusOr<Timing> Prefill(int level, int64_t tokens);
  // Encoders: `texts` in their order, `batch` at a time; a batch takes as many steps as
  // max_step_rows asks for. INVALID_ARGUMENT for a text of more tokens than that. REQUIRES:
  // batch >= 1.
  absl::StatusOr<Timing> Embed(int level, std::span<const std::vector<int32_t>> texts,
                               int64_t batch);

  std::vector<int32_t> RandomTokens(int64_t count);
  // Adds one prompt of `shape` to `measurement`.
  absl::Status SpeculateOn(const SpeculationShape& shape, std::span<const int32_t> prompt,
                           SpeculationMeasurement* measurement);

 private:
  Engine* const engine_;
  std::mt19937 random_{20250131};
};

}  // namespace nestor
