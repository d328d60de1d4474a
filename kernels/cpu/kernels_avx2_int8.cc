// Many rows in int8 with AVX2: planes and factors times rows that are rounded to int8. Plain data
// and intrinsics alone, as in kernels_avx2.cc.
//
// AVX2 has no dot product of bytes. vpmaddubsw of a byte's magnitude and vpsignb would need four
// instructions for 32 products, as many as two of vpmaddwd on 16-bit codes and their additions do,
// which need no sign. So panels hold 16-bit codes. A group of 32 inputs and 16 outputs takes 32
// multiplications of pairs and 32 additions a row: on Zen 3, which does two of each a cycle, 16
// cycles, where fp32 takes 32.

#include "kernels/cpu/kernels_avx2_int8.h"

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/gemm_tiles_avx2.h"
#include "kernels/cpu/transpose_words_avx2.h"

namespace nestor {
namespace {

constexpr int64_t kGroup = 32;
constexpr int64_t kPairs = kGroup / 2;
constexpr int64_t kLineBytes = 64;  // one pair of inputs of 16 outputs; or a line of a plane
constexpr int64_t kCodeBytes = 4 * kLineBytes;
constexpr int64_t kGroupBytes = kPairs * kLineBytes + kPanelOutputs * 4;
// Codes of planes and A stand in the upper byte of their 16 bits, which spares a shift. Sums of a
// group still fit: 32 * 127 * 127 * 256 < 2^31.
constexpr float kUpperByte = 1.0f / 256.0f;

inline __m256 FloatsFromBfloat16(const uint16_t* values) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline void WriteScales(__m256 first, __m256 second, uint8_t* group) {
  float* at = reinterpret_cast<float*>(group + kPairs * kLineBytes);
  _mm256_store_ps(at, first);
  _mm256_store_ps(at + 8, second);
}

// 4 codes of each of 8 outputs become two pairs, of inputs 4 c and 4 c + 2.
inline void WritePairs(__m256i codes, int64_t c, int64_t half, uint8_t* group) {
  const __m256i first = _mm256_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13,
                                         -1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13);
  const __m256i second =
      _mm256_add_epi8(first, _mm256_set1_epi16(0x0200));  // the bytes that stay zeros stay negative
  uint8_t* at = group + 2 * c * kLineBytes + 32 * half;
  _mm256_store_si256(reinterpret_cast<__m256i*>(at), _mm256_shuffle_epi8(codes, first));
  _mm256_store_si256(reinterpret_cast<__m256i*>(at + kLineBytes),
                     _mm256_shuffle_epi8(codes, second));
}

template <bool kHasFine>
void Int8PanelFromPlanesTile(const uint8_t* coarse, const uint8_t* fine, int64_t groups,
                             uint8_t* panel) {
  const __m256i high_nibble = _mm256_set1_epi8(static_cast<char>(0xf0));
  const __m256i low_nibble = _mm256_set1_epi8(0x0f);
  // (hi + 8) * 16 less 128 is 16 hi; with lo + 8 beside it, less 8 more.
  const __m256i excess = _mm256_set1_epi8(static_cast<char>(kHasFine ? 0x88 : 0x80));
  for (int64_t g = 0; g < groups; ++g, panel += kGroupBytes) {
    for (int64_t half = 0; half < 2; ++half) {
      for (int64_t c = 0; c < 4; ++c) {
        const int64_t at = c * kLineBytes + 32 * half;
        const __m256i hi = _mm256_load_si256(reinterpret_cast<const __m256i*>(coarse + at));
        // Inputs 4 c in the low nibbles, 16 + 4 c in the high ones.
        __m256i low = _mm256_and_si256(_mm256_slli_epi16(hi, 4), high_nibble);
        __m256i high = _mm256_and_si256(hi, high_nibble);
        if (kHasFine) {
          const __m256i lo = _mm256_load_si256(reinterpret_cast<const __m256i*>(fine + at));
          low = _mm256_or_si256(low, _mm256_and_si256(lo, low_nibble));
          high = _mm256_or_si256(high, _mm256_and_si256(_mm256_srli_epi16(lo, 4), low_nibble));
        }
        WritePairs(_mm256_sub_epi8(low, excess), c, half, panel);
        WritePairs(_mm256_sub_epi8(high, excess), c + 4, half, panel);
      }
    }
    const auto* scales = reinterpret_cast<const uint16_t*>(coarse + kCodeBytes);
    const __m256 unit = _mm256_set1_ps(kUpperByte);
    WriteScales(_mm256_mul_ps(FloatsFromBfloat16(scales), unit),
                _mm256_mul_ps(FloatsFromBfloat16(scales + 8), unit), panel);
    coarse += kCodeBytes + 2 * kPanelOutputs;
    if (kHasFine) fine += kCodeBytes;
  }
}

void Int8PanelFromPlanes(const uint8_t* coarse, const uint8_t* fine, int64_t groups,
                         uint8_t* panel) {
  if (fine != nullptr) {
    Int8PanelFromPlanesTile<true>(coarse, fine, groups, panel);
  } else {
    Int8PanelFromPlanesTile<false>(coarse, nullptr, groups, panel);
  }
}

void Int8PanelFromA(const int8_t* a, int64_t stride, const uint16_t* scales, int64_t scale_stride,
                    int64_t count, int64_t groups, uint8_t* panel) {
  for (int64_t g = 0; g < groups; ++g, panel += kGroupBytes) {
    alignas(32) uint32_t bits[kPanelOutputs] = {};
    for (int64_t k = 0; k < count; ++k)
      bits[k] = static_cast<uint32_t>(scales[k * scale_stride + g]) << 16;
    for (int64_t half = 0; half < 2; ++half) {
      __m256i rows[8];  // of 8 components: 8 words of 4 inputs
#pragma GCC unroll 8
      for (int64_t i = 0; i < 8; ++i) {
        const int64_t k = 8 * half + i;
        const int8_t* codes = a + (k < count ? k : 0) * stride + g * kGroup;
        rows[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
      }
      Transpose8Words(rows);
#pragma GCC unroll 8
      for (int64_t c = 0; c < 8; ++c) WritePairs(rows[c], c, half, panel);
    }
    // Components from `count` on are copies of the first with the scale 0.
    const auto* values = reinterpret_cast<const float*>(bits);
    const __m256 unit = _mm256_set1_ps(kUpperByte);
    WriteScales(_mm256_mul_ps(_mm256_load_ps(values), unit),
                _mm256_mul_ps(_mm256_load_ps(values + 8), unit), panel);
  }
}

// scales / largest in units of 2^-15, for 16 components; 0 where a component has none.
inline __m256i Ratios(const uint16_t* scales, const uint16_t* largest) {
  __m256i halves[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256 divisor = FloatsFromBfloat16(largest + 8 * i);
    const __m256 is_used = _mm256_cmp_ps(divisor, _mm256_setzero_ps(), _CMP_GT_OQ);
    const __m256 ratio = _mm256_div_ps(FloatsFromBfloat16(scales + 8 * i), divisor);
    halves[i] =
        _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_and_ps(ratio, is_used), _mm256_set1_ps(32768.0f)));
  }
  // 32,768 saturates to 32,767.
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(halves[0], halves[1]), 0xd8);
}

void Int8GroupFromB(const int8_t* const* pairs, const uint16_t* scales, const uint16_t* largest,
                    uint8_t* group) {
  alignas(32) uint16_t ratios[kGroup];
  _mm256_store_si256(reinterpret_cast<__m256i*>(ratios), Ratios(scales, largest));
  _mm256_store_si256(reinterpret_cast<__m256i*>(ratios + 16), Ratios(scales + 16, largest + 16));
  for (int64_t pair = 0; pair < kPairs; ++pair) {
    int32_t factors;
    __builtin_memcpy(&factors, ratios + 2 * pair, sizeof(factors));
    for (int64_t half = 0; half < 2; ++half) {
      const auto* codes = reinterpret_cast<const __m128i*>(pairs[pair] + 16 * half);
      const __m256i scaled = _mm256_mulhrs_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(codes)),
                                                 _mm256_set1_epi32(factors));
      _mm256_store_si256(reinterpret_cast<__m256i*>(group + pair * kLineBytes + 32 * half), scaled);
    }
  }
  WriteScales(_mm256_set1_ps(1.0f), _mm256_set1_ps(1.0f), group);
}

// sum += products, in place and in this order: of the intrinsic GCC makes all products of a tile
// before it adds, which takes more registers than there are, or copies every sum (1.5 x).
inline void Add(__m256i products, __m256i* sum) {
  asm volatile("vpaddd %1, %0, %0" : "+x"(*sum) : "x"(products));
}

template <int T>
void Int8GemmTile(const QuantisedRows& rows, int64_t first, int64_t groups, const uint8_t* panel,
                  const PanelBias& bias, float* out, int64_t out_stride, int64_t outputs,
                  bool adds) {
  const int8_t* codes = rows.codes + first * rows.code_stride;
  const float* scales = rows.scales + first * rows.scale_stride;
  alignas(32) int16_t x[T][kGroup];
  alignas(32) float sums[T][kPanelOutputs] = {};
  for (int64_t g = 0; g < groups; ++g, panel += kGroupBytes) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const int8_t* at = codes + t * rows.code_stride + g * kGroup + 16 * i;
        _mm256_store_si256(
            reinterpret_cast<__m256i*>(x[t] + 16 * i),
            _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
      }
    }
    __m256i dots[T][2];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) dots[t][0] = dots[t][1] = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (int64_t pair = 0; pair < kPairs; ++pair) {
      const auto* line = reinterpret_cast<const __m256i*>(panel + pair * kLineBytes);
      const __m256i weights[2] = {_mm256_load_si256(line), _mm256_load_si256(line + 1)};
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        int32_t values;
        __builtin_memcpy(&values, x[t] + 2 * pair, sizeof(values));
        const __m256i value = _mm256_set1_epi32(values);
        Add(_mm256_madd_epi16(weights[0], value), &dots[t][0]);
        Add(_mm256_madd_epi16(weights[1], value), &dots[t][1]);
      }
    }
    const auto* weight_scales = reinterpret_cast<const float*>(panel + kPairs * kLineBytes);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const __m256 scale = _mm256_broadcast_ss(scales + t * rows.scale_stride + g);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* sum = sums[t] + 8 * half;
        const __m256 products = _mm256_mul_ps(_mm256_cvtepi32_ps(dots[t][half]),
                                              _mm256_load_ps(weight_scales + 8 * half));
        _mm256_store_ps(sum, _mm256_fmadd_ps(products, scale, _mm256_load_ps(sum)));
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
    Finish(_mm256_load_ps(sums[t]), _mm256_load_ps(sums[t] + 8), bias, outputs, adds,
           out + (first + t) * out_stride);
}

void Int8Gemm(const QuantisedRows& rows, int64_t num_rows, int64_t groups, const uint8_t* panel,
              const float* bias, float* out, int64_t out_stride, int64_t outputs, bool adds) {
  const PanelBias panel_bias(bias, outputs);
  ForEachTile(num_rows, [&](auto tile, int64_t t) {
    Int8GemmTile<tile.kRows>(rows, t, groups, panel, panel_bias, out, out_stride, outputs, adds);
  });
}

}  // namespace

void SetAvx2Int8(CpuKernels* kernels) {
  kernels->int8_group_bytes = kGroupBytes;
  kernels->int8_panel_from_planes = Int8PanelFromPlanes;
  kernels->int8_panel_from_a = Int8PanelFromA;
  kernels->int8_group_from_b = Int8GroupFromB;
  kernels->int8_gemm = Int8Gemm;
}

}  // namespace nestor
