#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "server/scheduler/ladder.h"
#include "server/scheduler/step_planner.h"
#include "server/scheduler/time.h"

namespace nestor {

struct LevelRun {
  int level = 0;
  int64_t tokens = 0;
  bool operator==(const LevelRun&) const = default;
};

// What a request really ran, and how long it took. Sums, so that the usages of several tasks can
// be merged into that of one request.
struct Usage {
  std::vector<LevelRun> prompt_levels;
  std::vector<LevelRun> completion_levels;  // the level that each generated token was drawn at
  int64_t prompt_tokens = 0;
  int64_t completion_tokens = 0;
  // Over the rows that the engine ran: every prompt token, and every generated one but the last,
  // which nothing follows.
  int64_t rows = 0;
  double relative_cost = 0;
  double relative_flops = 0;
  double quality = 0;
  double flops = 0;
  Duration queue_time{};
  Duration prefill_time{};
  Duration decode_time{};
  Degradation degradation = Degradation::kNone;  // of the first degraded row
  bool has_target = false;
  bool target_met = true;

  void AddPromptRows(int level, int64_t rows, const LevelView& view);
  void AddDecodeRow(const LevelView& view);
  void AddGeneratedToken(int level);
  // Adds the usage of another task of the same request, which ran beside this one: times are those
  // of the slower.
  void Merge(const Usage& other);

 private:
  void AddRows(int64_t num_rows, const LevelView& view);
};

}  // namespace nestor
