#pragma once

#include <cstdint>

#include "kernels/cpu/cpu_info.h"

namespace nestor {

enum class ActivationKind : uint8_t;  // kernels/backend.h

// The inner loops of the CPU backend, one table per instruction set. Plain functions on raw
// pointers: they neither allocate nor fail. This header holds plain data only, since files
// compiled for other instruction sets include it.
//
// Layouts ("line" is 64 bytes; packed_linear.h says how they are filled):
//   coarse panel  16 outputs: [groups] x {4 lines of codes, 16 bf16 scales} = 288 bytes each
//   fine panel    16 outputs: [groups] x 4 lines of codes = 256 bytes each
//   middle panel  16 outputs: [groups] x 2 lines (middle_plane.h) = 128 bytes each
//     A line c holds for each output o and i < 4, at byte 4 o + i, the code of input 4 c + i in the
//     low nibble and of input 16 + 4 c + i in the high one, each plus 8.
//   B panel       32 outputs: [rank / 2][32][2] int8, pairs of components, and [rank] bf16 scales
//   bf16 panel    16 outputs: [in][16]; element 2 i is output i, element 2 i + 1 output 8 + i
// and, unpacked for many rows:
//   fp32 panel    16 outputs: [in][16]
//   int8 panel    16 outputs: [groups] x {codes, 16 fp32 scales}, int8_group_bytes each. AVX-512: 8
//                 lines of codes plus 128; line c holds for output o, at byte 4 o + i, input 4 c +
//                 i. AVX2: 16 lines of 16-bit codes, one for a pair of inputs: [16 pairs][16][2]
//   pair panel    16 outputs in bf16: [in / 2][16][2], zeros behind an odd last input

inline constexpr int64_t kPanelOutputs = 16;
inline constexpr int64_t kUnitOutputs = 32;  // two panels, or one B panel
inline constexpr int64_t kCoarseGroupBytes = 288;
inline constexpr int64_t kFineGroupBytes = 256;
// Steps of more rows unpack their weights first.
inline constexpr int kMaxFewRows = 16;

// One row of activations in int8: x[j] = scales[j / 32] * codes[j]. `index` is its row in the
// output buffer, which has kUnitOutputs columns. `scales` may be read up to a multiple of 8.
struct QuantisedRow {
  const int8_t* codes = nullptr;
  const float* scales = nullptr;
  const int32_t* offsets = nullptr;  // -128 x the sum of a group's codes
  int64_t index = 0;
};

// The same for row after row.
struct QuantisedRows {
  const int8_t* codes = nullptr;
  int64_t code_stride = 0;
  const float* scales = nullptr;
  const int32_t* offsets = nullptr;
  int64_t scale_stride = 0;  // of the scales and the offsets
};

// One row of floats (activations, or z = A x) and its row in the output buffer.
struct FloatRow {
  const float* values = nullptr;
  int64_t index = 0;
};

// The largest magnitude that factor_b rounds z to.
inline constexpr int64_t LargestZ(int64_t rank) {
  const int64_t bound = INT32_MAX / (127 * (rank + 1));
  return bound < 32767 ? bound : 32767;
}

struct CpuKernels {
  CpuInstructionSet instruction_set;

  // Symmetric int8 in groups of 32, to nearest even: scale = absmax / 127. A group with a value
  // that is not finite gets the scale NaN and codes 0, so that every output that reads it is NaN;
  // one below 1e-30 gets codes 0. Pads codes with 0 up to a group.
  void (*quantise)(const float* x, int64_t n, int8_t* codes, float* scales, int32_t* offsets);

  // out[index][0..15] = the panel times each row; `fine` is null for the coarse plane alone.
  // Bound: 288 (544) bytes and 1,024 (2,048) integer multiply-adds a group and row.
  void (*planes)(const uint8_t* coarse, const uint8_t* fine, int64_t groups,
                 const QuantisedRow* rows, int num_rows, float* out);
  // As `planes` of a coarse and a middle panel: 416 bytes a group. Null where the middle one is
  // made a fine one first.
  void (*middle_planes)(const uint8_t* coarse, const uint8_t* middle, int64_t groups,
                        const QuantisedRow* rows, int num_rows, float* out) = nullptr;
  // The fine panel that a middle one means (middle_plane.h): 384 bytes a group, read and written.
  void (*fine_from_middle)(const uint8_t* middle, int64_t groups, uint8_t* fine);
  // z[i] = one row of A times rows[i], i < num_rows.
  void (*factor_a)(const int8_t* a, const uint16_t* scales, int64_t groups,
                   const QuantisedRow* rows, int num_rows, float* z);
  // out[index][0..31] += the first `rank` components of the B panel, weighted by rows' z: z times
  // the components' scales is rounded to integers below min(32767, 2^31 / (127 rank)), so that sums
  // are exact in 32 bits. z that is not finite makes every output NaN. `scratch` holds
  // 4 * (rank rounded up to 16) floats; z and scales may be read up to a multiple of 8. `next` is
  // the panel that will be read after this one, which a kernel may fetch meanwhile.
  void (*factor_b)(const int8_t* panel, const int8_t* next, const uint16_t* scales, int64_t rank,
                   const FloatRow* rows, int num_rows, float* scratch, float* out);
  // out[index][0..15] = the panel times each row.
  void (*bf16_panel)(const uint16_t* panel, int64_t n, const FloatRow* rows, int num_rows,
                     float* out);
  float (*dot)(const float* a, const float* b, int64_t n);

  // The fp32 path: weights of 16 outputs as floats, transposed, [depth][16], then a product.
  // 32 * groups inputs of a panel of planes.
  void (*panel_from_planes)(const uint8_t* coarse, const uint8_t* fine, int64_t groups,
                            float* panel);
  // 32 * groups inputs of `count` <= 16 components of A, the rest being zeros.
  void (*panel_from_a)(const int8_t* a, int64_t stride, const uint16_t* scales,
                       int64_t scale_stride, int64_t count, int64_t groups, float* panel);
  // `rank` components of 16 outputs of a B panel, from `b` on: the first of a pair for the first.
  void (*panel_from_b)(const int8_t* b, const uint16_t* scales, int64_t rank, float* panel);
  void (*panel_from_bf16)(const uint16_t* values, int64_t depth, float* panel);
  // `count` <= 16 rows of `weights`, the rest being zeros.
  void (*panel_from_f32)(const float* weights, int64_t stride, int64_t count, int64_t depth,
                         float* panel);
  // out[t][0..outputs) (+)= x[t][0..depth) times the panel, plus `bias` where it is not null;
  // outputs <= 16. Bound: 32 * depth FLOPs a row. A row's result does not depend on `rows`.
  void (*gemm)(const float* x, int64_t x_stride, int64_t rows, int64_t depth, const float* panel,
               const float* bias, float* out, int64_t out_stride, int64_t outputs, bool adds);

  // The int8 path of many rows, null without vector instructions: planes and factors times rows
  // that are rounded to int8, exact in 32 bits within a group.
  int64_t int8_group_bytes = 0;
  // One group of each of `count` rows, as `quantise`.
  void (*quantise_groups)(const float* x, int64_t x_stride, int64_t count, int8_t* codes,
                          int64_t code_stride, float* scales, int32_t* offsets,
                          int64_t scale_stride) = nullptr;
  void (*int8_panel_from_planes)(const uint8_t* coarse, const uint8_t* fine, int64_t groups,
                                 uint8_t* panel) = nullptr;
  void (*int8_panel_from_a)(const int8_t* a, int64_t stride, const uint16_t* scales,
                            int64_t scale_stride, int64_t count, int64_t groups,
                            uint8_t* panel) = nullptr;
  // 32 components of 16 outputs of B as a group of an int8 panel with the scale 1: codes times
  // scales / largest <= 1, to nearest. pairs[i] is [16][2], `scales` and `largest` bf16 [32].
  void (*int8_group_from_b)(const int8_t* const* pairs, const uint16_t* scales,
                            const uint16_t* largest, uint8_t* group) = nullptr;
  // As `gemm`. Bound: 1,024 integer multiply-adds a group and row.
  void (*int8_gemm)(const QuantisedRows& rows, int64_t num_rows, int64_t groups,
                    const uint8_t* panel, const float* bias, float* out, int64_t out_stride,
                    int64_t outputs, bool adds) = nullptr;

  // The bf16 path, null where the machine has no dot product of bf16 pairs: bf16 weights times rows
  // that are rounded to bf16. Subnormals count as zeros.
  // out[0..n) to nearest even; zeros from there up to a multiple of 16.
  void (*bf16_round_row)(const float* x, int64_t n, uint16_t* out) = nullptr;
  void (*bf16_panel_from_bf16)(const uint16_t* values, int64_t depth, uint16_t* panel) = nullptr;
  // As `gemm`; where `depth` is odd the value behind a row's last is read, and must be finite.
  void (*bf16_gemm)(const uint16_t* x, int64_t x_stride, int64_t rows, int64_t depth,
                    const uint16_t* panel, const float* bias, float* out, int64_t out_stride,
                    int64_t outputs, bool adds) = nullptr;

  // `bias` may be null; `out` may be `x`.
  void (*rms_norm)(const float* x, const float* gain, const float* bias, int64_t n, float epsilon,
                   float* out);
  void (*layer_norm)(const float* x, const float* gain, const float* bias, int64_t n, float epsilon,
                     float* out);
  // out = activation(x), times `up` where it is not null; `out` may be `x`. Vector forms err by
  // less than 1e-6 of max(|out|, 1e-30).
  void (*silu)(const float* x, const float* up, int64_t n, float* out);
  void (*gelu_erf)(const float* x, const float* up, int64_t n, float* out);
  void (*gelu_tanh)(const float* x, const float* up, int64_t n, float* out);
};

// The kernel of an activation.
using ActivationFunction = void (*)(const float* x, const float* up, int64_t n, float* out);
ActivationFunction ActivationKernel(const CpuKernels& kernels, ActivationKind kind);

const CpuKernels& PortableKernels();
// REQUIRES: the machine has AVX2 and FMA.
const CpuKernels& Avx2Kernels();
// REQUIRES: the machine has AVX-512 F, BW, DQ, VL and VNNI; for the second, BF16 as well.
const CpuKernels& Avx512Kernels();
const CpuKernels& Avx512Bf16Kernels();
// REQUIRES: the machine has `instruction_set`.
const CpuKernels& KernelsFor(CpuInstructionSet instruction_set);

}  // namespace nestor
