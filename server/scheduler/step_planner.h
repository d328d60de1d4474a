#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "server/scheduler/budget.h"
#include "server/scheduler/cost_model.h"
#include "server/scheduler/task_queue.h"
#include "server/scheduler/time.h"

namespace nestor {

// Why a task runs below the best level that its budget allows.
enum class Degradation : uint8_t { kNone, kLatencyTarget, kFirstTokenTarget, kPerTokenTarget };
inline constexpr Degradation kDegradations[] = {
    Degradation::kLatencyTarget, Degradation::kFirstTokenTarget, Degradation::kPerTokenTarget};
// "latency_target", ...; "" for kNone.
const char* NameOf(Degradation degradation);

// A task that has a sequence in the engine, as the planner sees it.
struct TaskView {
  TaskId id = 0;
  const Sla* sla = nullptr;
  TimePoint arrival;
  std::optional<TimePoint> last_token;  // when the last token came out; none before the first
  int64_t prompt_left = 0;              // prompt tokens not yet run; 0: the task decodes
  int64_t tokens_left = 0;              // tokens still to generate, at most
};

struct StepLimits {
  int64_t max_step_rows = 0;
  int64_t prefill_chunk = 0;   // prompt tokens of a step at most, over all its tasks
  bool splits_prompts = true;  // false: an encoder, whose texts run whole, up to max_step_rows
};

struct StepSnapshot {
  std::vector<TaskView> tasks;  // those that can run now
  StepLimits limits;
  const CostModel* cost_model = nullptr;
  size_t num_levels = 0;
};

// What the next step runs.
struct StepDecision {
  struct Entry {
    size_t task = 0;  // index into StepSnapshot::tasks
    int64_t rows = 0;
    int level = 0;
    Degradation degradation = Degradation::kNone;
  };
  std::vector<Entry> entries;
  std::vector<int64_t> rows_by_level;
  std::vector<int64_t> tasks_by_level;
  Duration predicted{};
};

// Plans one step; a pure function of the snapshot and `now`. Replaces what `decision` held, which
// is kept from step to step so that planning does not allocate. Who runs (select), at which level
// (choose), and who may run better for nothing (raise) are decided in this order.
//
//  select  every task that decodes has a row; prompts fill what is left, by priority and arrival.
//  choose  the best allowed level whose predicted time meets the task's targets, given the rest of
//          the batch; where none does, the fastest allowed level. Tasks without targets run at
//          their best level. Lower priorities choose first, so they give way first.
//  raise   a task below its best level takes a better allowed one where that leaves the predicted
//          time of the step as it is (a memory-bound pass costs what its largest level costs).
void PlanStep(const StepSnapshot& snapshot, TimePoint now, StepDecision* decision);

}  // namespace nestor
