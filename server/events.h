#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "server/scheduler/step_planner.h"
#include "server/scheduler/time.h"
#include "server/task.h"

namespace nestor {

// Why a task that had been accepted did not finish.
enum class Failure : uint8_t {
  kCancelled,   // by the client
  kDeadline,    // its deadline passed
  kSlowReader,  // nobody read the stream
  kNonFinite,   // its activations overflowed
  kDrain,       // the drain limit
  kInternal,
};
inline constexpr Failure kFailures[] = {Failure::kCancelled,  Failure::kDeadline,
                                        Failure::kSlowReader, Failure::kNonFinite,
                                        Failure::kDrain,      Failure::kInternal};

enum class TokenKind : uint8_t { kPrompt, kCompletion };

struct StepEvent {
  int64_t rows = 0;
  Duration actual{};
  Duration predicted{};
};

// Drafts of a round that were held against the verifying level.
struct SpeculationEvent {
  int64_t num_drafted = 0;
  int64_t num_accepted = 0;
};

// The state of the worker after a step.
struct LoadEvent {
  int64_t num_running = 0;
  int64_t num_waiting = 0;
  double kv_cache_usage = 0;  // in [0, 1]
};

// What happens inside the server, one method per event, for whoever counts it. Thread-safe; calls
// are short and do not block.
class Events {
 public:
  virtual ~Events() = default;
  // A request that was not accepted.
  virtual void OnRejected(absl::StatusCode code) = 0;
  virtual void OnLoad(const LoadEvent& load) = 0;
  virtual void OnStep(const StepEvent& step) = 0;
  // A round of drafts ended; its steps are counted by OnStep.
  virtual void OnSpeculation(const SpeculationEvent& round) = 0;
  // `count` tokens ran (prompt) or were drawn (completion) at `level`.
  virtual void OnTokens(int level, TokenKind kind, int64_t count) = 0;
  virtual void OnFirstToken(Duration since_arrival) = 0;
  virtual void OnNextToken(Duration since_last) = 0;
  virtual void OnFinished(FinishReason reason, const Usage& usage, Duration since_arrival) = 0;
  virtual void OnFailed(Failure failure, const Usage& usage) = 0;
};

}  // namespace nestor
