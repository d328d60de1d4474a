#include "engine/transformer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

int64_t QuerySize(const ModelSpec& spec) { return spec.num_heads * spec.head_dim; }
int64_t KeySize(const ModelSpec& spec) { return spec.num_kv_heads * spec.head_dim; }

// theta^(-2i / head_dim), i < head_dim / 2 (RoFormer, 2104.09864, section 3.2.2), scaled.
std::vector<float> InverseFrequencies(const ModelSpec& spec) {
  const RopeScaling& scaling = spec.rope_scaling;
  std::vector<float> frequencies;
  for (int64_t i = 0; i < spec.head_dim / 2; ++i) {
    const double frequency = std::pow(
        spec.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(spec.head_dim));
    const double turns = scaling.original_context * frequency / (2 * M_PI);
    const double kept =
        std::clamp((turns - scaling.low_frequency_factor) /
                       (scaling.high_frequency_factor - scaling.low_frequency_factor),
                   0.0, 1.0);
    frequencies.push_back(static_cast<float>(frequency * (kept + (1 - kept) / scaling.factor)));
  }
  return frequencies;
}

// Tensors are row-major, so the heads of a row are rows of their own.
Tensor PerHead(const Tensor& tensor, int64_t head_dim) {
  return {.data = tensor.data, .rows = tensor.rows * (tensor.cols / head_dim), .cols = head_dim};
}

}  // namespace

absl::StatusOr<std::unique_ptr<Transformer>> Transformer::Load(const NestedModel* model,
                                                               Backend* backend, int64_t max_rows,
                                                               int64_t max_output_rows) {
  std::unique_ptr<Transformer> transformer(new Transformer(model, backend));
  NESTOR_RETURN_IF_ERROR(transformer->LoadLayers());
  NESTOR_RETURN_IF_ERROR(transformer->LoadEmbeddings());
  NESTOR_RETURN_IF_ERROR(transformer->LoadBlocks());
  NESTOR_RETURN_IF_ERROR(transformer->AllocateTensors(max_rows, max_output_rows));
  return transformer;
}

absl::Status Transformer::LoadLayers() {
  for (size_t i = 0; i < model_->layers().size(); ++i) {
    std::vector<float> scratch;
    NESTOR_ASSIGN_OR_RETURN(const LinearWeights weights, model_->Weights(i, &scratch));
    NESTOR_ASSIGN_OR_RETURN(const LinearId id, backend_->LoadLinear(weights));
    linears_.push_back(id);
  }
  return absl::OkStatus();
}

absl::StatusOr<TableId> Transformer::LoadTable(const std::string& name, int64_t min_rows) {
  NESTOR_ASSIGN_OR_RETURN(const std::vector<float> values,
                          model_->tensors().GetFloats(name, {-1, model_->spec().hidden}));
  const int64_t rows = static_cast<int64_t>(values.size()) / model_->spec().hidden;
  if (rows < min_rows) {
    return absl::InvalidArgumentError(absl::StrCat(model_->directory(), ": tensor ", name, ": ",
                                                   rows, " rows, expected at least ", min_rows));
  }
  return backend_->LoadTable(values, rows, model_->spec().hidden);
}

absl::Status Transformer::LoadEmbeddings() {
  const ModelSpec& spec = model_->spec();
  const EmbeddingNames& names = spec.embeddings;
  if (!spec.tied_head) {
    NESTOR_ASSIGN_OR_RETURN(token_table_, LoadTable(names.token, spec.vocabulary));
  }
  if (!names.position.empty()) {
    NESTOR_ASSIGN_OR_RETURN(position_table_, LoadTable(names.position, spec.context_length));
  }
  if (!names.type.empty()) {
    NESTOR_ASSIGN_OR_RETURN(type_table_, LoadTable(names.type, spec.num_token_types));
  }
  if (!names.norm.empty()) {
    NESTOR_ASSIGN_OR_RETURN(embedding_norm_, LoadNorm(names.norm, spec.hidden));
  }
  if (!spec.final_norm.empty()) {
    NESTOR_ASSIGN_OR_RETURN(final_norm_, LoadNorm(spec.final_norm, spec.hidden));
  }
  if (spec.is_classifier()) {
    NESTOR_ASSIGN_OR_RETURN(classifier_, Classifier::Load(*model_));
  }
  if (spec.rope_theta > 0) {
    NESTOR_ASSIGN_OR_RETURN(inverse_frequencies_, backend_->LoadVector(InverseFrequencies(spec)));
  }
  return absl::OkStatus();
}

absl::StatusOr<Transformer::Norm> Transformer::LoadNorm(const std::string& name, int64_t size) {
  Norm norm;
  NESTOR_ASSIGN_OR_RETURN(const std::vector<float> gain,
                          model_->tensors().GetFloats(name + ".weight", {size}));
  NESTOR_ASSIGN_OR_RETURN(norm.gain, backend_->LoadVector(gain));
  if (model_->spec().norm == NormKind::kLayerNorm) {
    NESTOR_ASSIGN_OR_RETURN(const std::vector<float> bias,
                            model_->tensors().GetFloats(name + ".bias", {size}));
    NESTOR_ASSIGN_OR_RETURN(norm.bias, backend_->LoadVector(bias));
  }
  return norm;
}

absl::Status Transformer::LoadBlocks() {
  const ModelSpec& spec = model_->spec();
  blocks_.resize(static_cast<size_t>(spec.num_blocks));
  for (size_t i = 0; i < model_->layers().size(); ++i) {
    const LinearSpec& layer = model_->layers()[i];
    const int index = static_cast<int>(i);
    if (layer.role == LinearRole::kHead) {
      head_ = index;
      continue;
    }
    Block& block = blocks_[static_cast<size_t>(layer.block)];
    int* const slots[] = {&block.query, &block.key, &block.value, &block.attention_out,
                          &block.gate,  &block.up,  &block.down};
    *slots[static_cast<size_t>(layer.role)] = index;
  }
  for (int64_t i = 0; i < spec.num_blocks; ++i) {
    Block& block = blocks_[static_cast<size_t>(i)];
    for (const auto& [name, norm, size] :
         {std::tuple(&spec.names.attention_norm, &block.attention_norm, spec.hidden),
          std::tuple(&spec.names.mlp_norm, &block.mlp_norm, spec.hidden),
          std::tuple(&spec.names.query_norm, &block.query_norm, spec.head_dim),
          std::tuple(&spec.names.key_norm, &block.key_norm, spec.head_dim)}) {
      if (name->empty()) continue;
      NESTOR_ASSIGN_OR_RETURN(*norm, LoadNorm(NameInBlock(*name, i), size));
    }
  }
  return absl::OkStatus();
}

absl::Status Transformer::AllocateTensors(int64_t max_rows, int64_t max_output_rows) {
  const ModelSpec& spec = model_->spec();
  NESTOR_ASSIGN_OR_RETURN(hidden_, backend_->Allocate(max_rows, spec.hidden));
  if (!spec.norms_after) {
    NESTOR_ASSIGN_OR_RETURN(normed_, backend_->Allocate(max_rows, spec.hidden));
  }
  NESTOR_ASSIGN_OR_RETURN(query_, backend_->Allocate(max_rows, QuerySize(spec)));
  NESTOR_ASSIGN_OR_RETURN(key_, backend_->Allocate(max_rows, KeySize(spec)));
  NESTOR_ASSIGN_OR_RETURN(value_, backend_->Allocate(max_rows, KeySize(spec)));
  NESTOR_ASSIGN_OR_RETURN(up_, backend_->Allocate(max_rows, spec.mlp_size));
  if (!spec.names.gate.empty()) {
    NESTOR_ASSIGN_OR_RETURN(gate_, backend_->Allocate(max_rows, spec.mlp_size));
  }
  NESTOR_ASSIGN_OR_RETURN(output_hidden_, backend_->Allocate(max_output_rows, spec.hidden));
  if (!spec.is_encoder()) {
    NESTOR_ASSIGN_OR_RETURN(output_normed_, backend_->Allocate(max_output_rows, spec.hidden));
    NESTOR_ASSIGN_OR_RETURN(output_, backend_->Allocate(max_output_rows, spec.vocabulary));
  }
  // At most three layers share an input, and a step has a run for every level.
  groups_.reserve(3 * model_->levels().size());
  return absl::OkStatus();
}

void Transformer::Normalise(const Norm& norm, const Tensor& in, const Tensor& out, int64_t rows) {
  backend_->Norm({.kind = model_->spec().norm,
                  .epsilon = model_->spec().norm_epsilon,
                  .gain = norm.gain,
                  .bias = norm.bias,
                  .in = in,
                  .out = out,
                  .rows = rows});
}

void Transformer::NormaliseHeads(const Norm& norm, const Tensor& heads, int64_t rows) {
  if (norm.gain == kNone) return;
  const Tensor per_head = PerHead(heads, model_->spec().head_dim);
  Normalise(norm, per_head, per_head, rows * (heads.cols / per_head.cols));
}

void Transformer::Observe(const Tensor& in, int64_t rows, std::span<const Projection> projections) {
  observed_.resize(static_cast<size_t>(rows * in.cols));
  backend_->Read(in, 0, rows, observed_.data());
  for (const Projection& projection : projections) {
    observer_->Observe(static_cast<size_t>(projection.layer), observed_.data(), rows, in.cols);
  }
}

void Transformer::PlanParts(std::span<const LevelRun> runs,
                            std::span<const Projection> projections) {
  // Neighbouring runs that agree on this layer's form and rank become one group.
  groups_.clear();
  group_begin_.clear();
  for (const Projection& projection : projections) {
    group_begin_.push_back(groups_.size());
    for (const LevelRun& run : runs) {
      const auto& [form, rank] = model_->levels()[static_cast<size_t>(run.level)]
                                     .profile[static_cast<size_t>(projection.layer)];
      const bool extends = groups_.size() > group_begin_.back() && groups_.back().form == form &&
                           groups_.back().rank == rank;
      if (extends) {
        groups_.back().end = run.end;
      } else {
        groups_.push_back({run.begin, run.end, form, rank});
      }
    }
  }
  group_begin_.push_back(groups_.size());
  parts_.clear();
  for (size_t i = 0; i < projections.size(); ++i) {
    parts_.push_back({.layer = linears_[static_cast<size_t>(projections[i].layer)],
                      .groups = std::span(groups_).subspan(group_begin_[i],
                                                           group_begin_[i + 1] - group_begin_[i]),
                      .out = projections[i].out});
  }
}

void Transformer::Project(const Tensor& in, int64_t rows, std::span<const LevelRun> runs,
                          std::span<const Projection> projections, bool add_to_output) {
  if (observer_ != nullptr) Observe(in, rows, projections);
  PlanParts(runs, projections);
  backend_->Linear({.in = in, .rows = rows, .parts = parts_, .add_to_output = add_to_output});
}

void Transformer::Embed(const StepRows& step) {
  backend_->Embed({.table = token_table_,
                   .linear = token_table_ == kNone ? linears_[static_cast<size_t>(head_)] : kNone,
                   .ids = step.tokens,
                   .out = hidden_});
  if (position_table_ != kNone) {
    backend_->Embed(
        {.table = position_table_, .ids = step.positions, .add_to_output = true, .out = hidden_});
  }
  const int64_t rows = static_cast<int64_t>(step.tokens.size());
  if (type_table_ != kNone) {
    backend_->Embed(
        {.table = type_table_, .ids = step.types, .add_to_output = true, .out = hidden_});
  }
  if (embedding_norm_.gain != kNone) Normalise(embedding_norm_, hidden_, hidden_, rows);
}

void Transformer::RunBlock(int64_t index, const StepRows& step) {
  const ModelSpec& spec = model_->spec();
  const Block& block = blocks_[static_cast<size_t>(index)];
  const int64_t rows = static_cast<int64_t>(step.tokens.size());
  const Tensor& in = spec.norms_after ? hidden_ : normed_;

  if (!spec.norms_after) Normalise(block.attention_norm, hidden_, normed_, rows);
  const std::array<Projection, 3> qkv = {
      {{block.query, query_}, {block.key, key_}, {block.value, value_}}};
  Project(in, rows, step.runs, qkv, /*add_to_output=*/false);
  NormaliseHeads(block.query_norm, query_, rows);
  NormaliseHeads(block.key_norm, key_, rows);
  backend_->Attention({.layer = index,
                       .num_heads = spec.num_heads,
                       .num_kv_heads = spec.num_kv_heads,
                       .head_dim = spec.head_dim,
                       .scale = 1.0f / std::sqrt(static_cast<float>(spec.head_dim)),
                       .causal = spec.causal,
                       .inverse_frequencies = inverse_frequencies_,
                       .q = query_,
                       .k = key_,
                       .v = value_,
                       .out = query_,
                       .sequences = step.sequences});
  const std::array<Projection, 1> attention_out = {{{block.attention_out, hidden_}}};
  Project(query_, rows, step.runs, attention_out, /*add_to_output=*/true);
  if (spec.norms_after) Normalise(block.attention_norm, hidden_, hidden_, rows);

  if (!spec.norms_after) Normalise(block.mlp_norm, hidden_, normed_, rows);
  RunMlp(in, rows, step.runs, block);
  if (spec.norms_after) Normalise(block.mlp_norm, hidden_, hidden_, rows);
}

void Transformer::RunMlp(const Tensor& in, int64_t rows, std::span<const LevelRun> runs,
                         const Block& block) {
  const std::array<Projection, 3> all = {
      {{block.gate, gate_}, {block.up, up_}, {block.down, hidden_}}};
  const auto projections = std::span(all).subspan(block.gate >= 0 ? 0 : 1);
  const size_t last = projections.size() - 1;
  const ActivationKind activation = model_->spec().activation;
  if (observer_ != nullptr) {
    // It sees the input of the second half, so the halves run one by one.
    Project(in, rows, runs, projections.first(last), /*add_to_output=*/false);
    backend_->Activation({.kind = activation,
                          .in = projections[0].out,
                          .up = block.gate >= 0 ? up_ : Tensor{},
                          .out = up_,
                          .rows = rows});
    Project(up_, rows, runs, projections.subspan(last), /*add_to_output=*/true);
    return;
  }
  PlanParts(runs, projections);
  const auto parts = std::span<const LinearPart>(parts_);
  backend_->Mlp(
      {.expand = {.in = in, .rows = rows, .parts = parts.first(last)},
       .activation = activation,
       .contract = {.in = up_, .rows = rows, .parts = parts.subspan(last), .add_to_output = true}});
}

void Transformer::Forward(const StepRows& step) {
  Embed(step);
  for (int64_t i = 0; i < model_->spec().num_blocks; ++i) RunBlock(i, step);
}

void Transformer::Logits(std::span<const int64_t> rows, std::span<const LevelRun> runs,
                         float* out) {
  NESTOR_CHECK(head_ >= 0);
  const int64_t num_rows = static_cast<int64_t>(rows.size());
  backend_->Gather(hidden_, rows, output_hidden_);
  Tensor in = output_hidden_;
  if (final_norm_.gain != kNone) {
    Normalise(final_norm_, output_hidden_, output_normed_, num_rows);
    in = output_normed_;
  }
  const std::array<Projection, 1> head = {{{head_, output_}}};
  Project(in, num_rows, runs, head, /*add_to_output=*/false);
  backend_->Read(output_, 0, num_rows, out);
}

void Transformer::Pool(std::span<const SequenceRows> sequences, float* out) {
  backend_->Pool({.kind = model_->spec().pooling,
                  .normalise = model_->spec().normalises_embedding,
                  .in = hidden_,
                  .out = output_hidden_,
                  .sequences = sequences});
  const auto rows = static_cast<int64_t>(sequences.size());
  if (classifier_ == nullptr) {
    backend_->Read(output_hidden_, 0, rows, out);
    return;
  }
  pooled_.resize(static_cast<size_t>(rows * model_->spec().hidden));
  backend_->Read(output_hidden_, 0, rows, pooled_.data());
  classifier_->Logits(pooled_, rows, out);
}

}  // namespace nestor
