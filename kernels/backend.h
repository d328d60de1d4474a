#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/nested_linear.h"

namespace nestor {

// Activations on the device, [rows, cols] row-major in the backend's own scalar type (float on a
// CPU, double in the reference). A plain handle: the backend owns the memory until it is destroyed.
struct Tensor {
  void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
};

// Handles of loaded weights, indices into the backend's own tables. -1 is none.
using LinearId = int32_t;
using VectorId = int32_t;
using TableId = int32_t;
inline constexpr int32_t kNone = -1;

// Rows [begin, end) of a step run one layer in one form at one rank (0 for kDense). The groups of
// a call cover its rows without gaps, in order. Within a call, prefix groups come first (ascending
// rank), then residual ones (ascending), then dense ones, wherever the order of levels allows it;
// backends may rely on order for speed, not for correctness.
struct RowGroup {
  int64_t begin = 0;
  int64_t end = 0;
  Form form = Form::kDense;
  int64_t rank = 0;
};

struct LinearPart {
  LinearId layer = kNone;
  std::span<const RowGroup> groups = {};
  Tensor out = {};  // [>= rows, layer.out]
};

// Several layers that read the same input, in one pass.
struct LinearCall {
  Tensor in = {};  // [>= rows, layer.in]
  int64_t rows = 0;
  std::span<const LinearPart> parts = {};
  bool add_to_output = false;  // out += y instead of out = y
};

enum class NormKind : uint8_t { kRms, kLayerNorm };

// out[t] = norm(in[t]) * gain (+ bias). `in` and `out` may be the same tensor.
struct NormCall {
  NormKind kind = NormKind::kRms;
  float epsilon = 0;
  VectorId gain = kNone;
  VectorId bias = kNone;
  Tensor in = {};
  Tensor out = {};
  int64_t rows = 0;
};

enum class ActivationKind : uint8_t { kSilu, kGeluErf, kGeluTanh };

// out[t] = activation(in[t]), times up[t] where `up` is set (SwiGLU). `out` may be `in`.
struct ActivationCall {
  ActivationKind kind = ActivationKind::kSilu;
  Tensor in = {};
  Tensor up = {};
  Tensor out = {};
  int64_t rows = 0;
};

// The two halves of an MLP: hidden = activation(first part) (times the second part), and y of it.
struct MlpCall {
  // {up}, or {gate, up}. Their outputs are scratch: undefined afterwards.
  LinearCall expand = {};
  ActivationKind activation = ActivationKind::kSilu;
  LinearCall contract = {};  // of `expand`'s last output, where `hidden` may be left
};

// One sequence's share of a step: rows [row_begin, row_begin + rows) are its tokens at positions
// [position, position + rows). `pages` lists its KV cache pages; page i holds positions
// [i * page_size, (i + 1) * page_size). Encoders have none.
struct SequenceRows {
  int64_t row_begin = 0;
  int64_t rows = 0;
  int64_t position = 0;
  std::span<const int32_t> pages = {};
};

// Rotates q and k (half-split convention: element i pairs with i + head_dim / 2) where
// `inverse_frequencies` is set, stores k and v in the cache of `layer` where the model has one,
// and attends: out = softmax(q k^T * scale) v over the sequence, causally or not.
// With a cache, keys and values of earlier steps are read from it; without, from `k` and `v`.
struct AttentionCall {
  int64_t layer = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  float scale = 1;
  bool causal = true;
  VectorId inverse_frequencies = kNone;  // [head_dim / 2]
  Tensor q = {};                         // [rows, num_heads * head_dim]
  Tensor k = {};                         // [rows, num_kv_heads * head_dim]
  Tensor v = {};                         // [rows, num_kv_heads * head_dim]
  Tensor out = {};                       // [rows, num_heads * head_dim]; may be q
  std::span<const SequenceRows> sequences = {};
};

// out[t] (+)= table[ids[t]].
struct EmbedCall {
  TableId table = kNone;
  LinearId linear = kNone;  // instead of a table: the rows of this layer's dense form (tied head)
  std::span<const int32_t> ids = {};
  bool add_to_output = false;
  Tensor out = {};
};

enum class PoolingKind : uint8_t { kMean, kCls };

// out[s] = pooled rows of sequence s, scaled to unit length where `normalise` is set.
struct PoolCall {
  PoolingKind kind = PoolingKind::kMean;
  bool normalise = true;
  Tensor in = {};
  Tensor out = {};
  std::span<const SequenceRows> sequences = {};
};

struct KvCacheShape {
  int64_t num_layers = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t page_size = 0;  // positions
  int64_t num_pages = 0;
};

// A step takes about the time of its bytes and that of its FLOPs.
struct StepCosts {
  double bytes_per_flop = 0.1;  // that the device reads while it does one FLOP of planes or dense
  double factor_weight = 1;     // FLOPs of planes in the time of one of factors
  double coarse_weight = 1;     // FLOPs of planes in the time of one of the coarse plane alone
};

// A device that holds weights and runs the operations of a step, one after the other.
//
// Not thread-safe: one thread owns a backend and calls it. Loading copies: what a view points to
// may go when the call has returned. Operations do not fail and do not allocate once they have
// been called with the same or larger sizes; ids, shapes and groups that do not fit are our own
// broken invariants (CHECK).
class Backend {
 public:
  virtual ~Backend() = default;

  // Loading. INVALID_ARGUMENT names the layer and what does not fit; RESOURCE_EXHAUSTED when the
  // device has no memory left.
  virtual absl::StatusOr<LinearId> LoadLinear(const LinearWeights& weights) = 0;
  virtual absl::StatusOr<VectorId> LoadVector(std::span<const float> values) = 0;
  virtual absl::StatusOr<TableId> LoadTable(std::span<const float> values, int64_t rows,
                                            int64_t cols) = 0;  // stored as bf16 where exact
  virtual absl::StatusOr<Tensor> Allocate(int64_t rows, int64_t cols) = 0;
  // REQUIRES: called at most once.
  virtual absl::Status AllocateKvCache(const KvCacheShape& shape) = 0;

  // The operations of a step.
  virtual void Embed(const EmbedCall& call) = 0;
  virtual void Norm(const NormCall& call) = 0;
  virtual void Linear(const LinearCall& call) = 0;
  virtual void Activation(const ActivationCall& call) = 0;
  // As Linear, Activation and Linear, which is what it does where a backend has nothing better.
  virtual void Mlp(const MlpCall& call);
  virtual void Attention(const AttentionCall& call) = 0;
  virtual void Pool(const PoolCall& call) = 0;
  // out[i] = in[rows[i]].
  virtual void Gather(const Tensor& in, std::span<const int64_t> rows, const Tensor& out) = 0;
  // Waits for what was submitted and copies rows [row_begin, row_begin + rows) to `out` as floats.
  virtual void Read(const Tensor& in, int64_t row_begin, int64_t rows, float* out) = 0;

  // What the Linear calls executed since the backend was made: bytes once for each pass over a
  // part, FLOPs for each row.
  virtual LinearCost executed() const = 0;
  // Bytes held for weights (the device's own layout) and for the KV cache.
  virtual int64_t resident_weight_bytes() const = 0;
  virtual int64_t kv_cache_bytes() const = 0;
  // What a step of `rows` costs, roughly: choices between two ways to run it rest on this, never a
  // result.
  virtual StepCosts step_costs(int64_t rows) const;
  // Bytes that a KV cache of this shape takes.
  virtual int64_t KvCacheBytes(const KvCacheShape& shape) const = 0;
};

}  // namespace nestor
