#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/chat_template.h"
#include "engine/nested_model.h"
#include "engine/raise_levels.h"
#include "engine/tokenizer.h"
#include "kernels/backend.h"

namespace nestor {

using SequenceId = int64_t;

// What one sequence does in a step: `tokens` follow what it has already processed, at `level`.
struct StepEntry {
  enum class Output : uint8_t {
    kNone,              // a prompt chunk that is not the last
    kLastLogits,        // logits after the last token: sample from them
    kAllLogits,         // logits after every token: verify a draft
    kLogProbabilities,  // of `targets` after each token (Score)
    kEmbedding,         // encoders: the pooled rows; of a classifier the labels' logits
  };
  SequenceId sequence = 0;
  std::span<const int32_t> tokens;
  int level = 0;
  // Levels that the engine may run the entry at instead, where another entry of the step runs at
  // them and the step gets cheaper by it (raise_levels.h). StepResult says what it did.
  LevelSet may_run = 0;
  Output output = Output::kNone;
  // kLogProbabilities: targets[i] is what follows tokens[i]; -1 leaves that row unscored.
  std::span<const int32_t> targets;
  // Encoders: tokens from this one on are a pair's second text, which has a token type of its own.
  size_t second_text = std::numeric_limits<size_t>::max();
};

// One forward pass: rows of several sequences at several levels.
struct StepPlan {
  std::vector<StepEntry> entries;
};

// Entry by entry as in the plan. Spans point into the engine and live until the next Step.
struct StepResult {
  struct Entry {
    int executed_level = 0;
    // Logits [vocabulary], kAllLogits [tokens, vocabulary], or ModelSpec::output_size() values.
    std::span<const float> values;
    std::span<const double> log_probabilities;  // [tokens]; 0 where unscored
    absl::Status status;  // not OK: this sequence failed (non-finite activations); others go on
  };
  std::vector<Entry> entries;
  LinearCost executed;  // counted by the backend during this step
};

// Sees the input of every linear layer (calibration).
class LinearInputObserver {
 public:
  virtual ~LinearInputObserver() = default;
  // `inputs` is [rows, cols]. Layers that share an input are called one after the other with the
  // same values.
  virtual void Observe(size_t layer, const float* inputs, int64_t rows, int64_t cols) = 0;
};

struct EngineOptions {
  // Rows of one step at most, prompt chunks included.
  int64_t max_step_rows = 512;
  // Memory for the KV cache at most; less where `max_sequences` of full context need less.
  int64_t kv_cache_bytes = int64_t{1} << 30;
  int64_t max_sequences = 64;
  int64_t page_size = 16;  // positions
};

// Runs one nested model on one backend, step by step.
//
// Not thread-safe: one thread owns an engine. tokenizer(), chat_template() and model() are
// immutable and may be used from any thread.
class Engine {
 public:
  // Loads every weight into the backend. FAILED_PRECONDITION where a tokenizer is missing;
  // RESOURCE_EXHAUSTED says how many bytes were needed and how many there are.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(std::unique_ptr<NestedModel> model,
                                                        std::unique_ptr<Backend> backend,
                                                        const EngineOptions& options);
  virtual ~Engine() = default;

  virtual const NestedModel& model() const = 0;
  virtual const Tokenizer& tokenizer() const = 0;
  virtual const ChatTemplate* chat_template() const = 0;  // null: the checkpoint has none
  virtual const EngineOptions& options() const = 0;
  virtual const Backend& backend() const = 0;

  // Positions a sequence may hold: the model's context, or what the whole KV cache has room for.
  virtual int64_t max_sequence_length() const = 0;
  // True where AddSequence(max_length) would succeed now.
  virtual bool HasRoomFor(int64_t max_length) const = 0;
  // Reserves KV pages for `max_length` positions, so a sequence that has begun never lacks room.
  // RESOURCE_EXHAUSTED where they are not free; INVALID_ARGUMENT beyond max_sequence_length().
  virtual absl::StatusOr<SequenceId> AddSequence(int64_t max_length) = 0;
  // Frees its pages at once. REQUIRES: the sequence exists.
  virtual void RemoveSequence(SequenceId sequence) = 0;
  // Positions processed so far.
  virtual int64_t LengthOf(SequenceId sequence) const = 0;
  // Forgets the positions from `length` on; their pages stay reserved, and later steps overwrite
  // them. REQUIRES: the sequence exists, and has processed at least `length` positions.
  virtual void Truncate(SequenceId sequence, int64_t length) = 0;
  virtual int64_t free_pages() const = 0;
  virtual int64_t num_pages() const = 0;

  // Replaces what `result` held. With a plan and a result that are kept from step to step, one that
  // is like those before it does not allocate.
  // INVALID_ARGUMENT (nothing has run) for an empty plan, a sequence twice, token ids out of
  // range, a level that does not exist, more rows than max_step_rows, or a sequence that would
  // outgrow its reservation.
  virtual absl::Status Step(const StepPlan& plan, StepResult* result) = 0;
  // The same for who steps once in a while.
  absl::StatusOr<StepResult> Step(const StepPlan& plan);

  // Borrowed; null for none.
  virtual void SetObserver(LinearInputObserver* observer) = 0;
};

}  // namespace nestor
