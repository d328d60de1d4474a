#pragma once

#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "server/scheduler/ladder.h"
#include "server/scheduler/time.h"

namespace nestor {

// What a client asks for. Every field is optional; the empty budget asks for the best quality.
struct Budget {
  std::optional<Duration> latency_target = std::nullopt;
  std::optional<Duration> first_token_target = std::nullopt;
  std::optional<Duration> per_token_target = std::nullopt;
  std::optional<double> max_cost = std::nullopt;
  std::optional<double> min_quality = std::nullopt;
  std::optional<int> level = std::nullopt;
  std::optional<int> priority = std::nullopt;
};

// What `max_cost` bounds: bytes of a decoded token (Generate), FLOPs (Score, Embed).
enum class CostMeasure { kRelativeCost, kRelativeFlops };

// A budget resolved against the served model: what the policy may do.
struct Sla {
  // Allowed levels, best quality first; of equals the costlier first. Never empty.
  std::vector<int> levels;
  std::optional<Duration> latency_target;
  std::optional<Duration> first_token_target;
  std::optional<Duration> per_token_target;
  int priority = 1;  // 1 is the highest

  bool has_target() const {
    return latency_target.has_value() || first_token_target.has_value() ||
           per_token_target.has_value();
  }
};

// INVALID_ARGUMENT: a value out of range, or a pinned level that contradicts `max_cost` or
// `min_quality`; the message names the field and the value. FAILED_PRECONDITION: no level meets
// the budget; the message names the cheapest level that would.
absl::StatusOr<Sla> ResolveBudget(const Budget& budget, const Ladder& ladder, CostMeasure measure,
                                  int default_priority);

}  // namespace nestor
