// The kernels with AVX-512 and its dot product of bytes (VNNI): what they change against AVX2; the
// rest are AVX2's. Compiled for those instruction sets, so this file includes plain data and
// intrinsics alone: an inline function of a header, compiled here, could be the copy that the
// linker keeps for everyone.
//
// What a row yields never depends on how many rows share the call: every template instance does
// the same operations per row in the same order.

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/factor_b_rows.h"
#include "kernels/cpu/gemm_tiles_avx512.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/kernels_avx512_elementwise.h"
#include "kernels/cpu/middle_plane.h"
#include "kernels/cpu/transpose_words_avx2.h"

namespace nestor {
namespace {

constexpr int64_t kGroup = 32;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kCodeBytes = 4 * kLineBytes;

int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

inline __m512 Floats16FromBfloat16(const uint16_t* values) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __m512 ScaleOf(uint16_t bits) {
  return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int32_t>(bits) << 16));
}

// 4 codes, in every lane.
inline __m512i Broadcast4(const int8_t* codes) {
  int32_t bits;
  __builtin_memcpy(&bits, codes, sizeof(bits));
  return _mm512_set1_epi32(bits);
}

// ---- int8 activations ----

void QuantiseGroup(const float* x, int8_t* codes, float* scale, int32_t* offset) {
  const __m512 first = _mm512_loadu_ps(x);
  const __m512 second = _mm512_loadu_ps(x + 16);
  // Magnitudes compare as integers, and there NaN is above infinity.
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const int32_t largest_bits = _mm512_reduce_max_epi32(
      _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(first), magnitude),
                       _mm512_and_si512(_mm512_castps_si512(second), magnitude)));
  const float absmax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(largest_bits)));
  *scale = largest_bits >= 0x7f800000 ? __builtin_nanf("") : absmax / 127.0f;
  if (largest_bits >= 0x7f800000 || absmax < 1e-30f) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_setzero_si256());
    *offset = 0;
    return;
  }
  const __m512 inverse = _mm512_set1_ps(1.0f / *scale);
  const __m512i q0 = _mm512_cvtps_epi32(_mm512_mul_ps(first, inverse));
  const __m512i q1 = _mm512_cvtps_epi32(_mm512_mul_ps(second, inverse));
  *offset = -128 * _mm512_reduce_add_epi32(_mm512_add_epi32(q0, q1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtsepi32_epi8(q0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16), _mm512_cvtsepi32_epi8(q1));
}

// Lane i of the result is the largest of rows[i].
inline __m128i LargestOf4(const __m512i* rows) {
  const __m512i a = _mm512_max_epi32(_mm512_unpacklo_epi32(rows[0], rows[1]),
                                     _mm512_unpackhi_epi32(rows[0], rows[1]));
  const __m512i b = _mm512_max_epi32(_mm512_unpacklo_epi32(rows[2], rows[3]),
                                     _mm512_unpackhi_epi32(rows[2], rows[3]));
  const __m512i c = _mm512_max_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  const __m256i d = _mm256_max_epi32(_mm512_castsi512_si256(c), _mm512_extracti64x4_epi64(c, 1));
  return _mm_max_epi32(_mm256_castsi256_si128(d), _mm256_extracti128_si256(d, 1));
}

// Four groups at once, the same to the bit: their reductions and divisions share vectors.
void Quantise4Groups(const float* x, int64_t x_stride, int8_t* codes, int64_t code_stride,
                     float* scales, int32_t* offsets, int64_t scale_stride) {
  __m512 values[8];
  __m512i largest[4];
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = _mm512_loadu_ps(x + i * x_stride);
    values[2 * i + 1] = _mm512_loadu_ps(x + i * x_stride + 16);
    largest[i] =
        _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(values[2 * i]), magnitude),
                         _mm512_and_si512(_mm512_castps_si512(values[2 * i + 1]), magnitude));
  }
  const __m128i bits = LargestOf4(largest);
  const __m128 absmax = _mm_castsi128_ps(bits);
  const int is_common = _mm_movemask_ps(
      _mm_castsi128_ps(_mm_and_si128(_mm_cmplt_epi32(bits, _mm_set1_epi32(0x7f800000)),
                                     _mm_castps_si128(_mm_cmpge_ps(absmax, _mm_set1_ps(1e-30f))))));
  if (is_common != 0xf) {
    for (int i = 0; i < 4; ++i)
      QuantiseGroup(x + i * x_stride, codes + i * code_stride, scales + i * scale_stride,
                    offsets + i * scale_stride);
    return;
  }
  alignas(16) float scale[4];
  alignas(16) float inverse[4];
  const __m128 quotients = _mm_div_ps(absmax, _mm_set1_ps(127.0f));
  _mm_store_ps(scale, quotients);
  _mm_store_ps(inverse, _mm_div_ps(_mm_set1_ps(1.0f), quotients));
  __m256i sums[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 factor = _mm512_set1_ps(inverse[i]);
    const __m512i q0 = _mm512_cvtps_epi32(_mm512_mul_ps(values[2 * i], factor));
    const __m512i q1 = _mm512_cvtps_epi32(_mm512_mul_ps(values[2 * i + 1], factor));
    const __m256i group = _mm256_set_m128i(_mm512_cvtsepi32_epi8(q1), _mm512_cvtsepi32_epi8(q0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i * code_stride), group);
    sums[i] = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), group);
  }
  const __m256i pairs =
      _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
  const __m128i total =
      _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  alignas(16) int32_t offset[4];
  _mm_store_si128(reinterpret_cast<__m128i*>(offset), _mm_mullo_epi32(total, _mm_set1_epi32(-128)));
  for (int i = 0; i < 4; ++i) {
    scales[i * scale_stride] = scale[i];
    offsets[i * scale_stride] = offset[i];
  }
}

void QuantiseGroups(const float* x, int64_t x_stride, int64_t count, int8_t* codes,
                    int64_t code_stride, float* scales, int32_t* offsets, int64_t scale_stride) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    Quantise4Groups(x + i * x_stride, x_stride, codes + i * code_stride, code_stride,
                    scales + i * scale_stride, offsets + i * scale_stride, scale_stride);
  for (; i < count; ++i)
    QuantiseGroup(x + i * x_stride, codes + i * code_stride, scales + i * scale_stride,
                  offsets + i * scale_stride);
}

void Quantise(const float* x, int64_t n, int8_t* codes, float* scales, int32_t* offsets) {
  const int64_t g = n / kGroup;
  QuantiseGroups(x, kGroup, g, codes, kGroup, scales, offsets, 1);
  if (g * kGroup == n) return;
  float padded[kGroup] = {};
  for (int64_t j = g * kGroup; j < n; ++j) padded[j - g * kGroup] = x[j];
  QuantiseGroup(padded, codes + g * kGroup, scales + g, offsets + g);
}

// ---- planes ----

// A group of both planes as 16 hi + lo + 128, or of the coarse one as 16 hi + 128; line c has, for
// each output, inputs 4 c to 4 c + 3.
template <bool kHasFine>
inline void UnpackGroup(const uint8_t* coarse, const uint8_t* fine, __m512i* lines) {
  const __m512i high_nibble = _mm512_set1_epi8(static_cast<char>(0xf0));
#pragma GCC unroll 8
  for (int c = 0; c < 4; ++c) {
    const __m512i hi = _mm512_loadu_si512(coarse + c * kLineBytes);
    const __m512i low_inputs = _mm512_slli_epi16(hi, 4);
    if (kHasFine) {
      const __m512i lo = _mm512_loadu_si512(fine + c * kLineBytes);
      const __m512i eight = _mm512_set1_epi8(8);
      // (mask & a) | (~mask & b)
      lines[c] =
          _mm512_sub_epi8(_mm512_ternarylogic_epi32(high_nibble, low_inputs, lo, 0xca), eight);
      lines[4 + c] = _mm512_sub_epi8(
          _mm512_ternarylogic_epi32(high_nibble, hi, _mm512_srli_epi16(lo, 4), 0xca), eight);
    } else {
      lines[c] = _mm512_and_si512(low_inputs, high_nibble);
      lines[4 + c] = _mm512_and_si512(hi, high_nibble);
    }
  }
}

// The products of a group's 16 outputs with one row, exact in 32 bits.
inline __m512i DotGroup(const __m512i* lines, const int8_t* codes, int32_t offset) {
  __m512i dots = _mm512_set1_epi32(offset);
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) dots = _mm512_dpbusd_epi32(dots, lines[c], Broadcast4(codes + 4 * c));
  return dots;
}

template <int T, bool kHasFine>
void PlanesTile(const uint8_t* coarse, const uint8_t* fine, int64_t groups,
                const QuantisedRow* rows, float* out) {
  __m512 sums[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    __m512i lines[8];
    UnpackGroup<kHasFine>(coarse, fine, lines);
    const __m512 scales =
        Floats16FromBfloat16(reinterpret_cast<const uint16_t*>(coarse + kCodeBytes));
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const __m512i dots = DotGroup(lines, rows[t].codes + g * kGroup, rows[t].offsets[g]);
      sums[t] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dots), scales),
                                _mm512_set1_ps(rows[t].scales[g]), sums[t]);
    }
    coarse += kCoarseGroupBytes;
    if (kHasFine) fine += kFineGroupBytes;
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) _mm512_storeu_ps(out + rows[t].index * kUnitOutputs, sums[t]);
}

template <bool kHasFine>
void PlanesRows(const uint8_t* coarse, const uint8_t* fine, int64_t groups,
                const QuantisedRow* rows, int num_rows, float* out) {
  for (; num_rows >= 16; num_rows -= 16, rows += 16)
    PlanesTile<16, kHasFine>(coarse, fine, groups, rows, out);
  for (; num_rows >= 8; num_rows -= 8, rows += 8)
    PlanesTile<8, kHasFine>(coarse, fine, groups, rows, out);
  using Tile = void (*)(const uint8_t*, const uint8_t*, int64_t, const QuantisedRow*, float*);
  constexpr Tile kTiles[] = {PlanesTile<1, kHasFine>, PlanesTile<2, kHasFine>,
                             PlanesTile<3, kHasFine>, PlanesTile<4, kHasFine>,
                             PlanesTile<5, kHasFine>, PlanesTile<6, kHasFine>,
                             PlanesTile<7, kHasFine>};
  if (num_rows > 0) kTiles[num_rows - 1](coarse, fine, groups, rows, out);
}

void Planes(const uint8_t* coarse, const uint8_t* fine, int64_t groups, const QuantisedRow* rows,
            int num_rows, float* out) {
  if (fine != nullptr) {
    PlanesRows<true>(coarse, fine, groups, rows, num_rows, out);
  } else {
    PlanesRows<false>(coarse, fine, groups, rows, num_rows, out);
  }
}

// ---- factors ----

template <int T>
void FactorATile(const int8_t* a, const uint16_t* scales, int64_t groups, const QuantisedRow* rows,
                 float* z) {
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512 sums[T];
  __m256 offsets[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    sums[t] = _mm512_setzero_ps();
    offsets[t] = _mm256_setzero_ps();
  }
  for (int64_t first = 0; first < groups; first += 8) {
    const int64_t count = Min(8, groups - first);
    const auto mask = static_cast<__mmask8>((1u << static_cast<unsigned>(count)) - 1u);
    const __m128i bits = _mm_maskz_loadu_epi16(mask, scales + first);
    const __m256 weight_scales =
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    __m512 products[T];  // scale of the weights times that of the row, in the lower 8 lanes
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const __m256 product =
          _mm256_mul_ps(weight_scales, _mm256_maskz_loadu_ps(mask, rows[t].scales + first));
      // Weights are taken plus 128.
      const __m256i offset = _mm256_maskz_loadu_epi32(mask, rows[t].offsets + first);
      offsets[t] = _mm256_fmadd_ps(product, _mm256_cvtepi32_ps(offset), offsets[t]);
      products[t] = _mm512_castps256_ps512(product);
    }
    // Lanes 0..7 hold the sums of the first group of a pair.
    __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    for (int64_t g = 0; g < count; g += 2) {
      const int64_t at = (first + g) * kGroup;
      const __mmask8 groups_mask = g + 1 < count ? 0xff : 0x0f;
      const __m512i weights = _mm512_xor_si512(_mm512_maskz_loadu_epi64(groups_mask, a + at), sign);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m512i x = _mm512_maskz_loadu_epi64(groups_mask, rows[t].codes + at);
        const __m512i dots = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, x);
        sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots),
                                  _mm512_permutexvar_ps(spread, products[t]), sums[t]);
      }
      spread = _mm512_add_epi32(spread, _mm512_set1_epi32(2));
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const __m512 all = _mm512_add_ps(sums[t], _mm512_zextps256_ps512(offsets[t]));
    z[t] = _mm512_reduce_add_ps(all);
  }
}

void FactorA(const int8_t* a, const uint16_t* scales, int64_t groups, const QuantisedRow* rows,
             int num_rows, float* z) {
  for (; num_rows >= 4; num_rows -= 4, rows += 4, z += 4)
    FactorATile<4>(a, scales, groups, rows, z);
  if (num_rows == 3) FactorATile<3>(a, scales, groups, rows, z);
  if (num_rows == 2) FactorATile<2>(a, scales, groups, rows, z);
  if (num_rows == 1) FactorATile<1>(a, scales, groups, rows, z);
}

// z are pairs of 16-bit integers.
template <int T>
void FactorBTile(const int8_t* panel, const int8_t* next, int64_t pairs, const int32_t* const* z,
                 const float* scales, float* const* out) {
  __m512i sums[T][2];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) sums[t][0] = sums[t][1] = _mm512_setzero_si512();
  for (int64_t k = 0; k < pairs; ++k) {
    _mm_prefetch(next + k * 2 * kUnitOutputs, _MM_HINT_T0);
    __m512i b[2];
#pragma GCC unroll 8
    for (int half = 0; half < 2; ++half) {
      const int8_t* codes = panel + (2 * k + half) * kUnitOutputs;
      b[half] = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const __m512i weights = _mm512_set1_epi32(z[t][k]);
      sums[t][0] = _mm512_dpwssd_epi32(sums[t][0], b[0], weights);
      sums[t][1] = _mm512_dpwssd_epi32(sums[t][1], b[1], weights);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const __m512 scale = _mm512_set1_ps(scales[t]);
#pragma GCC unroll 8
    for (int half = 0; half < 2; ++half) {
      float* at = out[t] + 16 * half;
      _mm512_storeu_ps(
          at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t][half]), scale, _mm512_loadu_ps(at)));
    }
  }
}

// z times the scales, as 16-bit integers times the scale that is returned: NaN where one is not
// finite. `rounded` takes rank rounded up to 16 of them, zeros behind the last.
float RoundZ(const uint16_t* scales, const float* z, int64_t rank, float* scratch,
             int16_t* rounded) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t k = 0; k < rank; k += 16) {
    const __mmask16 mask = LanesOf(Min(16, rank - k));
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, scales + k));
    const __m512 value = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
                                       _mm512_maskz_loadu_ps(mask, z + k));
    _mm512_storeu_ps(scratch + k, value);
    largest = _mm512_max_epi32(
        largest, _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7fffffff)));
  }
  const int32_t largest_bits = _mm512_reduce_max_epi32(largest);
  const float absmax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(largest_bits)));
  const bool is_finite = largest_bits < 0x7f800000;
  const float limit = static_cast<float>(LargestZ(rank));
  const bool is_zero = !is_finite || absmax < 1e-30f;
  const __m512 inverse = _mm512_set1_ps(is_zero ? 0.0f : limit / absmax);
  for (int64_t k = 0; k < rank; k += 16) {
    __m512i q = _mm512_setzero_si512();
    if (!is_zero) q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(scratch + k), inverse));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded + k), _mm512_cvtsepi32_epi16(q));
  }
  if (!is_finite) return __builtin_nanf("");
  return absmax / limit;
}

void FactorB(const int8_t* panel, const int8_t* next, const uint16_t* scales, int64_t rank,
             const FloatRow* rows, int num_rows, float* scratch, float* out) {
  ForFourRows(scales, rank, rows, num_rows, scratch, out, RoundZ,
              [&](int count, int64_t pairs, const int32_t* const* z, const float* z_scales,
                  float* const* at) {
                if (count == 4) FactorBTile<4>(panel, next, pairs, z, z_scales, at);
                if (count == 3) FactorBTile<3>(panel, next, pairs, z, z_scales, at);
                if (count == 2) FactorBTile<2>(panel, next, pairs, z, z_scales, at);
                if (count == 1) FactorBTile<1>(panel, next, pairs, z, z_scales, at);
              });
}

// ---- bf16 ----

// Even and odd inputs add up apart. Sums are in the panel's order of outputs until the end.
template <int T>
void Bf16Tile(const uint16_t* panel, int64_t n, const FloatRow* rows, float* out) {
  __m512 sums[T][2];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) sums[t][0] = sums[t][1] = _mm512_setzero_ps();
  const auto add = [&](int64_t j, int parity) __attribute__((always_inline)) {
    const __m512 weights = Floats16FromBfloat16(panel + j * kPanelOutputs);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
      sums[t][parity] =
          _mm512_fmadd_ps(weights, _mm512_set1_ps(rows[t].values[j]), sums[t][parity]);
  };
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    add(j, 0);
    add(j + 1, 1);
    add(j + 2, 0);
    add(j + 3, 1);
  }
  for (; j < n; ++j) add(j, static_cast<int>(j % 2));
  const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
    _mm512_storeu_ps(out + rows[t].index * kUnitOutputs,
                     _mm512_permutexvar_ps(order, _mm512_add_ps(sums[t][0], sums[t][1])));
}

void Bf16Panel(const uint16_t* panel, int64_t n, const FloatRow* rows, int num_rows, float* out) {
  for (; num_rows >= 8; num_rows -= 8, rows += 8) Bf16Tile<8>(panel, n, rows, out);
  using Tile = void (*)(const uint16_t*, int64_t, const FloatRow*, float*);
  constexpr Tile kTiles[] = {Bf16Tile<1>, Bf16Tile<2>, Bf16Tile<3>, Bf16Tile<4>,
                             Bf16Tile<5>, Bf16Tile<6>, Bf16Tile<7>};
  if (num_rows > 0) kTiles[num_rows - 1](panel, n, rows, out);
}

// ---- many rows in int8 ----

// 8 lines of codes and the scales.
constexpr int64_t kGroupBytes = 9 * kLineBytes;

void WriteScales(__m512 scales, uint8_t* group) {
  _mm512_store_ps(reinterpret_cast<float*>(group + 8 * kLineBytes), scales);
}

template <bool kHasFine>
void Int8PanelFromPlanesTile(const uint8_t* coarse, const uint8_t* fine, int64_t groups,
                             uint8_t* panel) {
  for (int64_t g = 0; g < groups; ++g, panel += kGroupBytes) {
    __m512i lines[8];
    UnpackGroup<kHasFine>(coarse, fine, lines);
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) _mm512_store_si512(panel + c * kLineBytes, lines[c]);
    WriteScales(Floats16FromBfloat16(reinterpret_cast<const uint16_t*>(coarse + kCodeBytes)),
                panel);
    coarse += kCoarseGroupBytes;
    if (kHasFine) fine += kFineGroupBytes;
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
  const __m256i sign = _mm256_set1_epi8(static_cast<char>(0x80));
  for (int64_t g = 0; g < groups; ++g, panel += kGroupBytes) {
    alignas(64) uint32_t group_scales[kPanelOutputs] = {};
    for (int64_t k = 0; k < count; ++k)
      group_scales[k] = static_cast<uint32_t>(scales[k * scale_stride + g]) << 16;
#pragma GCC unroll 8
    for (int64_t half = 0; half < 2; ++half) {
      __m256i rows[8];  // of 8 components: 8 words of 4 inputs, one to each line
#pragma GCC unroll 8
      for (int64_t i = 0; i < 8; ++i) {
        const int64_t k = 8 * half + i;
        const int8_t* codes = a + (k < count ? k : 0) * stride + g * kGroup;
        rows[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
      }
      Transpose8Words(rows);
#pragma GCC unroll 8
      for (int64_t c = 0; c < 8; ++c)
        _mm256_store_si256(reinterpret_cast<__m256i*>(panel + c * kLineBytes + 32 * half),
                           _mm256_xor_si256(rows[c], sign));
    }
    // Components from `count` on are copies of the first with the scale 0.
    WriteScales(_mm512_castsi512_ps(_mm512_load_si512(group_scales)), panel);
  }
}

// scales / largest in units of 2^-15, for 32 components; 0 where a component has none.
inline __m512i Ratios(const uint16_t* scales, const uint16_t* largest) {
  __m512i halves[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512 divisor = Floats16FromBfloat16(largest + 16 * i);
    const __mmask16 is_used = _mm512_cmp_ps_mask(divisor, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __m512 ratio =
        _mm512_maskz_div_ps(is_used, Floats16FromBfloat16(scales + 16 * i), divisor);
    halves[i] = _mm512_cvtps_epi32(_mm512_mul_ps(ratio, _mm512_set1_ps(32768.0f)));
  }
  // 32,768 saturates to 32,767.
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtsepi32_epi16(halves[0])),
                            _mm512_cvtsepi32_epi16(halves[1]), 1);
}

void Int8GroupFromB(const int8_t* const* pairs, const uint16_t* scales, const uint16_t* largest,
                    uint8_t* group) {
  alignas(64) uint16_t ratios[kGroup];
  _mm512_store_si512(ratios, Ratios(scales, largest));
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  // Packing leaves, in 16 bytes, a pair of 4 outputs and then the other pair of them.
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_set_epi8(15, 14, 7, 6, 13, 12, 5, 4, 11, 10, 3, 2, 9, 8, 1, 0));
  const auto scaled = [&](int pair) {
    int32_t factors;
    __builtin_memcpy(&factors, ratios + 2 * pair, sizeof(factors));
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs[pair]));
    return _mm512_mulhrs_epi16(_mm512_cvtepi8_epi16(codes), _mm512_set1_epi32(factors));
  };
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) {
    const __m512i packed = _mm512_packs_epi16(scaled(2 * c), scaled(2 * c + 1));
    _mm512_store_si512(group + c * kLineBytes,
                       _mm512_xor_si512(_mm512_shuffle_epi8(packed, order), sign));
  }
  WriteScales(_mm512_set1_ps(1.0f), group);
}

template <int T>
void Int8GemmTile(const QuantisedRows& rows, int64_t first, int64_t groups, const uint8_t* panel,
                  const float* bias, float* out, int64_t out_stride, int64_t outputs, bool adds) {
  const int8_t* codes = rows.codes + first * rows.code_stride;
  const float* scales = rows.scales + first * rows.scale_stride;
  const int32_t* offsets = rows.offsets + first * rows.scale_stride;
  __m512 sums[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    __m512i lines[8];
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) lines[c] = _mm512_load_si512(panel + c * kLineBytes);
    const __m512 weight_scales =
        _mm512_load_ps(reinterpret_cast<const float*>(panel + 8 * kLineBytes));
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const __m512i dots = DotGroup(lines, codes + t * rows.code_stride + g * kGroup,
                                    offsets[t * rows.scale_stride + g]);
      sums[t] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dots), weight_scales),
                                _mm512_set1_ps(scales[t * rows.scale_stride + g]), sums[t]);
    }
    panel += kGroupBytes;
  }
  const __mmask16 mask = LanesOf(outputs);
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) Finish(sums[t], bias, mask, adds, out + (first + t) * out_stride);
}

void Int8Gemm(const QuantisedRows& rows, int64_t num_rows, int64_t groups, const uint8_t* panel,
              const float* bias, float* out, int64_t out_stride, int64_t outputs, bool adds) {
  ForEachTile(num_rows, [&](auto tile, int64_t t) {
    Int8GemmTile<tile.kRows>(rows, t, groups, panel, bias, out, out_stride, outputs, adds);
  });
}

// ---- many rows in fp32 ----

template <int T>
void GemmTile(const float* x, int64_t x_stride, int64_t depth, const float* panel,
              const float* bias, float* out, int64_t out_stride, int64_t outputs, bool adds) {
  __m512 sums[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_ps();
  for (int64_t j = 0; j < depth; ++j) {
    const __m512 weights = _mm512_load_ps(panel + j * kPanelOutputs);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
      sums[t] = _mm512_fmadd_ps(weights, _mm512_set1_ps(x[t * x_stride + j]), sums[t]);
  }
  const __mmask16 mask = LanesOf(outputs);
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) Finish(sums[t], bias, mask, adds, out + t * out_stride);
}

void Gemm(const float* x, int64_t x_stride, int64_t rows, int64_t depth, const float* panel,
          const float* bias, float* out, int64_t out_stride, int64_t outputs, bool adds) {
  ForEachTile(rows, [&](auto tile, int64_t t) {
    GemmTile<tile.kRows>(x + t * x_stride, x_stride, depth, panel, bias, out + t * out_stride,
                         out_stride, outputs, adds);
  });
}

// Components k and k + 1 of 16 outputs of a B panel, as floats.
inline void LoadPair(const int8_t* b, int64_t k, __m512* first, __m512* second) {
  const int8_t* codes = b + k * kUnitOutputs;
  const __m512i pairs =
      _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  *first = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pairs, 16), 16));
  *second = _mm512_cvtepi32_ps(_mm512_srai_epi32(pairs, 16));
}

void PanelFromB(const int8_t* b, const uint16_t* scales, int64_t rank, float* panel) {
  for (int64_t k = 0; k < rank; k += 2) {
    __m512 first;
    __m512 second;
    LoadPair(b, k, &first, &second);
    _mm512_store_ps(panel + k * kPanelOutputs, _mm512_mul_ps(ScaleOf(scales[k]), first));
    if (k + 1 == rank) break;
    _mm512_store_ps(panel + (k + 1) * kPanelOutputs, _mm512_mul_ps(ScaleOf(scales[k + 1]), second));
  }
}

CpuKernels MakeKernels() {
  CpuKernels kernels = Avx2Kernels();
  kernels.instruction_set = CpuInstructionSet::kAvx512;
  SetAvx512Elementwise(&kernels);
  kernels.quantise = Quantise;
  kernels.quantise_groups = QuantiseGroups;
  kernels.planes = Planes;
  kernels.fine_from_middle = FineFromMiddle;
  kernels.factor_a = FactorA;
  kernels.factor_b = FactorB;
  kernels.bf16_panel = Bf16Panel;
  kernels.panel_from_b = PanelFromB;
  kernels.gemm = Gemm;
  kernels.int8_group_bytes = kGroupBytes;
  kernels.int8_panel_from_planes = Int8PanelFromPlanes;
  kernels.int8_panel_from_a = Int8PanelFromA;
  kernels.int8_group_from_b = Int8GroupFromB;
  kernels.int8_gemm = Int8Gemm;
  return kernels;
}

}  // namespace

const CpuKernels& Avx512Kernels() {
  static const CpuKernels kKernels = MakeKernels();
  return kKernels;
}

}  // namespace nestor
