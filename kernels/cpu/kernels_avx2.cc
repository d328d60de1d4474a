// The kernels with AVX2 and FMA. Compiled for those instruction sets, so this file includes plain
// data and intrinsics alone: an inline function of a header, compiled here, could be the copy that
// the linker keeps for everyone.
//
// What a row yields never depends on how many rows share the call: every template instance does
// the same operations per row in the same order.

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/factor_b_rows.h"
#include "kernels/cpu/gemm_tiles_avx2.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/kernels_avx2_int8.h"
#include "kernels/cpu/middle_plane.h"

namespace nestor {
namespace {

constexpr int64_t kGroup = 32;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kCodeBytes = 4 * kLineBytes;

int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

// 8 bf16 values to floats.
__m256 FloatsFromBfloat16(const uint16_t* values) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

__m256 FloatsFromInt8(const int8_t* values) {
  const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
}

float Sum(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

int32_t SumInt(__m256i v) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

int32_t MaxInt(__m256i v) {
  __m128i max = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  max = _mm_max_epi32(max, _mm_shuffle_epi32(max, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(max, _mm_shuffle_epi32(max, 0xb1)));
}

// Lanes i < n of 8 are all ones.
__m256i LaneMask(int64_t n) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(Min(n, 8))), lanes);
}

// Brings in the lines of `count` bytes that lie `ahead` bytes after `at`. Panels and components
// follow each other in memory, but the hardware's prefetching of one stream falls a fifth to a
// third short of what the memory gives. Where a rank ends inside a segment of B, some of the rest
// is fetched for nothing. The distances are measured (docs/kernels.md).
inline void PrefetchAhead(const void* at, int64_t ahead, int64_t count) {
  const char* const first = static_cast<const char*>(at) + ahead;
#pragma GCC unroll 8
  for (int64_t i = 0; i < count; i += kLineBytes) _mm_prefetch(first + i, _MM_HINT_T0);
}

// ---- int8 activations ----

void QuantiseGroup(const float* x, int8_t* codes, float* scale, int32_t* offset) {
  __m256 v[4];
  __m256i largest = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_loadu_ps(x + 8 * i);
    // Magnitudes compare as integers, and there NaN is above infinity.
    largest = _mm256_max_epi32(
        largest, _mm256_and_si256(_mm256_castps_si256(v[i]), _mm256_set1_epi32(0x7fffffff)));
  }
  const int32_t largest_bits = MaxInt(largest);
  const float absmax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(largest_bits)));
  *scale = largest_bits >= 0x7f800000 ? __builtin_nanf("") : absmax / 127.0f;
  if (largest_bits >= 0x7f800000 || absmax < 1e-30f) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_setzero_si256());
    *offset = 0;
    return;
  }
  const __m256 inverse = _mm256_set1_ps(1.0f / *scale);
  __m256i q[4];
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
  *offset =
      -128 * SumInt(_mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3])));
  const __m256i packed =
      _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes),
                      _mm256_permutevar8x32_epi32(packed, order));
}

void Quantise(const float* x, int64_t n, int8_t* codes, float* scales, int32_t* offsets) {
  int64_t g = 0;
  for (; (g + 1) * kGroup <= n; ++g)
    QuantiseGroup(x + g * kGroup, codes + g * kGroup, scales + g, offsets + g);
  if (g * kGroup == n) return;
  float padded[kGroup] = {};
  for (int64_t j = g * kGroup; j < n; ++j) padded[j - g * kGroup] = x[j];
  QuantiseGroup(padded, codes + g * kGroup, scales + g, offsets + g);
}

void QuantiseGroups(const float* x, int64_t x_stride, int64_t count, int8_t* codes,
                    int64_t code_stride, float* scales, int32_t* offsets, int64_t scale_stride) {
  for (int64_t i = 0; i < count; ++i)
    QuantiseGroup(x + i * x_stride, codes + i * code_stride, scales + i * scale_stride,
                  offsets + i * scale_stride);
}

// ---- planes ----

// 4 codes, in every lane.
inline __m256i Broadcast4(const int8_t* codes) {
  int32_t bits;
  __builtin_memcpy(&bits, codes, sizeof(bits));
  return _mm256_set1_epi32(bits);
}

// Codes of inputs 4 c and 16 + 4 c on, of 8 outputs, times those of T rows.
template <int T>
inline void AddProducts(__m256i low, __m256i high, const int8_t* const* codes, int c,
                        __m256i* sums) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const __m256i x_low = Broadcast4(codes[t] + 4 * c);
    const __m256i x_high = Broadcast4(codes[t] + 16 + 4 * c);
    sums[t] = _mm256_add_epi16(sums[t], _mm256_add_epi16(_mm256_maddubs_epi16(low, x_low),
                                                         _mm256_maddubs_epi16(high, x_high)));
  }
}

// Sums over a group of one plane for 8 outputs and T rows, in 16 bits: at most 15 * 127 * 2 inputs
// of a pair * 8 chunks = 30,480.
template <int T>
inline void MultiplyHalf(const uint8_t* half, const int8_t* const* codes, __m256i* sums) {
  const __m256i nibble = _mm256_set1_epi8(0x0f);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int c = 0; c < 4; ++c) {
    const __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(half + c * kLineBytes));
    const __m256i low = _mm256_and_si256(v, nibble);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
    AddProducts<T>(low, high, codes, c, sums);
  }
}

// The same of a middle plane, whose lines hold the codes of two lines each: at most 3 * 127 * 16.
template <int T>
inline void MultiplyMiddleHalf(const uint8_t* half, const int8_t* const* codes, __m256i* sums) {
  const __m256i pair = _mm256_set1_epi8(0x03);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_si256();
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    const __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(half + k * kLineBytes));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int c = 2 * k + i;
      const __m256i low = _mm256_and_si256(_mm256_srli_epi16(v, 4 * i), pair);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(v, 4 * i + 2), pair);
      AddProducts<T>(low, high, codes, c, sums);
    }
  }
}

// What refines the coarse plane.
enum class Below { kNothing, kMiddle, kFine };

template <int T, Below kBelow>
void PlanesTile(const uint8_t* coarse, const uint8_t* below, int64_t groups,
                const QuantisedRow* rows, float* out) {
  constexpr bool kHasFine = kBelow == Below::kFine;
  constexpr bool kHasMiddle = kBelow == Below::kMiddle;
  const __m256i steps = _mm256_set1_epi16(kHasMiddle ? 4 : 1);
  const __m256i sixteens = _mm256_set1_epi16(16);
  __m256 sums[2][T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) sums[0][t] = sums[1][t] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    const int8_t* codes[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) codes[t] = rows[t].codes + g * kGroup;
    PrefetchAhead(coarse, 4 * kCoarseGroupBytes, kCoarseGroupBytes);
#pragma GCC unroll 8
    for (int half = 0; half < 2; ++half) {
      __m256i dots[T];
      {
        __m256i hi[T];
        MultiplyHalf<T>(coarse + half * 32, codes, hi);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) dots[t] = _mm256_madd_epi16(hi[t], sixteens);
      }
      if (kBelow != Below::kNothing) {
        __m256i lo[T];
        if (kHasMiddle) {
          MultiplyMiddleHalf<T>(below + half * 32, codes, lo);
        } else {
          MultiplyHalf<T>(below + half * 32, codes, lo);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
          dots[t] = _mm256_add_epi32(dots[t], _mm256_madd_epi16(lo[t], steps));
      }
      const __m256 weight_scales =
          FloatsFromBfloat16(reinterpret_cast<const uint16_t*>(coarse + kCodeBytes) + 8 * half);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        // Both codes are stored plus 8: 16 * 8 (+ 8) times the sum of the inputs is too much; the
        // middle one's zero is at 6.
        int32_t offset = rows[t].offsets[g];
        if (kHasFine) offset += rows[t].offsets[g] / 16;
        if (kHasMiddle) offset += rows[t].offsets[g] / 64 * 3;
        const __m256 dot = _mm256_cvtepi32_ps(_mm256_add_epi32(dots[t], _mm256_set1_epi32(offset)));
        const __m256 scales = _mm256_mul_ps(weight_scales, _mm256_set1_ps(rows[t].scales[g]));
        sums[half][t] = _mm256_fmadd_ps(dot, scales, sums[half][t]);
      }
    }
    coarse += kCoarseGroupBytes;
    if (kHasFine) below += kFineGroupBytes;
    if (kHasMiddle) below += kMiddleGroupBytes;
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    float* row = out + rows[t].index * kUnitOutputs;
    _mm256_storeu_ps(row, sums[0][t]);
    _mm256_storeu_ps(row + 8, sums[1][t]);
  }
}

template <Below kBelow>
void PlanesRows(const uint8_t* coarse, const uint8_t* below, int64_t groups,
                const QuantisedRow* rows, int num_rows, float* out) {
  for (; num_rows >= 4; num_rows -= 4, rows += 4)
    PlanesTile<4, kBelow>(coarse, below, groups, rows, out);
  if (num_rows == 3) PlanesTile<3, kBelow>(coarse, below, groups, rows, out);
  if (num_rows == 2) PlanesTile<2, kBelow>(coarse, below, groups, rows, out);
  if (num_rows == 1) PlanesTile<1, kBelow>(coarse, below, groups, rows, out);
}

void Planes(const uint8_t* coarse, const uint8_t* fine, int64_t groups, const QuantisedRow* rows,
            int num_rows, float* out) {
  if (fine != nullptr) {
    PlanesRows<Below::kFine>(coarse, fine, groups, rows, num_rows, out);
  } else {
    PlanesRows<Below::kNothing>(coarse, fine, groups, rows, num_rows, out);
  }
}

void MiddlePlanes(const uint8_t* coarse, const uint8_t* middle, int64_t groups,
                  const QuantisedRow* rows, int num_rows, float* out) {
  PlanesRows<Below::kMiddle>(coarse, middle, groups, rows, num_rows, out);
}

// ---- factors ----

template <int T>
void FactorATile(const int8_t* a, const uint16_t* scales, int64_t groups, const QuantisedRow* rows,
                 float* z) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 sums[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_ps();
  for (int64_t first = 0; first < groups; first += 8) {
    alignas(32) float products[T][8];  // scale of the weights times that of the row
    const __m256 weight_scales = FloatsFromBfloat16(scales + first);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
      _mm256_store_ps(products[t],
                      _mm256_mul_ps(weight_scales, _mm256_loadu_ps(rows[t].scales + first)));
    PrefetchAhead(a + first * kGroup, 1536, 8 * kGroup);
    const int64_t count = Min(8, groups - first);
    for (int64_t g = 0; g < count; ++g) {
      const int64_t at = (first + g) * kGroup;
      const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + at));
      const __m256i magnitudes = _mm256_abs_epi8(weights);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[t].codes + at));
        const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(x, weights));
        const __m256 dots = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
        sums[t] = _mm256_fmadd_ps(dots, _mm256_broadcast_ss(&products[t][g]), sums[t]);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) z[t] = Sum(sums[t]);
}

void FactorA(const int8_t* a, const uint16_t* scales, int64_t groups, const QuantisedRow* rows,
             int num_rows, float* z) {
  for (; num_rows >= 4; num_rows -= 4, rows += 4, z += 4)
    FactorATile<4>(a, scales, groups, rows, z);
  if (num_rows == 3) FactorATile<3>(a, scales, groups, rows, z);
  if (num_rows == 2) FactorATile<2>(a, scales, groups, rows, z);
  if (num_rows == 1) FactorATile<1>(a, scales, groups, rows, z);
}

// T rows, V vectors of 8 outputs from `panel` on; z are pairs of 16-bit integers.
template <int T, int V>
void FactorBTile(const int8_t* panel, int64_t pairs, const int32_t* const* z, const float* scales,
                 float* const* out) {
  __m256i sums[T][V];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[t][v] = _mm256_setzero_si256();
  }
  for (int64_t k = 0; k < pairs; ++k) {
    PrefetchAhead(panel + k * 2 * kUnitOutputs, 1024, kLineBytes);
    __m256i b[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const int8_t* codes = panel + k * 2 * kUnitOutputs + 16 * v;
      b[v] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const __m256i weights = _mm256_set1_epi32(z[t][k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        sums[t][v] = _mm256_add_epi32(sums[t][v], _mm256_madd_epi16(b[v], weights));
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const __m256 scale = _mm256_set1_ps(scales[t]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      float* at = out[t] + 8 * v;
      _mm256_storeu_ps(at,
                       _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[t][v]), scale, _mm256_loadu_ps(at)));
    }
  }
}

// 2 vectors for many rows, 4 for few: what keeps enough sums in flight without spilling.
template <int T>
void FactorBRows(const int8_t* panel, int64_t pairs, const int32_t* const* z, const float* scales,
                 float* const* out) {
  constexpr int kVectors = T <= 2 ? 4 : 2;
  float* at[T];
  for (int v = 0; v < 4; v += kVectors) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) at[t] = out[t] + 8 * v;
    FactorBTile<T, kVectors>(panel + 16 * v, pairs, z, scales, at);
  }
}

// z times the scales, as 16-bit integers times the scale that is returned: NaN where one is not
// finite. `rounded` takes rank rounded up to 16 of them, zeros behind the last.
float RoundZ(const uint16_t* scales, const float* z, int64_t rank, float* scratch,
             int16_t* rounded) {
  __m256i largest = _mm256_setzero_si256();
  for (int64_t k = 0; k < rank; k += 8) {
    const __m256i mask = LaneMask(rank - k);
    const __m256 value =
        _mm256_and_ps(_mm256_mul_ps(FloatsFromBfloat16(scales + k), _mm256_loadu_ps(z + k)),
                      _mm256_castsi256_ps(mask));
    _mm256_storeu_ps(scratch + k, value);
    largest = _mm256_max_epi32(
        largest, _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7fffffff)));
  }
  const int32_t largest_bits = MaxInt(largest);
  const float absmax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(largest_bits)));
  const bool is_finite = largest_bits < 0x7f800000;
  const float limit = static_cast<float>(LargestZ(rank));
  const bool is_zero = !is_finite || absmax < 1e-30f;
  const __m256 inverse = _mm256_set1_ps(is_zero ? 0.0f : limit / absmax);
  for (int64_t k = 0; k < rank; k += 16) {
    __m256i q[2];
#pragma GCC unroll 8
    for (int i = 0; i < 2; ++i) {
      q[i] = _mm256_setzero_si256();
      if (k + 8 * i < rank && !is_zero)
        q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(scratch + k + 8 * i), inverse));
    }
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded + k), packed);
  }
  if (!is_finite) return __builtin_nanf("");
  return absmax / limit;
}

void FactorB(const int8_t* panel, const int8_t* /*next*/, const uint16_t* scales, int64_t rank,
             const FloatRow* rows, int num_rows, float* scratch, float* out) {
  ForFourRows(scales, rank, rows, num_rows, scratch, out, RoundZ,
              [&](int count, int64_t pairs, const int32_t* const* z, const float* z_scales,
                  float* const* at) {
                if (count == 4) FactorBRows<4>(panel, pairs, z, z_scales, at);
                if (count == 3) FactorBRows<3>(panel, pairs, z, z_scales, at);
                if (count == 2) FactorBRows<2>(panel, pairs, z, z_scales, at);
                if (count == 1) FactorBRows<1>(panel, pairs, z, z_scales, at);
              });
}

// ---- bf16 and fp32 ----

// 16 bf16 values in the panel's order: outputs 0..7 in the lower halves, 8..15 in the upper.
inline void LoadBf16(const uint16_t* values, __m256* first, __m256* second) {
  const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(values));
  *first = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  *second = _mm256_castsi256_ps(
      _mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}

// Even and odd inputs add up apart, so that one row has four sums in flight.
template <int T>
void Bf16Tile(const uint16_t* panel, int64_t n, const FloatRow* rows, float* out) {
  __m256 sums[T][2][2];  // [row][parity][half]
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) sums[t][i / 2][i % 2] = _mm256_setzero_ps();
  }
  const auto add = [&](int64_t j, int parity) __attribute__((always_inline)) {
    __m256 first;
    __m256 second;
    LoadBf16(panel + j * kPanelOutputs, &first, &second);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const __m256 x = _mm256_broadcast_ss(rows[t].values + j);
      sums[t][parity][0] = _mm256_fmadd_ps(first, x, sums[t][parity][0]);
      sums[t][parity][1] = _mm256_fmadd_ps(second, x, sums[t][parity][1]);
    }
  };
  int64_t j = 0;
  for (; j + 2 <= n; j += 2) {
    add(j, 0);
    add(j + 1, 1);
  }
  if (j < n) add(j, 0);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    float* row = out + rows[t].index * kUnitOutputs;
    _mm256_storeu_ps(row, _mm256_add_ps(sums[t][0][0], sums[t][1][0]));
    _mm256_storeu_ps(row + 8, _mm256_add_ps(sums[t][0][1], sums[t][1][1]));
  }
}

void Bf16Panel(const uint16_t* panel, int64_t n, const FloatRow* rows, int num_rows, float* out) {
  for (; num_rows >= 3; num_rows -= 3, rows += 3) Bf16Tile<3>(panel, n, rows, out);
  if (num_rows == 2) Bf16Tile<2>(panel, n, rows, out);
  if (num_rows == 1) Bf16Tile<1>(panel, n, rows, out);
}

float Dot(const float* a, const float* b, int64_t n) {
  __m256 sums[4];
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) sums[i] = _mm256_setzero_ps();
  int64_t j = 0;
  for (; j + 32 <= n; j += 32) {
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i)
      sums[i] =
          _mm256_fmadd_ps(_mm256_loadu_ps(a + j + 8 * i), _mm256_loadu_ps(b + j + 8 * i), sums[i]);
  }
  for (; j < n; j += 8) {
    const __m256i mask = LaneMask(n - j);
    sums[0] =
        _mm256_fmadd_ps(_mm256_maskload_ps(a + j, mask), _mm256_maskload_ps(b + j, mask), sums[0]);
  }
  return Sum(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
}

// ---- the fp32 path ----

// Inputs 4 c + i (low nibbles) and 16 + 4 c + i (high) of 8 outputs are byte i of 8 lanes.
template <bool kHasFine>
void PanelFromPlanesTile(const uint8_t* coarse, const uint8_t* fine, int64_t groups, float* panel) {
  const __m256i nibble = _mm256_set1_epi32(0x0f);
  for (int64_t g = 0; g < groups; ++g, panel += kGroup * kPanelOutputs) {
#pragma GCC unroll 8
    for (int64_t half = 0; half < 2; ++half) {
      const __m256 scale =
          FloatsFromBfloat16(reinterpret_cast<const uint16_t*>(coarse + kCodeBytes) + 8 * half);
      const __m256 excess = _mm256_mul_ps(scale, _mm256_set1_ps(kHasFine ? -136.0f : -128.0f));
#pragma GCC unroll 8
      for (int64_t c = 0; c < 4; ++c) {
        const int64_t at = c * kLineBytes + half * 32;
        __m256i hi = _mm256_load_si256(reinterpret_cast<const __m256i*>(coarse + at));
        __m256i lo = _mm256_setzero_si256();
        if (kHasFine) lo = _mm256_load_si256(reinterpret_cast<const __m256i*>(fine + at));
#pragma GCC unroll 8
        for (int64_t i = 0; i < 8; ++i) {
          __m256i code = _mm256_slli_epi32(_mm256_and_si256(hi, nibble), 4);
          if (kHasFine) code = _mm256_or_si256(code, _mm256_and_si256(lo, nibble));
          const int64_t input = 4 * c + i / 2 + (i % 2) * (kGroup / 2);
          _mm256_store_ps(panel + input * kPanelOutputs + 8 * half,
                          _mm256_fmadd_ps(_mm256_cvtepi32_ps(code), scale, excess));
          hi = _mm256_srli_epi32(hi, 4);
          if (kHasFine) lo = _mm256_srli_epi32(lo, 4);
        }
      }
    }
    coarse += kCoarseGroupBytes;
    if (kHasFine) fine += kFineGroupBytes;
  }
}

void PanelFromPlanes(const uint8_t* coarse, const uint8_t* fine, int64_t groups, float* panel) {
  if (fine != nullptr) {
    PanelFromPlanesTile<true>(coarse, fine, groups, panel);
  } else {
    PanelFromPlanesTile<false>(coarse, nullptr, groups, panel);
  }
}

// Columns become rows.
inline void Transpose8(__m256* rows) {
  __m256 a[8];
  __m256 b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

// panel[j][0..16) = load(k, j) for 8 inputs j at a time; components from `count` on are zeros.
template <typename Load>
inline void TransposeInto(int64_t begin, int64_t end, int64_t count, float* panel, Load load) {
  for (int64_t j = begin; j < end; j += 8) {
    for (int64_t first = 0; first < kPanelOutputs; first += 8) {
      __m256 rows[8];
#pragma GCC unroll 8
      for (int64_t k = 0; k < 8; ++k)
        rows[k] = first + k < count ? load(first + k, j) : _mm256_setzero_ps();
      Transpose8(rows);
#pragma GCC unroll 8
      for (int64_t i = 0; i < 8; ++i)
        _mm256_store_ps(panel + (j + i) * kPanelOutputs + first, rows[i]);
    }
  }
}

void PanelFromA(const int8_t* a, int64_t stride, const uint16_t* scales, int64_t scale_stride,
                int64_t count, int64_t groups, float* panel) {
  for (int64_t g = 0; g < groups; ++g) {
    TransposeInto(g * kGroup, (g + 1) * kGroup, count, panel, [&](int64_t k, int64_t j) {
      const int32_t bits = static_cast<int32_t>(scales[k * scale_stride + g]) << 16;
      const __m256 scale = _mm256_castsi256_ps(_mm256_set1_epi32(bits));
      return _mm256_mul_ps(scale, FloatsFromInt8(a + k * stride + j));
    });
  }
}

void PanelFromB(const int8_t* b, const uint16_t* scales, int64_t rank, float* panel) {
  for (int64_t k = 0; k < rank; k += 2) {
    for (int64_t o = 0; o < kPanelOutputs; o += 8) {
      const int8_t* codes = b + k * kUnitOutputs + 2 * o;
      const __m256i pairs =
          _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
      const __m256i components[2] = {_mm256_srai_epi32(_mm256_slli_epi32(pairs, 16), 16),
                                     _mm256_srai_epi32(pairs, 16)};
      for (int64_t i = 0; i < Min(2, rank - k); ++i) {
        const int32_t bits = static_cast<int32_t>(scales[k + i]) << 16;
        const __m256 scale = _mm256_castsi256_ps(_mm256_set1_epi32(bits));
        _mm256_store_ps(panel + (k + i) * kPanelOutputs + o,
                        _mm256_mul_ps(scale, _mm256_cvtepi32_ps(components[i])));
      }
    }
  }
}

void PanelFromBf16(const uint16_t* values, int64_t depth, float* panel) {
  for (int64_t j = 0; j < depth; ++j) {
    __m256 first;
    __m256 second;
    LoadBf16(values + j * kPanelOutputs, &first, &second);
    _mm256_store_ps(panel + j * kPanelOutputs, first);
    _mm256_store_ps(panel + j * kPanelOutputs + 8, second);
  }
}

void PanelFromF32(const float* weights, int64_t stride, int64_t count, int64_t depth,
                  float* panel) {
  const int64_t whole = depth / 8 * 8;
  TransposeInto(0, whole, count, panel,
                [&](int64_t k, int64_t j) { return _mm256_loadu_ps(weights + k * stride + j); });
  for (int64_t j = whole; j < depth; ++j) {
    for (int64_t k = 0; k < kPanelOutputs; ++k)
      panel[j * kPanelOutputs + k] = k < count ? weights[k * stride + j] : 0.0f;
  }
}

// T rows times 16 outputs: 2 T sums and 2 weights in registers.
template <int T>
void GemmTile(const float* x, int64_t x_stride, int64_t depth, const float* panel,
              const PanelBias& bias, float* out, int64_t out_stride, int64_t outputs, bool adds) {
  __m256 sums[T][2];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) sums[t][0] = sums[t][1] = _mm256_setzero_ps();
  for (int64_t j = 0; j < depth; ++j) {
    const __m256 first = _mm256_load_ps(panel + j * kPanelOutputs);
    const __m256 second = _mm256_load_ps(panel + j * kPanelOutputs + 8);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const __m256 value = _mm256_broadcast_ss(x + t * x_stride + j);
      sums[t][0] = _mm256_fmadd_ps(first, value, sums[t][0]);
      sums[t][1] = _mm256_fmadd_ps(second, value, sums[t][1]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
    Finish(sums[t][0], sums[t][1], bias, outputs, adds, out + t * out_stride);
}

void Gemm(const float* x, int64_t x_stride, int64_t rows, int64_t depth, const float* panel,
          const float* bias, float* out, int64_t out_stride, int64_t outputs, bool adds) {
  const PanelBias panel_bias(bias, outputs);
  ForEachTile(rows, [&](auto tile, int64_t t) {
    GemmTile<tile.kRows>(x + t * x_stride, x_stride, depth, panel, panel_bias, out + t * out_stride,
                         out_stride, outputs, adds);
  });
}

// ---- norms and activations ----

// 8 elements, and the last n % 8: masked stores are slow, so only the tail uses them.
struct WholeVector {
  __m256 Load(const float* at) const { return _mm256_loadu_ps(at); }
  void Store(float* at, __m256 v) const { _mm256_storeu_ps(at, v); }
  __m256 Keep(__m256 v) const { return v; }
};
struct PartOfVector {
  __m256i mask;
  __m256 Load(const float* at) const { return _mm256_maskload_ps(at, mask); }
  void Store(float* at, __m256 v) const { _mm256_maskstore_ps(at, mask, v); }
  __m256 Keep(__m256 v) const { return _mm256_and_ps(v, _mm256_castsi256_ps(mask)); }
};

// Calls function(j, lanes) for every 8 elements.
template <typename Function>
inline void ForEachVector(int64_t n, Function function) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) function(j, WholeVector());
  if (j < n) function(j, PartOfVector{LaneMask(n - j)});
}

void ScaleAndShift(const float* x, float mean, float scale, const float* gain, const float* bias,
                   int64_t n, float* out) {
  const __m256 means = _mm256_set1_ps(mean);
  const __m256 scales = _mm256_set1_ps(scale);
  ForEachVector(n, [&](int64_t j, auto lanes) {
    const __m256 shift = bias == nullptr ? _mm256_setzero_ps() : lanes.Load(bias + j);
    const __m256 normal = _mm256_mul_ps(_mm256_sub_ps(lanes.Load(x + j), means), scales);
    lanes.Store(out + j, _mm256_fmadd_ps(normal, lanes.Load(gain + j), shift));
  });
}

// The sum of (x - mean)^2.
float SumOfSquares(const float* x, float mean, int64_t n) {
  const __m256 means = _mm256_set1_ps(mean);
  __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  ForEachVector(n, [&](int64_t j, auto lanes) {
    const __m256 difference = lanes.Keep(_mm256_sub_ps(lanes.Load(x + j), means));
    sums[(j / 8) % 2] = _mm256_fmadd_ps(difference, difference, sums[(j / 8) % 2]);
  });
  return Sum(_mm256_add_ps(sums[0], sums[1]));
}

void RmsNorm(const float* x, const float* gain, const float* bias, int64_t n, float epsilon,
             float* out) {
  const float mean_square = SumOfSquares(x, 0.0f, n) / static_cast<float>(n);
  const float scale = 1.0f / __builtin_sqrtf(mean_square + epsilon);
  ScaleAndShift(x, 0.0f, scale, gain, bias, n, out);
}

void LayerNorm(const float* x, const float* gain, const float* bias, int64_t n, float epsilon,
               float* out) {
  __m256 sum = _mm256_setzero_ps();
  ForEachVector(n, [&](int64_t j, auto lanes) { sum = _mm256_add_ps(sum, lanes.Load(x + j)); });
  const float mean = Sum(sum) / static_cast<float>(n);
  const float variance = SumOfSquares(x, mean, n) / static_cast<float>(n);
  ScaleAndShift(x, mean, 1.0f / __builtin_sqrtf(variance + epsilon), gain, bias, n, out);
}

// e^x within 2e-7 relative in [-87, 88.7], clamped outside; NaN stays NaN. Cody and Waite's
// reduction and the polynomial of Cephes' expf.
inline __m256 Exp(__m256 x) {
  // min and max return their second operand where one is NaN.
  x = _mm256_max_ps(_mm256_set1_ps(-87.3f), x);
  x = _mm256_min_ps(_mm256_set1_ps(88.7f), x);
  const __m256 power = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                       _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(power, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(power, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
  const __m256i exponent = _mm256_cvtps_epi32(power);
  // 2^power in two factors: power reaches 128, which a float's exponent does not.
  const __m256i half = _mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(126)), 23);
  return _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(half)), _mm256_set1_ps(2.0f));
}

// out = activation(x) (* up), `activation` on vectors.
template <typename Function>
inline void Activate(const float* x, const float* up, int64_t n, float* out, Function activation) {
  ForEachVector(n, [&](int64_t j, auto lanes) {
    __m256 y = activation(lanes.Load(x + j));
    if (up != nullptr) y = _mm256_mul_ps(y, lanes.Load(up + j));
    lanes.Store(out + j, y);
  });
}

// x / (1 + e^-u).
inline __m256 TimesSigmoid(__m256 x, __m256 u) {
  const __m256 e = Exp(_mm256_sub_ps(_mm256_setzero_ps(), u));
  return _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), e));
}

void Silu(const float* x, const float* up, int64_t n, float* out) {
  Activate(x, up, n, out, [](__m256 v) { return TimesSigmoid(v, v); });
}

void GeluTanh(const float* x, const float* up, int64_t n, float* out) {
  // (1 + tanh(u)) / 2 = 1 / (1 + e^(-2 u)).
  Activate(x, up, n, out, [](__m256 v) {
    const __m256 square = _mm256_mul_ps(v, v);
    const __m256 u =
        _mm256_mul_ps(v, _mm256_fmadd_ps(square, _mm256_set1_ps(2 * 0.7978845608f * 0.044715f),
                                         _mm256_set1_ps(2 * 0.7978845608f)));
    return TimesSigmoid(v, u);
  });
}

void GeluErf(const float* x, const float* up, int64_t n, float* out) {
  // x Phi(x), Phi(-|x|) = erfc(z) / 2 with z = |x| / sqrt 2 and
  // erfc(z) = t e^(-z^2 + P(t)), t = 1 / (1 + z / 2): relative error 1.2e-7 everywhere
  // (Numerical Recipes, erfcc), before the rounding of the exponent.
  Activate(x, up, n, out, [](__m256 v) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const __m256 one = _mm256_set1_ps(1.0f);
    const __m256 z = _mm256_mul_ps(_mm256_andnot_ps(sign, v), _mm256_set1_ps(0.70710678f));
    const __m256 t = _mm256_div_ps(one, _mm256_fmadd_ps(z, _mm256_set1_ps(0.5f), one));
    __m256 p = _mm256_set1_ps(0.17087277f);
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(-0.82215223f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(1.48851587f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(-1.13520398f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(0.27886807f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(-0.18628806f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(0.09678418f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(0.37409196f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(1.00002368f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(-1.26551223f));
    const __m256 tail =
        _mm256_mul_ps(_mm256_mul_ps(t, _mm256_set1_ps(0.5f)), Exp(_mm256_fnmadd_ps(z, z, p)));
    const __m256 phi = _mm256_blendv_ps(_mm256_sub_ps(one, tail), tail, v);  // by v's sign
    return _mm256_mul_ps(v, phi);
  });
}

CpuKernels MakeKernels() {
  CpuKernels kernels = {.instruction_set = CpuInstructionSet::kAvx2,
                        .quantise = Quantise,
                        .planes = Planes,
                        .middle_planes = MiddlePlanes,
                        .fine_from_middle = FineFromMiddle,
                        .factor_a = FactorA,
                        .factor_b = FactorB,
                        .bf16_panel = Bf16Panel,
                        .dot = Dot,
                        .panel_from_planes = PanelFromPlanes,
                        .panel_from_a = PanelFromA,
                        .panel_from_b = PanelFromB,
                        .panel_from_bf16 = PanelFromBf16,
                        .panel_from_f32 = PanelFromF32,
                        .gemm = Gemm,
                        .quantise_groups = QuantiseGroups,
                        .rms_norm = RmsNorm,
                        .layer_norm = LayerNorm,
                        .silu = Silu,
                        .gelu_erf = GeluErf,
                        .gelu_tanh = GeluTanh};
  SetAvx2Int8(&kernels);
  return kernels;
}

}  // namespace

const CpuKernels& Avx2Kernels() {
  static const CpuKernels kKernels = MakeKernels();
  return kKernels;
}

}  // namespace nestor
