#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace nestor {

// The nested linear layer, y = P x + B_r A_r x + bias, as it is stored: W is [out, in], out = m and
// in = n in the formulas. One layer holds its weights once, as parts that add up.

// Inputs (and, for B, outputs) that share one quantisation scale.
inline constexpr int64_t kGroupSize = 32;

constexpr int64_t NumGroups(int64_t size) { return (size + kGroupSize - 1) / kGroupSize; }
constexpr int64_t PaddedToGroup(int64_t size) { return NumGroups(size) * kGroupSize; }

// What a layer runs for a row:
//   kDense     P = W: bf16 (or fp32 from a source checkpoint), or both planes
//   kResidual  P = coarse plane, B A = the first `rank` components of what it leaves out
//   kPrefix    P = 0, B A = the first `rank` components of W itself
//   kMiddle    P = coarse and middle planes, 6 bits a weight; its rank is 0
//   kGar       the same function as a prefix of that rank, in its cheapest gauge: z = A x are
//              `rank` of the outputs themselves, and B z the others (FlexRank, arXiv 2602.02680)
enum class Form : uint8_t { kDense, kResidual, kPrefix, kGar, kMiddle };

// Whether a layer of this form runs factors; the others have rank 0.
constexpr bool HasRanks(Form form) { return form != Form::kDense && form != Form::kMiddle; }

// A pair of nested int8 factors in host memory. Any rank r <= max_rank is the first r rows of `a`
// and of `bt`: (B_r A_r)[i][j] = sum over k < r of bt[k][i] * a[k][j], each code times its scale.
struct FactorView {
  int64_t max_rank = 0;                 // 0: the layer has no such factors
  const int8_t* a = nullptr;            // [max_rank, PaddedToGroup(in)], padding is 0
  const uint16_t* a_scales = nullptr;   // bf16 [max_rank, NumGroups(in)]
  const int8_t* bt = nullptr;           // [max_rank, PaddedToGroup(out)], padding is 0
  const uint16_t* bt_scales = nullptr;  // bf16 [max_rank, NumGroups(out)]
  // The ranks that levels run, in any order: a backend may lay the factors out so that it reads
  // these prefixes in one go. Any other rank is right as well.
  std::vector<int64_t> level_ranks = {};
};

// A prefix of one rank r, frozen: y[rows[k]] = (A x)_k for k < r, y[rows[r + i]] = (B A x)_i for
// the others. It serves no other rank.
struct GarView {
  FactorView factors;             // max_rank is r, 0 < r < out; bt is [r, PaddedToGroup(out - r)]
  const int32_t* rows = nullptr;  // [out], a permutation: the pivots first
};

// The stored parts of one linear layer, borrowed from the artifact or the checkpoint. Exactly one
// of `dense_f32`, `dense_bf16` and the planes is set. `coarse` may also stand beside `dense_bf16`
// (a bf16 artifact with a residual ladder).
//
// Planes (methods: "Residual ladders"): w is about s q, q = 16 hi + lo in [-128, 119], with one
// bf16 scale s, of either sign, for 32 inputs of one output; hi in [-8, 7], lo in [-8, 7]. Then
// coarse = 16 s hi, coarse + fine = s (16 hi + lo). Two codes share a byte, input 2j in the low
// nibble; stored as hi + 8 and lo + 8, so padding is 8.
//
// The middle plane refines the coarse one on its own, for levels between the two and the full one:
// coarse + middle = s (16 hi + 4 mid - 6), mid in [0, 3], and at least 2 beside a
// hi of -8, so that the sum is no less than -128 either. Four codes share a byte, input 4j + i in
// bits 2i and 2i + 1. It repeats what the fine plane knows, so that the full level need not put
// its codes together from three planes.
struct LinearWeights {
  std::string name;
  int64_t out = 0;
  int64_t in = 0;
  const float* dense_f32 = nullptr;      // [out, in]
  const uint16_t* dense_bf16 = nullptr;  // [out, in]
  const uint8_t* coarse = nullptr;       // [out, PaddedToGroup(in) / 2]
  const uint8_t* fine = nullptr;         // [out, PaddedToGroup(in) / 2]
  const uint8_t* middle = nullptr;       // [out, PaddedToGroup(in) / 4], beside `coarse`; or none
  const uint16_t* scales = nullptr;      // bf16 [out, NumGroups(in)]
  FactorView residual;
  FactorView prefix;
  std::vector<GarView> gar = {};  // of different ranks
  const float* bias = nullptr;    // [out]
  // Whether the layer cannot bear inputs that are rounded to int8: backends that would round them
  // multiply it in floating point. What it yields is nearer to the exact product, and slower.
  bool float_activations = false;
};

// What one row costs in a layer. `weight_bytes` are the stored bytes a pass reads (codes and
// scales with their padding, the order of a gar pair's rows, and the bias), `flops` is 2 x the
// weights one row multiplies.
struct LinearCost {
  int64_t weight_bytes = 0;
  int64_t flops = 0;
  LinearCost& operator+=(const LinearCost& other) {
    weight_bytes += other.weight_bytes;
    flops += other.flops;
    return *this;
  }
};

// How the dense form of a layer is stored.
enum class DenseStorage : uint8_t { kF32, kBf16, kPlanes };

// The stated cost of a layer of shape [out, in] at `form` and `rank`. The backends count what they
// execute on their own; a test compares the two.
LinearCost CostOfLinear(int64_t out, int64_t in, bool has_bias, DenseStorage dense, Form form,
                        int64_t rank);

}  // namespace nestor
