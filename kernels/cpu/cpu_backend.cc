#include "kernels/cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/bfloat16.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/call_checks.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/memory_arena.h"
#include "kernels/cpu/packed_linear.h"
#include "kernels/cpu/thread_pool.h"

namespace nestor {
namespace {

// Elements of an elementwise operation per task: some 10 us of work.
constexpr int64_t kElementsPerTask = 16384;

// Rows of a lookup table, in bf16 where that loses nothing.
struct PackedTable {
  int64_t rows = 0;
  int64_t cols = 0;
  const float* f32 = nullptr;
  const uint16_t* bf16 = nullptr;
};

bool FitsBfloat16(std::span<const float> values) {
  return std::all_of(values.begin(), values.end(), [](float value) {
    const float rounded = FloatFromBfloat16(Bfloat16FromFloat(value));
    return std::memcmp(&rounded, &value, sizeof(value)) == 0;
  });
}

class CpuBackend : public Backend {
 public:
  CpuBackend(const CpuKernels* kernels, KvCacheType kv_cache_type, int num_threads)
      : kernels_(kernels),
        weights_(AvailableMemoryBytes()),
        activations_(AvailableMemoryBytes()),
        pool_(num_threads),
        linear_(kernels, &pool_),
        attention_(kernels->instruction_set, kv_cache_type, &pool_) {}

  absl::Status PinThreads();

  absl::StatusOr<LinearId> LoadLinear(const LinearWeights& weights) override;
  absl::StatusOr<VectorId> LoadVector(std::span<const float> values) override;
  absl::StatusOr<TableId> LoadTable(std::span<const float> values, int64_t rows,
                                    int64_t cols) override;
  absl::StatusOr<Tensor> Allocate(int64_t rows, int64_t cols) override;
  absl::Status AllocateKvCache(const KvCacheShape& shape) override;

  void Embed(const EmbedCall& call) override;
  void Norm(const NormCall& call) override;
  void Linear(const LinearCall& call) override { linear_.Run(call, linears_); }
  void Activation(const ActivationCall& call) override;
  void Mlp(const MlpCall& call) override {
    if (!linear_.RunMlp(call, linears_)) Backend::Mlp(call);
  }
  void Attention(const AttentionCall& call) override;
  void Pool(const PoolCall& call) override;
  void Gather(const Tensor& in, std::span<const int64_t> rows, const Tensor& out) override;
  void Read(const Tensor& in, int64_t row_begin, int64_t rows, float* out) override;

  StepCosts step_costs(int64_t rows) const override {
    // Measured with 2 threads, with SmolLM2-135M at its full level. 1 to 16 rows: on Zen 4 157 MB
    // take 3.3 ms and another row of 270 MFLOP 0.95 ms with AVX-512; with AVX2 4 ms and 2.2 ms;
    // factors run at half of the planes' rate (docs/kernels.md). 512 rows: 460 GFLOP/s with AVX-512
    // at 35 GB/s, 160 with AVX2 at 30 (Zen 3). Few rows with AVX2 spend half of their instructions
    // on the fine plane, which VNNI adds in the same ones; two wait for memory still.
    const bool has_avx512 = kernels_->instruction_set >= CpuInstructionSet::kAvx512;
    if (rows <= kMaxFewRows)
      return {.bytes_per_flop = has_avx512 ? 0.17 : 0.32,
              .factor_weight = 2,
              .coarse_weight = has_avx512 || rows <= 2 ? 1 : 0.5};
    return {.bytes_per_flop = has_avx512 ? 0.08 : 0.19, .factor_weight = 1.2};
  }
  LinearCost executed() const override { return linear_.executed(); }
  int64_t resident_weight_bytes() const override { return weights_.allocated_bytes(); }
  int64_t kv_cache_bytes() const override { return attention_.cache_bytes(); }
  int64_t KvCacheBytes(const KvCacheShape& shape) const override {
    return attention_.CacheBytes(shape);
  }

 private:
  static float* Row(const Tensor& tensor, int64_t row) {
    return static_cast<float*>(tensor.data) + row * tensor.cols;
  }
  std::span<const float> VectorOf(VectorId id, int64_t size) const;
  // Calls function(row) for every row, on the pool where that pays.
  template <typename Function>
  void ForEachRow(int64_t rows, int64_t cols, Function function);
  void EmbedRow(const EmbedCall& call, int32_t id, float* row);
  void PoolSequence(const PoolCall& call, int64_t index);

  const CpuKernels* const kernels_;
  MemoryArena weights_;
  MemoryArena activations_;
  std::vector<PackedLinear> linears_;
  std::vector<std::span<const float>> vectors_;
  std::vector<PackedTable> tables_;
  std::vector<float> embedded_;  // one row, where it is added to another
  ThreadPool pool_;
  LinearRunner linear_;
  AttentionRunner attention_;
};

absl::Status CpuBackend::PinThreads() {
  const absl::Status status = pool_.PinWorkers(AllowedCpus());
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat("pin_threads: ", std::string(status.message())));
}

absl::StatusOr<LinearId> CpuBackend::LoadLinear(const LinearWeights& weights) {
  NESTOR_RETURN_IF_ERROR(ValidateLinearWeights(weights));
  absl::StatusOr<PackedLinear> layer = PackLinear(weights, &weights_);
  if (!layer.ok()) {
    return absl::Status(layer.status().code(), absl::StrCat("layer ", weights.name, ": ",
                                                            std::string(layer.status().message())));
  }
  linears_.push_back(*layer);
  linear_.PrepareFor(linears_.back());
  return static_cast<LinearId>(linears_.size() - 1);
}

absl::StatusOr<VectorId> CpuBackend::LoadVector(std::span<const float> values) {
  NESTOR_ASSIGN_OR_RETURN(float* copy, weights_.Allocate<float>(values.size()));
  std::copy(values.begin(), values.end(), copy);
  vectors_.emplace_back(copy, values.size());
  return static_cast<VectorId>(vectors_.size() - 1);
}

absl::StatusOr<TableId> CpuBackend::LoadTable(std::span<const float> values, int64_t rows,
                                              int64_t cols) {
  if (rows <= 0 || cols <= 0 || static_cast<int64_t>(values.size()) != rows * cols)
    return absl::InvalidArgumentError(
        absl::StrCat("table [", rows, ", ", cols, "]: has ", values.size(), " values"));
  PackedTable table = {.rows = rows, .cols = cols};
  if (FitsBfloat16(values)) {
    NESTOR_ASSIGN_OR_RETURN(uint16_t * copy, weights_.Allocate<uint16_t>(values.size()));
    std::transform(values.begin(), values.end(), copy, Bfloat16FromFloat);
    table.bf16 = copy;
  } else {
    NESTOR_ASSIGN_OR_RETURN(float* copy, weights_.Allocate<float>(values.size()));
    std::copy(values.begin(), values.end(), copy);
    table.f32 = copy;
  }
  tables_.push_back(table);
  return static_cast<TableId>(tables_.size() - 1);
}

absl::StatusOr<Tensor> CpuBackend::Allocate(int64_t rows, int64_t cols) {
  if (rows < 0 || cols <= 0)
    return absl::InvalidArgumentError(absl::StrCat("tensor [", rows, ", ", cols, "]"));
  NESTOR_ASSIGN_OR_RETURN(float* data, activations_.Allocate<float>(rows * cols));
  return Tensor{.data = data, .rows = rows, .cols = cols};
}

absl::Status CpuBackend::AllocateKvCache(const KvCacheShape& shape) {
  const int64_t bytes = attention_.CacheBytes(shape);
  const int64_t available = weights_.limit_bytes() - weights_.allocated_bytes();
  if (bytes > available)
    return absl::ResourceExhaustedError(absl::StrCat(
        "KV cache: needs ", bytes, " bytes; beside the weights there are ", available));
  return attention_.AllocateCache(shape);
}

std::span<const float> CpuBackend::VectorOf(VectorId id, int64_t size) const {
  NESTOR_CHECK(id >= 0 && id < static_cast<VectorId>(vectors_.size()));
  NESTOR_CHECK(static_cast<int64_t>(vectors_[id].size()) == size);
  return vectors_[id];
}

template <typename Function>
void CpuBackend::ForEachRow(int64_t rows, int64_t cols, Function function) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / cols);
  pool_.RunRanges(rows, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) function(row);
  });
}

void CpuBackend::EmbedRow(const EmbedCall& call, int32_t id, float* row) {
  if (call.linear != kNone) {
    const PackedLinear& layer = linears_[call.linear];
    NESTOR_CHECK(id >= 0 && id < layer.out && call.out.cols == layer.in);
    UnpackDenseRow(layer, id, row);
    return;
  }
  const PackedTable& table = tables_[call.table];
  NESTOR_CHECK(id >= 0 && id < table.rows && call.out.cols == table.cols);
  if (table.f32 != nullptr) {
    std::copy_n(table.f32 + id * table.cols, table.cols, row);
  } else {
    std::transform(table.bf16 + id * table.cols, table.bf16 + (id + 1) * table.cols, row,
                   FloatFromBfloat16);
  }
}

void CpuBackend::Embed(const EmbedCall& call) {
  NESTOR_CHECK(static_cast<int64_t>(call.ids.size()) <= call.out.rows);
  embedded_.resize(call.out.cols);
  for (size_t t = 0; t < call.ids.size(); ++t) {
    float* out = Row(call.out, static_cast<int64_t>(t));
    EmbedRow(call, call.ids[t], call.add_to_output ? embedded_.data() : out);
    if (!call.add_to_output) continue;
    for (int64_t j = 0; j < call.out.cols; ++j) out[j] += embedded_[j];
  }
}

void CpuBackend::Norm(const NormCall& call) {
  const int64_t n = call.in.cols;
  NESTOR_CHECK(call.out.cols == n && call.rows <= call.in.rows && call.rows <= call.out.rows);
  const float* gain = VectorOf(call.gain, n).data();
  const float* bias = call.bias == kNone ? nullptr : VectorOf(call.bias, n).data();
  const auto norm = call.kind == NormKind::kRms ? kernels_->rms_norm : kernels_->layer_norm;
  ForEachRow(call.rows, n, [&](int64_t t) {
    norm(Row(call.in, t), gain, bias, n, call.epsilon, Row(call.out, t));
  });
}

void CpuBackend::Activation(const ActivationCall& call) {
  const int64_t n = call.in.cols;
  NESTOR_CHECK(call.out.cols == n && call.rows <= call.in.rows && call.rows <= call.out.rows);
  NESTOR_CHECK(call.up.data == nullptr || (call.up.cols == n && call.rows <= call.up.rows));
  const ActivationFunction activation = ActivationKernel(*kernels_, call.kind);
  ForEachRow(call.rows, n, [&](int64_t t) {
    const float* up = call.up.data == nullptr ? nullptr : Row(call.up, t);
    activation(Row(call.in, t), up, n, Row(call.out, t));
  });
}

void CpuBackend::Attention(const AttentionCall& call) {
  std::span<const float> inverse_frequencies;
  if (call.inverse_frequencies != kNone)
    inverse_frequencies = VectorOf(call.inverse_frequencies, call.head_dim / 2);
  attention_.Run(call, inverse_frequencies);
}

void CpuBackend::PoolSequence(const PoolCall& call, int64_t index) {
  const SequenceRows& sequence = call.sequences[index];
  NESTOR_CHECK(sequence.rows > 0 && sequence.row_begin + sequence.rows <= call.in.rows);
  const int64_t cols = call.in.cols;
  const int64_t rows = call.kind == PoolingKind::kMean ? sequence.rows : 1;
  float* out = Row(call.out, index);
  std::copy_n(Row(call.in, sequence.row_begin), cols, out);
  for (int64_t i = 1; i < rows; ++i) {
    const float* in = Row(call.in, sequence.row_begin + i);
    for (int64_t j = 0; j < cols; ++j) out[j] += in[j];
  }
  // A mean's factor matters only where the result is not scaled to unit length anyway.
  float scale = 1.0f / static_cast<float>(rows);
  if (call.normalise) {
    const float length = std::sqrt(kernels_->dot(out, out, cols)) * scale;
    scale /= std::max(length, 1e-12f);
  }
  for (int64_t j = 0; j < cols; ++j) out[j] *= scale;
}

void CpuBackend::Pool(const PoolCall& call) {
  const auto count = static_cast<int64_t>(call.sequences.size());
  NESTOR_CHECK(call.in.cols == call.out.cols && count <= call.out.rows);
  for (int64_t s = 0; s < count; ++s) PoolSequence(call, s);
}

void CpuBackend::Gather(const Tensor& in, std::span<const int64_t> rows, const Tensor& out) {
  NESTOR_CHECK(in.cols == out.cols && static_cast<int64_t>(rows.size()) <= out.rows);
  for (size_t i = 0; i < rows.size(); ++i) {
    NESTOR_CHECK(rows[i] >= 0 && rows[i] < in.rows);
    std::copy_n(Row(in, rows[i]), in.cols, Row(out, static_cast<int64_t>(i)));
  }
}

void CpuBackend::Read(const Tensor& in, int64_t row_begin, int64_t rows, float* out) {
  NESTOR_CHECK(row_begin >= 0 && row_begin + rows <= in.rows);
  std::copy_n(Row(in, row_begin), rows * in.cols, out);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(const CpuOptions& options) {
  if (options.num_threads < 0)
    return absl::InvalidArgumentError(
        absl::StrCat("num_threads: must not be negative; was ", options.num_threads));
  const CpuInstructionSet best = BestInstructionSet();
  const CpuInstructionSet chosen = options.instruction_set.value_or(best);
  if (chosen > best)
    return absl::InvalidArgumentError(absl::StrCat("instruction_set: ", InstructionSetName(chosen),
                                                   " asked for; this machine has ",
                                                   InstructionSetName(best)));
  const CpuKernels& kernels = KernelsFor(chosen);
  const int num_threads = options.num_threads == 0 ? AvailableCpus() : options.num_threads;
  auto backend = std::make_unique<CpuBackend>(&kernels, options.kv_cache_type, num_threads);
  if (options.pin_threads) NESTOR_RETURN_IF_ERROR(backend->PinThreads());
  return backend;
}

}  // namespace nestor
