#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/classifier.h"
#include "engine/engine.h"
#include "engine/nested_model.h"
#include "kernels/backend.h"

namespace nestor {

// Rows [begin, end) of a step run at one level.
struct LevelRun {
  int64_t begin = 0;
  int64_t end = 0;
  int level = 0;
};

// The rows of one forward pass. `runs` cover them without gaps.
struct StepRows {
  std::span<const int32_t> tokens;
  std::span<const int32_t> positions;
  std::span<const int32_t> types;  // of tokens; read where the model has a table of them
  std::span<const SequenceRows> sequences;
  std::span<const LevelRun> runs;
};

// A model's weights on a backend, and its forward pass: what ModelSpec describes, turned into the
// backend's operations. Knows rows and levels, not requests. Not thread-safe.
class Transformer {
 public:
  // `model` and `backend` are borrowed and must outlive this. `max_rows`: of a step;
  // `max_output_rows`: of one Logits call.
  static absl::StatusOr<std::unique_ptr<Transformer>> Load(const NestedModel* model,
                                                           Backend* backend, int64_t max_rows,
                                                           int64_t max_output_rows);

  // Leaves the hidden state of every row on the device.
  void Forward(const StepRows& step);
  // Logits [rows.size(), vocabulary] of some rows of the last Forward; `runs` counts in entries of
  // `rows`. REQUIRES: rows.size() <= max_output_rows.
  void Logits(std::span<const int64_t> rows, std::span<const LevelRun> runs, float* out);
  // The pooled hidden states [sequences.size(), hidden] of the last Forward (encoders), or what a
  // classifier makes of them, [sequences.size(), labels].
  // REQUIRES: sequences.size() <= max_output_rows.
  void Pool(std::span<const SequenceRows> sequences, float* out);

  void SetObserver(LinearInputObserver* observer) { observer_ = observer; }

 private:
  struct Norm {
    VectorId gain = kNone;
    VectorId bias = kNone;
  };
  // Layer indices of a block, -1 where it has none.
  struct Block {
    int query = -1, key = -1, value = -1, attention_out = -1, gate = -1, up = -1, down = -1;
    Norm attention_norm, mlp_norm, query_norm, key_norm;
  };

  Transformer(const NestedModel* model, Backend* backend) : model_(model), backend_(backend) {}
  absl::Status LoadLayers();
  absl::Status LoadEmbeddings();
  absl::Status LoadBlocks();
  absl::Status AllocateTensors(int64_t max_rows, int64_t max_output_rows);
  absl::StatusOr<Norm> LoadNorm(const std::string& name, int64_t size);
  absl::StatusOr<TableId> LoadTable(const std::string& name, int64_t min_rows);

  void Embed(const StepRows& step);
  void RunBlock(int64_t index, const StepRows& step);
  void Normalise(const Norm& norm, const Tensor& in, const Tensor& out, int64_t rows);
  // Every head of `heads` [rows, count * head_dim] on its own, in place; nothing without a norm.
  void NormaliseHeads(const Norm& norm, const Tensor& heads, int64_t rows);
  // Runs layers that share `in` over `runs`.
  struct Projection {
    int layer;
    Tensor out;
  };
  void Project(const Tensor& in, int64_t rows, std::span<const LevelRun> runs,
               std::span<const Projection> projections, bool add_to_output);
  // Fills in parts_: one for each projection, with its groups of `runs`.
  void PlanParts(std::span<const LevelRun> runs, std::span<const Projection> projections);
  void RunMlp(const Tensor& in, int64_t rows, std::span<const LevelRun> runs, const Block& block);
  void Observe(const Tensor& in, int64_t rows, std::span<const Projection> projections);

  const NestedModel* const model_;
  Backend* const backend_;
  LinearInputObserver* observer_ = nullptr;

  std::vector<LinearId> linears_;  // by layer
  std::vector<Block> blocks_;
  int head_ = -1;
  Norm embedding_norm_, final_norm_;
  std::unique_ptr<Classifier> classifier_;  // null: none
  TableId token_table_ = kNone, position_table_ = kNone, type_table_ = kNone;
  VectorId inverse_frequencies_ = kNone;

  Tensor hidden_, normed_, query_, key_, value_, gate_, up_;
  Tensor output_hidden_, output_normed_, output_;  // [max_output_rows, ...]

  // Scratch of a call, kept so that a steady step does not allocate.
  std::vector<RowGroup> groups_;
  std::vector<size_t> group_begin_;
  std::vector<LinearPart> parts_;
  std::vector<float> observed_;
  std::vector<float> pooled_;
};

}  // namespace nestor
