// The kernels with AVX-512 BF16: products of many rows with bf16 weights. Compiled for that
// instruction set: plain data and intrinsics alone, as in kernels_avx512.cc.

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/gemm_tiles_avx512.h"
#include "kernels/cpu/kernels.h"

namespace nestor {
namespace {

int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

void RoundRow(const float* x, int64_t n, uint16_t* out) {
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 mask = LanesOf(Min(16, n - j));
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x + j));
    // Whole vectors: what lies behind the last value are zeros.
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j), reinterpret_cast<__m256i>(rounded));
  }
}

void PanelFromBf16(const uint16_t* values, int64_t depth, uint16_t* panel) {
  // Output i < 8 is element 2 i, output 8 + i element 2 i + 1, of each of two inputs.
  const __m512i order = _mm512_set_epi16(31, 15, 29, 13, 27, 11, 25, 9, 23, 7, 21, 5, 19, 3, 17, 1,
                                         30, 14, 28, 12, 26, 10, 24, 8, 22, 6, 20, 4, 18, 2, 16, 0);
  for (int64_t j = 0; j < depth; j += 2) {
    const __mmask32 mask = j + 1 < depth ? 0xffffffffu : 0xffffu;
    const __m512i inputs = _mm512_maskz_loadu_epi16(mask, values + j * kPanelOutputs);
    _mm512_store_si512(panel + j * kPanelOutputs, _mm512_permutexvar_epi16(order, inputs));
  }
}

template <int T>
void GemmTile(const uint16_t* x, int64_t x_stride, int64_t depth, const uint16_t* panel,
              const float* bias, float* out, int64_t out_stride, int64_t outputs, bool adds) {
  __m512 sums[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_ps();
  for (int64_t j = 0; j < depth; j += 2) {
    const auto weights = reinterpret_cast<__m512bh>(_mm512_load_si512(panel + j * kPanelOutputs));
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      int32_t pair;
      __builtin_memcpy(&pair, x + t * x_stride + j, sizeof(pair));
      sums[t] =
          _mm512_dpbf16_ps(sums[t], weights, reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)));
    }
  }
  const __mmask16 mask = LanesOf(outputs);
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) Finish(sums[t], bias, mask, adds, out + t * out_stride);
}

void Gemm(const uint16_t* x, int64_t x_stride, int64_t rows, int64_t depth, const uint16_t* panel,
          const float* bias, float* out, int64_t out_stride, int64_t outputs, bool adds) {
  ForEachTile(rows, [&](auto tile, int64_t t) {
    GemmTile<tile.kRows>(x + t * x_stride, x_stride, depth, panel, bias, out + t * out_stride,
                         out_stride, outputs, adds);
  });
}

CpuKernels MakeKernels() {
  CpuKernels kernels = Avx512Kernels();
  kernels.instruction_set = CpuInstructionSet::kAvx512Bf16;
  kernels.bf16_round_row = RoundRow;
  kernels.bf16_panel_from_bf16 = PanelFromBf16;
  kernels.bf16_gemm = Gemm;
  return kernels;
}

}  // namespace

const CpuKernels& Avx512Bf16Kernels() {
  static const CpuKernels kKernels = MakeKernels();
  return kKernels;
}

}  // namespace nestor
