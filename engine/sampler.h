#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace nestor {

struct SamplingOptions {
  double temperature = 0;         // 0 is greedy
  int32_t top_k = 0;              // 0: no limit
  double top_p = 1;               // (0, 1]
  double repetition_penalty = 1;  // > 0; CTRL (1909.05858), as transformers applies it
  uint64_t seed = 0;
};

// INVALID_ARGUMENT names the field, its range and its value.
absl::Status Validate(const SamplingOptions& options);

// Draws the tokens of one sequence. Same options, same logits: same tokens, whoever shares the
// batch, since the randomness of a draw hangs on the seed and the token's index alone
// (GumbelNoise). Not thread-safe.
class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options);
  // Tokens that the repetition penalty counts: the prompt, then what was sampled.
  void AddContext(std::span<const int32_t> tokens);
  // The next token from `logits` [vocabulary]; it becomes part of the context.
  int32_t Sample(std::span<const float> logits);
  // What Sample would draw from `logits` once it had drawn `ahead`. Nothing becomes of it: a draft.
  int32_t Peek(std::span<const float> logits, std::span<const int32_t> ahead);

 private:
  // The logits with the repetition penalty of the context and `ahead`.
  std::span<const float> Penalise(std::span<const float> logits, std::span<const int32_t> ahead);
  bool IsInContext(int32_t token) const;
  int32_t Draw(std::span<const float> logits, uint64_t index);
  // Sets candidates_ to the top_k likeliest.
  void KeepTopK(std::span<const float> logits, float highest);
  // Sets candidates_ to the likeliest that reach top_p together: of all, or of those that KeepTopK
  // left (`is_limited`).
  void KeepTopP(std::span<const float> logits, float highest, bool is_limited);
  // Sets candidates_ to those within `reach` of the highest logit. True where these are all.
  bool Gather(std::span<const float> logits, float highest, double reach);

  const SamplingOptions options_;
  uint64_t num_sampled_ = 0;
  std::vector<uint64_t> context_;  // a bit for every token up to the highest
  // Scratch, kept between calls.
  std::vector<float> penalised_;
  std::vector<std::pair<float, int32_t>> candidates_;
};

// Watches generated text for stop strings.
class StopMatcher {
 public:
  // REQUIRES: no stop string is empty.
  explicit StopMatcher(std::vector<std::string> stops) : stops_(std::move(stops)) {}
  // Adds `text` and returns what may be shown: text that could still become a stop string is held
  // back. After a match `matched()` is true and the stop string and all behind it are left out.
  std::string Push(std::string text);
  // What was held back, at the end of a generation that did not match.
  std::string Flush();
  bool matched() const { return matched_; }

 private:
  const std::vector<std::string> stops_;
  std::string held_;
  bool matched_ = false;
};

}  // namespace nestor
