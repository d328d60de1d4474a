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
  // which nothing follows; drafts, and what was verified in vain.
  int64_t rows = 0;
  double relative_cost = 0;
  double relative_flops = 0;
  double flops = 0;
  // Without the last two: rows that the result rests on.
  int64_t kept_rows = 0;
  double quality = 0;
  // Tokens drafted for speculation, and how many of them were generated.
  int64_t drafted_tokens = 0;
  int64_t accepted_tokens = 0;
  Duration queue_time{};
  Duration prefill_time{};
  Duration decode_time{};
  Degradation degradation = Degradation::kNone;  // of the first degraded row
  bool has_target = false;
  bool target_met = true;

  void AddPromptRows(int level, int64_t rows, const LevelView& view);
  void AddDecodeRow(const LevelView& view);
  // Rows of drafts, or of drafted tokens that were verified in vain.
  void AddDiscardedRows(int64_t rows, const LevelView& view);
  void AddGeneratedToken(int level);
  // Adds the usage of another task of the same request, which ran beside this one: times are those
  // of the slower.
  void Merge(const Usage& other);

 private:
  void AddKeptRows(int64_t num_rows, const LevelView& view);
};

}  // namespace nestor
