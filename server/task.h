#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/sampler.h"
#include "server/scheduler/budget.h"
#include "server/scheduler/task_queue.h"
#include "server/scheduler/time.h"
#include "server/usage.h"

namespace nestor {

enum class TaskKind : uint8_t { kGenerate, kScore, kEmbed };

enum class FinishReason : uint8_t {
  kStop,      // an end token or a stop string
  kLength,    // max_tokens
  kComplete,  // Score and Embed
  kDrain,     // the server's drain limit
};

// One generated token and the text it completes.
struct GeneratedToken {
  int32_t id = 0;
  std::string text;
};

struct TaskResult {
  FinishReason finish_reason = FinishReason::kComplete;
  std::string text;                       // what was held back until the end (kGenerate)
  std::vector<double> log_probabilities;  // kScore: [i] is of tokens[i + 1]
  std::vector<float> embedding;           // kEmbed
  Usage usage;
};

// Where the results of a task go. The worker calls Push any number of times and then Finish
// exactly once, without a lock held; it does not touch the object afterwards. Calls come one at a
// time, and must not block.
class TaskOutput {
 public:
  virtual ~TaskOutput() = default;
  // Returns false where the reader is behind and its buffer is now full: the sequence pauses until
  // Worker::Resume.
  virtual bool Push(GeneratedToken token) = 0;
  // `status` not OK: the task failed, and `result` is what it ran until then. A task that the
  // drain limit ends has finish reason kDrain and status UNAVAILABLE.
  virtual void Finish(const absl::Status& status, TaskResult result) = 0;
};

// One request, or one text of an Embed request, as the worker runs it.
struct Task {
  TaskKind kind = TaskKind::kGenerate;
  std::vector<int32_t> tokens;  // not empty
  Sla sla;
  TimePoint arrival;
  TimePoint deadline = TimePoint::max();
  TaskOutput* output = nullptr;  // borrowed; must live until Finish has been called

  // kGenerate
  int64_t max_tokens = 0;  // at least 1; tokens.size() + max_tokens fits the engine
  bool ignores_end_tokens = false;
  bool may_speculate = false;
  SamplingOptions sampling;
  std::vector<std::string> stops;
};

}  // namespace nestor
