#include "kernels/reference/reference_backend.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/bfloat16.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/call_checks.h"

namespace nestor {
namespace {

struct ReferenceFactors {
  int64_t max_rank = 0;
  std::vector<int8_t> a;            // [max_rank, PaddedToGroup(in)]
  std::vector<uint16_t> a_scales;   // [max_rank, NumGroups(in)]
  std::vector<int8_t> bt;           // [max_rank, PaddedToGroup(out)]
  std::vector<uint16_t> bt_scales;  // [max_rank, NumGroups(out)]
};

struct ReferenceGar {
  ReferenceFactors factors;
  std::vector<int32_t> rows;  // [out]
};

// A layer as it was stored, copied.
struct ReferenceLinear {
  int64_t out = 0;
  int64_t in = 0;
  std::vector<float> dense_f32;
  std::vector<uint16_t> dense_bf16;
  std::vector<uint8_t> coarse;
  std::vector<uint8_t> fine;
  std::vector<uint8_t> middle;
  std::vector<uint16_t> scales;
  ReferenceFactors residual;
  ReferenceFactors prefix;
  std::vector<ReferenceGar> gar;
  std::vector<float> bias;
  bool float_activations = false;

  DenseStorage storage() const {
    if (!dense_f32.empty()) return DenseStorage::kF32;
    return dense_bf16.empty() ? DenseStorage::kPlanes : DenseStorage::kBf16;
  }
  const ReferenceGar& GarOfRank(int64_t rank) const {
    const auto found = std::find_if(gar.begin(), gar.end(), [&](const ReferenceGar& pair) {
      return pair.factors.max_rank == rank;
    });
    NESTOR_CHECK(found != gar.end());
    return *found;
  }
};

struct ReferenceTable {
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<float> values;
};

template <typename T>
std::vector<T> CopyOf(const T* values, int64_t count) {
  return values == nullptr ? std::vector<T>() : std::vector<T>(values, values + count);
}

ReferenceFactors CopyOf(const FactorView& view, int64_t out, int64_t in) {
  const int64_t rank = view.max_rank;
  return {.max_rank = rank,
          .a = CopyOf(view.a, rank * PaddedToGroup(in)),
          .a_scales = CopyOf(view.a_scales, rank * NumGroups(in)),
          .bt = CopyOf(view.bt, rank * PaddedToGroup(out)),
          .bt_scales = CopyOf(view.bt_scales, rank * NumGroups(out))};
}

int64_t BytesOf(const ReferenceFactors& factors) {
  return std::ssize(factors.a) + std::ssize(factors.bt) + 2 * std::ssize(factors.a_scales) +
         2 * std::ssize(factors.bt_scales);
}

double ScaledCode(const std::vector<int8_t>& codes, const std::vector<uint16_t>& scales,
                  int64_t component, int64_t index, int64_t size) {
  const double scale = FloatFromBfloat16(scales[component * NumGroups(size) + index / kGroupSize]);
  return scale * codes[component * PaddedToGroup(size) + index];
}

// The code of one weight in a plane, without its offset.
int PlaneCode(const std::vector<uint8_t>& plane, const ReferenceLinear& layer, int64_t row,
              int64_t col) {
  const uint8_t byte = plane[row * (PaddedToGroup(layer.in) / 2) + col / 2];
  return (col % 2 == 0 ? byte & 0x0f : byte >> 4) - 8;
}

double CoarseWeight(const ReferenceLinear& layer, int64_t row, int64_t col) {
  const double scale =
      FloatFromBfloat16(layer.scales[row * NumGroups(layer.in) + col / kGroupSize]);
  return scale * 16 * PlaneCode(layer.coarse, layer, row, col);
}

double MiddleWeight(const ReferenceLinear& layer, int64_t row, int64_t col) {
  const double scale =
      FloatFromBfloat16(layer.scales[row * NumGroups(layer.in) + col / kGroupSize]);
  const int bits = layer.middle[row * (PaddedToGroup(layer.in) / 4) + col / 4] >> (2 * (col % 4));
  return CoarseWeight(layer, row, col) + scale * (4 * (bits & 3) - 6);
}

double DenseWeight(const ReferenceLinear& layer, int64_t row, int64_t col) {
  switch (layer.storage()) {
    case DenseStorage::kF32:
      return layer.dense_f32[row * layer.in + col];
    case DenseStorage::kBf16:
      return FloatFromBfloat16(layer.dense_bf16[row * layer.in + col]);
    case DenseStorage::kPlanes:
      break;
  }
  const double scale =
      FloatFromBfloat16(layer.scales[row * NumGroups(layer.in) + col / kGroupSize]);
  return scale *
         (16 * PlaneCode(layer.coarse, layer, row, col) + PlaneCode(layer.fine, layer, row, col));
}

// x rounded to int8 in groups of 32, as float arithmetic does it: scale = absmax / 127, code =
// x * (1 / scale) to nearest even. A group with a non-finite value is NaN throughout, one below
// 1e-30 is zero.
std::vector<double> QuantisedInput(const double* x, int64_t n) {
  std::vector<double> result(n);
  for (int64_t begin = 0; begin < n; begin += kGroupSize) {
    const int64_t end = std::min(begin + kGroupSize, n);
    float largest = 0;
    bool is_finite = true;
    for (int64_t i = begin; i < end; ++i) {
      const float value = static_cast<float>(x[i]);
      is_finite = is_finite && std::isfinite(value);
      largest = std::max(largest, std::fabs(value));
    }
    const float scale = largest / 127.0f;
    const float inverse = largest < 1e-30f ? 0.0f : 1.0f / scale;
    for (int64_t i = begin; i < end; ++i) {
      result[i] = is_finite ? static_cast<double>(scale) *
                                  std::nearbyint(static_cast<float>(x[i]) * inverse)
                            : std::numeric_limits<double>::quiet_NaN();
    }
  }
  return result;
}

double Dot(const std::vector<double>& weights, const double* x) {
  double sum = 0;
  for (size_t j = 0; j < weights.size(); ++j) sum += weights[j] * x[j];
  return sum;
}

double ActivationOf(ActivationKind kind, double x) {
  switch (kind) {
    case ActivationKind::kSilu:
      return x / (1 + std::exp(-x));
    case ActivationKind::kGeluErf:
      return 0.5 * x * std::erfc(-x * M_SQRT1_2);
    case ActivationKind::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  }
  return x;
}

class ReferenceBackend : public Backend {
 public:
  explicit ReferenceBackend(const ReferenceOptions& options) : options_(options) {}

  absl::StatusOr<LinearId> LoadLinear(const LinearWeights& weights) override;
  absl::StatusOr<VectorId> LoadVector(std::span<const float> values) override;
  absl::StatusOr<TableId> LoadTable(std::span<const float> values, int64_t rows,
                                    int64_t cols) override;
  absl::StatusOr<Tensor> Allocate(int64_t rows, int64_t cols) override;
  absl::Status AllocateKvCache(const KvCacheShape& shape) override;

  void Embed(const EmbedCall& call) override;
  void Norm(const NormCall& call) override;
  void Linear(const LinearCall& call) override;
  void Activation(const ActivationCall& call) override;
  void Attention(const AttentionCall& call) override;
  void Pool(const PoolCall& call) override;
  void Gather(const Tensor& in, std::span<const int64_t> rows, const Tensor& out) override;
  void Read(const Tensor& in, int64_t row_begin, int64_t rows, float* out) override;

  LinearCost executed() const override { return executed_; }
  int64_t resident_weight_bytes() const override { return weight_bytes_; }
  int64_t kv_cache_bytes() const override { return KvCacheBytes(cache_shape_); }
  int64_t KvCacheBytes(const KvCacheShape& shape) const override;

 private:
  static double* Row(const Tensor& tensor, int64_t row) {
    NESTOR_CHECK(row >= 0 && row < tensor.rows);
    return static_cast<double*>(tensor.data) + row * tensor.cols;
  }
  // The call's input, [rows, in], rounded to int8 where asked for.
  std::vector<double> InputOf(const LinearCall& call, bool is_quantised);
  // y = the group's rows through the layer; x is [rows, in], y is [rows, out].
  void RunGroup(const ReferenceLinear& layer, const RowGroup& group, const double* x, double* y);
  void AddFactors(const ReferenceLinear& layer, const ReferenceFactors& factors,
                  const RowGroup& group, const double* x, double* y);
  void RunGar(const ReferenceLinear& layer, const RowGroup& group, const double* x, double* y);
  void Count(const ReferenceLinear& layer, std::span<const RowGroup> groups);
  // The vector [head_dim] of one head, rotated to `position` where the call asks for it.
  std::vector<double> Rotated(const AttentionCall& call, const double* head, int64_t position);
  // One position of the cache: [2][num_kv_heads][head_dim], keys first.
  double* CacheAt(int64_t layer, const SequenceRows& sequence, int64_t position);
  void StoreKeysAndValues(const AttentionCall& call, const SequenceRows& sequence);
  void AttendSequence(const AttentionCall& call, const SequenceRows& sequence);

  const ReferenceOptions options_;
  std::vector<ReferenceLinear> linears_;
  std::vector<std::vector<float>> vectors_;
  std::vector<ReferenceTable> tables_;
  std::vector<std::unique_ptr<std::vector<double>>> tensors_;
  KvCacheShape cache_shape_;
  std::vector<std::vector<double>> cache_;  // [num_layers * num_pages], filled at first use
  std::vector<double> keys_;                // of the sequence at hand, without a cache
  LinearCost executed_;
  int64_t weight_bytes_ = 0;
};

absl::StatusOr<LinearId> ReferenceBackend::LoadLinear(const LinearWeights& weights) {
  NESTOR_RETURN_IF_ERROR(ValidateLinearWeights(weights));
  const int64_t out = weights.out;
  const int64_t in = weights.in;
  const int64_t plane_bytes = out * PaddedToGroup(in) / 2;
  ReferenceLinear layer = {.out = out,
                           .in = in,
                           .dense_f32 = CopyOf(weights.dense_f32, out * in),
                           .dense_bf16 = CopyOf(weights.dense_bf16, out * in),
                           .coarse = CopyOf(weights.coarse, plane_bytes),
                           .fine = CopyOf(weights.fine, plane_bytes),
                           .middle = CopyOf(weights.middle, plane_bytes / 2),
                           .scales = CopyOf(weights.scales, out * NumGroups(in)),
                           .residual = CopyOf(weights.residual, out, in),
                           .prefix = CopyOf(weights.prefix, out, in),
                           .bias = CopyOf(weights.bias, out),
                           .float_activations = weights.float_activations};
  weight_bytes_ += 4 * layer.dense_f32.size() + 2 * layer.dense_bf16.size() + layer.coarse.size() +
                   layer.fine.size() + layer.middle.size() + 2 * layer.scales.size() +
                   4 * layer.bias.size();
  for (const ReferenceFactors* factors : {&layer.residual, &layer.prefix}) {
    weight_bytes_ += BytesOf(*factors);
  }
  for (const GarView& view : weights.gar) {
    layer.gar.push_back({.factors = CopyOf(view.factors, out - view.factors.max_rank, in),
                         .rows = CopyOf(view.rows, out)});
    weight_bytes_ += BytesOf(layer.gar.back().factors) + 4 * out;
  }
  linears_.push_back(std::move(layer));
  return static_cast<LinearId>(linears_.size() - 1);
}

absl::StatusOr<VectorId> ReferenceBackend::LoadVector(std::span<const float> values) {
  vectors_.emplace_back(values.begin(), values.end());
  weight_bytes_ += 4 * values.size();
  return static_cast<VectorId>(vectors_.size() - 1);
}

absl::StatusOr<TableId> ReferenceBackend::LoadTable(std::span<const float> values, int64_t rows,
                                                    int64_t cols) {
  if (rows <= 0 || cols <= 0 || static_cast<int64_t>(values.size()) != rows * cols)
    return absl::InvalidArgumentError(
        absl::StrCat("table [", rows, ", ", cols, "]: has ", values.size(), " values"));
  tables_.push_back({.rows = rows, .cols = cols, .values = {values.begin(), values.end()}});
  weight_bytes_ += 4 * values.size();
  return static_cast<TableId>(tables_.size() - 1);
}

absl::StatusOr<Tensor> ReferenceBackend::Allocate(int64_t rows, int64_t cols) {
  if (rows < 0 || cols <= 0)
    return absl::InvalidArgumentError(absl::StrCat("tensor [", rows, ", ", cols, "]"));
  tensors_.push_back(std::make_unique<std::vector<double>>(rows * cols));
  return Tensor{.data = tensors_.back()->data(), .rows = rows, .cols = cols};
}

absl::Status ReferenceBackend::AllocateKvCache(const KvCacheShape& shape) {
  NESTOR_CHECK(cache_.empty());
  if (shape.num_layers <= 0 || shape.num_kv_heads <= 0 || shape.head_dim <= 0 ||
      shape.page_size <= 0 || shape.num_pages <= 0)
    return absl::InvalidArgumentError("KV cache: every size must be positive");
  cache_shape_ = shape;
  cache_.resize(shape.num_layers * shape.num_pages);
  return absl::OkStatus();
}

int64_t ReferenceBackend::KvCacheBytes(const KvCacheShape& shape) const {
  return shape.num_layers * shape.num_pages * shape.page_size * 2 * shape.num_kv_heads *
         shape.head_dim * static_cast<int64_t>(sizeof(double));
}

void ReferenceBackend::Embed(const EmbedCall& call) {
  for (size_t t = 0; t < call.ids.size(); ++t) {
    const int32_t id = call.ids[t];
    double* out = Row(call.out, t);
    for (int64_t j = 0; j < call.out.cols; ++j) {
      double value = 0;
      if (call.linear != kNone) {
        const ReferenceLinear& layer = linears_[call.linear];
        NESTOR_CHECK(id >= 0 && id < layer.out && call.out.cols == layer.in);
        value = DenseWeight(layer, id, j);
      } else {
        const ReferenceTable& table = tables_[call.table];
        NESTOR_CHECK(id >= 0 && id < table.rows && call.out.cols == table.cols);
        value = table.values[id * table.cols + j];
      }
      out[j] = call.add_to_output ? out[j] + value : value;
    }
  }
}

void ReferenceBackend::Norm(const NormCall& call) {
  const std::vector<float>& gain = vectors_[call.gain];
  const int64_t n = call.in.cols;
  NESTOR_CHECK(static_cast<int64_t>(gain.size()) == n && call.out.cols == n);
  for (int64_t t = 0; t < call.rows; ++t) {
    const double* in = Row(call.in, t);
    double* out = Row(call.out, t);
    double mean = 0;
    if (call.kind == NormKind::kLayerNorm) {
      for (int64_t j = 0; j < n; ++j) mean += in[j] / n;
    }
    double square = 0;
    for (int64_t j = 0; j < n; ++j) square += (in[j] - mean) * (in[j] - mean) / n;
    const double inverse = 1 / std::sqrt(square + call.epsilon);
    for (int64_t j = 0; j < n; ++j) {
      const double bias = call.bias == kNone ? 0.0 : vectors_[call.bias][j];
      out[j] = (in[j] - mean) * inverse * gain[j] + bias;
    }
  }
}

void ReferenceBackend::AddFactors(const ReferenceLinear& layer, const ReferenceFactors& factors,
                                  const RowGroup& group, const double* x, double* y) {
  std::vector<double> a(layer.in);
  std::vector<double> b(layer.out);
  for (int64_t k = 0; k < group.rank; ++k) {
    for (int64_t j = 0; j < layer.in; ++j)
      a[j] = ScaledCode(factors.a, factors.a_scales, k, j, layer.in);
    for (int64_t i = 0; i < layer.out; ++i)
      b[i] = ScaledCode(factors.bt, factors.bt_scales, k, i, layer.out);
    for (int64_t t = group.begin; t < group.end; ++t) {
      const double z = Dot(a, x + t * layer.in);
      for (int64_t i = 0; i < layer.out; ++i) y[t * layer.out + i] += b[i] * z;
    }
  }
}

void ReferenceBackend::RunGar(const ReferenceLinear& layer, const RowGroup& group, const double* x,
                              double* y) {
  const auto& [factors, rows] = layer.GarOfRank(group.rank);
  const int64_t others = layer.out - group.rank;
  std::vector<double> a(layer.in);
  std::vector<double> b(others);
  for (int64_t k = 0; k < group.rank; ++k) {
    for (int64_t j = 0; j < layer.in; ++j)
      a[j] = ScaledCode(factors.a, factors.a_scales, k, j, layer.in);
    for (int64_t i = 0; i < others; ++i)
      b[i] = ScaledCode(factors.bt, factors.bt_scales, k, i, others);
    for (int64_t t = group.begin; t < group.end; ++t) {
      const double z = Dot(a, x + t * layer.in);
      double* row = y + t * layer.out;
      row[rows[k]] += z;
      for (int64_t i = 0; i < others; ++i) row[rows[group.rank + i]] += b[i] * z;
    }
  }
}

void ReferenceBackend::RunGroup(const ReferenceLinear& layer, const RowGroup& group,
                                const double* x, double* y) {
  const bool has_plane = group.form != Form::kPrefix && group.form != Form::kGar;
  std::vector<double> weights(layer.in);
  for (int64_t i = 0; i < layer.out; ++i) {
    for (int64_t j = 0; j < layer.in; ++j) {
      if (group.form == Form::kDense) weights[j] = DenseWeight(layer, i, j);
      if (group.form == Form::kResidual) weights[j] = CoarseWeight(layer, i, j);
      if (group.form == Form::kMiddle) weights[j] = MiddleWeight(layer, i, j);
    }
    const double bias = layer.bias.empty() ? 0.0 : layer.bias[i];
    for (int64_t t = group.begin; t < group.end; ++t) {
      const double product = has_plane ? Dot(weights, x + t * layer.in) : 0.0;
      y[t * layer.out + i] = product + bias;
    }
  }
  if (group.form == Form::kResidual) AddFactors(layer, layer.residual, group, x, y);
  if (group.form == Form::kPrefix) AddFactors(layer, layer.prefix, group, x, y);
  if (group.form == Form::kGar) RunGar(layer, group, x, y);
}

std::vector<double> ReferenceBackend::InputOf(const LinearCall& call, bool is_quantised) {
  std::vector<double> inputs;
  for (int64_t t = 0; t < call.rows; ++t) {
    const double* x = Row(call.in, t);
    if (is_quantised) {
      const std::vector<double> quantised = QuantisedInput(x, call.in.cols);
      inputs.insert(inputs.end(), quantised.begin(), quantised.end());
    } else {
      inputs.insert(inputs.end(), x, x + call.in.cols);
    }
  }
  return inputs;
}

void ReferenceBackend::Count(const ReferenceLinear& layer, std::span<const RowGroup> groups) {
  const bool has_bias = !layer.bias.empty();
  const auto cost_of = [&](Form form, int64_t rank) {
    return CostOfLinear(layer.out, layer.in, has_bias, layer.storage(), form, rank);
  };
  int64_t max_residual = -1;
  int64_t max_prefix = -1;
  std::set<int64_t> gar_ranks;
  bool has_dense = false;
  bool has_middle = false;
  for (const RowGroup& group : groups) {
    executed_.flops += (group.end - group.begin) * cost_of(group.form, group.rank).flops;
    if (group.form == Form::kResidual) max_residual = std::max(max_residual, group.rank);
    if (group.form == Form::kPrefix) max_prefix = std::max(max_prefix, group.rank);
    if (group.form == Form::kGar) gar_ranks.insert(group.rank);
    has_dense = has_dense || group.form == Form::kDense;
    has_middle = has_middle || group.form == Form::kMiddle;
  }
  // Each part is read once for all groups: the coarse plane serves residual, middle and dense rows.
  const int64_t bias_bytes = has_bias ? 4 * layer.out : 0;
  int64_t bytes = bias_bytes;
  if (has_dense) bytes += cost_of(Form::kDense, 0).weight_bytes - bias_bytes;
  const int64_t coarse_bytes = cost_of(Form::kResidual, 0).weight_bytes;
  bool has_coarse = has_dense && layer.storage() == DenseStorage::kPlanes;
  for (const auto& [is_run, cost] :
       {std::pair(has_middle, cost_of(Form::kMiddle, 0)),
        std::pair(max_residual >= 0,
                  cost_of(Form::kResidual, std::max<int64_t>(0, max_residual)))}) {
    if (!is_run) continue;
    bytes += cost.weight_bytes - (has_coarse ? coarse_bytes : bias_bytes);
    has_coarse = true;
  }
  if (max_prefix >= 0) bytes += cost_of(Form::kPrefix, max_prefix).weight_bytes - bias_bytes;
  for (const int64_t rank : gar_ranks) bytes += cost_of(Form::kGar, rank).weight_bytes - bias_bytes;
  executed_.weight_bytes += bytes;
}

void ReferenceBackend::Linear(const LinearCall& call) {
  if (call.rows == 0) return;
  const std::vector<double> exact = InputOf(call, false);
  const std::vector<double> quantised = InputOf(call, options_.quantises_activations);
  for (const LinearPart& part : call.parts) {
    const ReferenceLinear& layer = linears_[part.layer];
    CheckLinearPart(call, part,
                    {.out = layer.out,
                     .in = layer.in,
                     .has_coarse = !layer.coarse.empty(),
                     .has_middle = !layer.middle.empty(),
                     .residual_rank = layer.residual.max_rank,
                     .prefix_rank = layer.prefix.max_rank});
    std::vector<double> y(call.rows * layer.out);
    for (const RowGroup& group : part.groups) {
      const bool reads_codes =
          !layer.float_activations &&
          (group.form != Form::kDense || layer.storage() == DenseStorage::kPlanes);
      RunGroup(layer, group, reads_codes ? quantised.data() : exact.data(), y.data());
    }
    for (int64_t t = 0; t < call.rows; ++t) {
      double* out = Row(part.out, t);
      for (int64_t i = 0; i < layer.out; ++i)
        out[i] = (call.add_to_output ? out[i] : 0.0) + y[t * layer.out + i];
    }
    Count(layer, part.groups);
  }
}

void ReferenceBackend::Activation(const ActivationCall& call) {
  NESTOR_CHECK(call.in.cols == call.out.cols);
  for (int64_t t = 0; t < call.rows; ++t) {
    const double* in = Row(call.in, t);
    double* out = Row(call.out, t);
    for (int64_t j = 0; j < call.in.cols; ++j) {
      const double up = call.up.data == nullptr ? 1.0 : Row(call.up, t)[j];
      out[j] = ActivationOf(call.kind, in[j]) * up;
    }
  }
}

std::vector<double> ReferenceBackend::Rotated(const AttentionCall& call, const double* head,
                                              int64_t position) {
  std::vector<double> result(head, head + call.head_dim);
  if (call.inverse_frequencies == kNone) return result;
  const std::vector<float>& frequencies = vectors_[call.inverse_frequencies];
  const int64_t half = call.head_dim / 2;
  NESTOR_CHECK(static_cast<int64_t>(frequencies.size()) == half);
  for (int64_t i = 0; i < half; ++i) {
    const double angle = static_cast<double>(position) * frequencies[i];
    result[i] = head[i] * std::cos(angle) - head[i + half] * std::sin(angle);
    result[i + half] = head[i + half] * std::cos(angle) + head[i] * std::sin(angle);
  }
  return result;
}

double* ReferenceBackend::CacheAt(int64_t layer, const SequenceRows& sequence, int64_t position) {
  const int64_t stride = 2 * cache_shape_.num_kv_heads * cache_shape_.head_dim;
  if (cache_.empty()) return keys_.data() + (position - sequence.position) * stride;
  const size_t index = position / cache_shape_.page_size;
  NESTOR_CHECK(index < sequence.pages.size());
  const int32_t page = sequence.pages[index];
  NESTOR_CHECK(page >= 0 && page < cache_shape_.num_pages);
  std::vector<double>& values = cache_[layer * cache_shape_.num_pages + page];
  values.resize(cache_shape_.page_size * stride);
  return values.data() + (position % cache_shape_.page_size) * stride;
}

void ReferenceBackend::StoreKeysAndValues(const AttentionCall& call, const SequenceRows& sequence) {
  const int64_t dim = call.head_dim;
  for (int64_t i = 0; i < sequence.rows; ++i) {
    double* keys = CacheAt(call.layer, sequence, sequence.position + i);
    double* values = keys + call.num_kv_heads * dim;
    const double* k = Row(call.k, sequence.row_begin + i);
    const double* v = Row(call.v, sequence.row_begin + i);
    for (int64_t head = 0; head < call.num_kv_heads; ++head) {
      const std::vector<double> key = Rotated(call, k + head * dim, sequence.position + i);
      std::copy(key.begin(), key.end(), keys + head * dim);
    }
    std::copy(v, v + call.num_kv_heads * dim, values);
  }
}

void ReferenceBackend::AttendSequence(const AttentionCall& call, const SequenceRows& sequence) {
  const int64_t dim = call.head_dim;
  const int64_t first = cache_.empty() ? sequence.position : 0;
  const int64_t end = sequence.position + sequence.rows;
  for (int64_t i = 0; i < sequence.rows; ++i) {
    const int64_t limit = call.causal ? sequence.position + i + 1 : end;
    for (int64_t head = 0; head < call.num_heads; ++head) {
      const int64_t kv_head = head / (call.num_heads / call.num_kv_heads);
      const std::vector<double> q =
          Rotated(call, Row(call.q, sequence.row_begin + i) + head * dim, sequence.position + i);
      std::vector<double> weights;
      double largest = -std::numeric_limits<double>::infinity();
      for (int64_t p = first; p < limit; ++p) {
        const double* key = CacheAt(call.layer, sequence, p) + kv_head * dim;
        double score = 0;
        for (int64_t d = 0; d < dim; ++d) score += q[d] * key[d];
        weights.push_back(score * call.scale);
        largest = std::max(largest, weights.back());
      }
      double sum = 0;
      for (double& weight : weights) sum += weight = std::exp(weight - largest);
      double* out = Row(call.out, sequence.row_begin + i) + head * dim;
      std::fill(out, out + dim, 0.0);
      for (int64_t p = first; p < limit; ++p) {
        const double* value =
            CacheAt(call.layer, sequence, p) + (call.num_kv_heads + kv_head) * dim;
        for (int64_t d = 0; d < dim; ++d) out[d] += weights[p - first] / sum * value[d];
      }
    }
  }
}

void ReferenceBackend::Attention(const AttentionCall& call) {
  CheckAttentionCall(call);
  if (cache_.empty()) {
    cache_shape_.num_kv_heads = call.num_kv_heads;
    cache_shape_.head_dim = call.head_dim;
  } else {
    NESTOR_CHECK(call.num_kv_heads == cache_shape_.num_kv_heads &&
                 call.head_dim == cache_shape_.head_dim && call.layer < cache_shape_.num_layers);
  }
  for (const SequenceRows& sequence : call.sequences) {
    keys_.resize(sequence.rows * 2 * call.num_kv_heads * call.head_dim);
    StoreKeysAndValues(call, sequence);
    AttendSequence(call, sequence);
  }
}

void ReferenceBackend::Pool(const PoolCall& call) {
  NESTOR_CHECK(call.in.cols == call.out.cols);
  for (size_t s = 0; s < call.sequences.size(); ++s) {
    const SequenceRows& sequence = call.sequences[s];
    NESTOR_CHECK(sequence.rows > 0);
    double* out = Row(call.out, s);
    const int64_t rows = call.kind == PoolingKind::kMean ? sequence.rows : 1;
    std::vector<double> sum(call.in.cols);
    for (int64_t i = 0; i < rows; ++i) {
      const double* in = Row(call.in, sequence.row_begin + i);
      for (int64_t j = 0; j < call.in.cols; ++j) sum[j] += in[j] / rows;
    }
    double square = 0;
    for (double value : sum) square += value * value;
    const double scale = call.normalise ? 1 / std::max(std::sqrt(square), 1e-12) : 1.0;
    for (int64_t j = 0; j < call.in.cols; ++j) out[j] = sum[j] * scale;
  }
}

void ReferenceBackend::Gather(const Tensor& in, std::span<const int64_t> rows, const Tensor& out) {
  NESTOR_CHECK(in.cols == out.cols);
  for (size_t i = 0; i < rows.size(); ++i) {
    const double* row = Row(in, rows[i]);
    std::copy(row, row + in.cols, Row(out, i));
  }
}

void ReferenceBackend::Read(const Tensor& in, int64_t row_begin, int64_t rows, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const double* row = Row(in, row_begin + i);
    for (int64_t j = 0; j < in.cols; ++j) out[i * in.cols + j] = static_cast<float>(row[j]);
  }
}

}  // namespace

std::unique_ptr<Backend> MakeReferenceBackend(const ReferenceOptions& options) {
  return std::make_unique<ReferenceBackend>(options);
}

}  // namespace nestor
