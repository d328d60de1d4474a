#include "server/warm_up.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "base/status_macros.h"

namespace nestor {
namespace {

constexpr int64_t kSequenceCounts[] = {1, 4, 16};
constexpr int64_t kTextTokens = 32;  // of an encoder's warm-up text
constexpr int kDecodeRepeats = 3;
constexpr int kPrefillRepeats = 2;
// A few positions for the prompt that a decode step has behind it.
constexpr int64_t kContext = 8;

// Any tokens do: the time of a step depends on their number.
std::vector<int32_t> TokensFor(int64_t count, int64_t vocabulary) {
  std::vector<int32_t> tokens(count);
  for (int64_t i = 0; i < count; ++i) tokens[i] = static_cast<int32_t>((i * 7919 + 1) % vocabulary);
  return tokens;
}

class Sequences {
 public:
  explicit Sequences(Engine* engine) : engine_(engine) {}
  ~Sequences() {
    for (const SequenceId id : ids_) engine_->RemoveSequence(id);
  }
  Sequences(const Sequences&) = delete;
  Sequences& operator=(const Sequences&) = delete;

  absl::Status Add(int64_t count, int64_t length) {
    for (int64_t i = 0; i < count; ++i) {
      NESTOR_ASSIGN_OR_RETURN(const SequenceId id, engine_->AddSequence(length));
      ids_.push_back(id);
    }
    return absl::OkStatus();
  }

  // One step in which every sequence runs `tokens`. Returns its time.
  absl::StatusOr<Duration> Step(const std::vector<int32_t>& tokens, int level,
                                StepEntry::Output output) {
    StepPlan plan;
    for (const SequenceId id : ids_) {
      StepEntry entry;
      entry.sequence = id;
      entry.tokens = tokens;
      entry.level = level;
      entry.output = output;
      plan.entries.push_back(entry);
    }
    const TimePoint begin = Clock::now();
    const absl::StatusOr<StepResult> result = engine_->Step(plan);
    const Duration time = Clock::now() - begin;
    if (!result.ok()) return result.status();
    for (const StepResult::Entry& entry : result->entries) NESTOR_RETURN_IF_ERROR(entry.status);
    return time;
  }

 private:
  Engine* const engine_;
  std::vector<SequenceId> ids_;
};

// What one measurement runs: `num_sequences` sequences, each `tokens_each` tokens a step.
struct Shape {
  int64_t num_sequences = 1;
  int64_t tokens_each = 1;
  int repeats = 1;
  bool is_decode = false;  // steps follow each other in the same sequences
  StepEntry::Output output = StepEntry::Output::kLastLogits;

  int64_t rows() const { return num_sequences * tokens_each; }
};

// The shortest time of the repeats, after one that is not counted.
absl::StatusOr<Duration> Measure(const Shape& shape, int level, Engine* engine,
                                 int64_t vocabulary) {
  const std::vector<int32_t> tokens = TokensFor(shape.tokens_each, vocabulary);
  Duration best = Duration::max();
  if (shape.is_decode) {
    Sequences sequences(engine);
    NESTOR_RETURN_IF_ERROR(sequences.Add(shape.num_sequences, kContext));
    for (int i = 0; i <= shape.repeats; ++i) {
      NESTOR_ASSIGN_OR_RETURN(const Duration time, sequences.Step(tokens, level, shape.output));
      if (i > 0) best = std::min(best, time);
    }
    return best;
  }
  for (int i = 0; i <= shape.repeats; ++i) {
    Sequences sequences(engine);
    NESTOR_RETURN_IF_ERROR(sequences.Add(shape.num_sequences, shape.tokens_each));
    NESTOR_ASSIGN_OR_RETURN(const Duration time, sequences.Step(tokens, level, shape.output));
    if (i > 0) best = std::min(best, time);
  }
  return best;
}

std::vector<Shape> ShapesFor(const ServedModel& model, int64_t prefill_chunk,
                             const EngineOptions& options) {
  std::vector<Shape> shapes;
  for (const int64_t count : kSequenceCounts) {
    if (count > options.max_sequences) continue;
    Shape shape = {.num_sequences = count, .repeats = kDecodeRepeats, .is_decode = true};
    if (model.is_encoder) {
      shape.is_decode = false;
      shape.tokens_each = std::min(kTextTokens, model.max_sequence_length);
      shape.output = StepEntry::Output::kEmbedding;
    }
    if (shape.rows() <= options.max_step_rows) shapes.push_back(shape);
  }
  if (!model.is_encoder) {
    shapes.push_back(
        {.tokens_each = std::min({prefill_chunk, model.max_sequence_length, options.max_step_rows}),
         .repeats = kPrefillRepeats});
  }
  return shapes;
}

}  // namespace

absl::Status WarmUp(int64_t prefill_chunk, Engine* engine, ServedModel* model,
                    CostModel* cost_model) {
  const std::vector<Shape> shapes = ShapesFor(*model, prefill_chunk, engine->options());
  for (size_t level = 0; level < model->levels.size(); ++level) {
    for (const Shape& shape : shapes) {
      const absl::StatusOr<Duration> measured =
          Measure(shape, static_cast<int>(level), engine, model->vocabulary);
      // A small KV cache holds fewer sequences than the largest measurement wants.
      if (absl::IsResourceExhausted(measured.status()) && shape.num_sequences > 1) continue;
      NESTOR_ASSIGN_OR_RETURN(const Duration time, measured);
      cost_model->AddMeasurement(static_cast<int>(level), shape.rows(), time);
      // One sequence that decodes, or the largest batch of an encoder.
      const bool tells_speed = model->is_encoder || (shape.is_decode && shape.num_sequences == 1);
      if (tells_speed) {
        model->levels[level].tokens_per_second =
            static_cast<double>(shape.rows()) / std::max(SecondsOf(time), 1e-9);
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace nestor
