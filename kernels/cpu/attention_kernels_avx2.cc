// Attention with AVX2 and FMA. A value in bf16 becomes fp32 by a shift or a mask. Compiled for
// those instruction sets: plain data and intrinsics alone, as in kernels_avx2.cc.
//
// Every template instance does the same operations for a query in the same order.

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/attention_kernels.h"

namespace nestor {
namespace {

constexpr int64_t kLanes = 8;
constexpr int kMaxQueries = 4;  // at once: their sums and two vectors of keys fill 16 registers

int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }

inline __m256 Even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 Odd(__m256i pairs) {
  return _mm256_castsi256_ps(
      _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}
inline __m256i LoadPairs(const uint16_t* values) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
}

// sums[t][v] += x[v] * weights[t * stride].
template <int T, int V>
inline void Multiply(const __m256 (&x)[V], const float* weights, int64_t stride,
                     __m256 (&sums)[T][V]) {
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    const __m256 weight = _mm256_broadcast_ss(weights + t * stride);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[t][v] = _mm256_fmadd_ps(x[v], weight, sums[t][v]);
  }
}

struct Float32 {
  using Scalar = float;
  template <int T>
  static void Scores(const float* q, int64_t dim, const float* keys, __m256 (&sums)[T][2]) {
    for (int64_t d = 0; d < dim; ++d) {
      const __m256 k[2] = {_mm256_loadu_ps(keys + d * kKeyBlock),
                           _mm256_loadu_ps(keys + d * kKeyBlock + kLanes)};
      Multiply<T, 2>(k, q + d, dim, sums);
    }
  }
  template <int T, int V>
  static void Weigh(const float* p, int64_t p_stride, const float* values, int64_t dim,
                    int64_t positions, __m256 (&sums)[T][V]) {
    for (int64_t i = 0; i < positions; ++i) {
      __m256 x[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) x[v] = _mm256_loadu_ps(values + i * dim + v * kLanes);
      Multiply<T, V>(x, p + i, p_stride, sums);
    }
  }
  static const float* ValuesAt(const float* values, int64_t d) { return values + d; }
};

struct Bfloat16 {
  using Scalar = uint16_t;
  template <int T>
  static void Scores(const float* q, int64_t dim, const uint16_t* keys, __m256 (&sums)[T][2]) {
    for (int64_t d = 0; d < dim; d += 2) {
      const __m256i pairs[2] = {LoadPairs(keys + d * kKeyBlock),
                                LoadPairs(keys + d * kKeyBlock + 2 * kLanes)};
      const __m256 even[2] = {Even(pairs[0]), Even(pairs[1])};
      Multiply<T, 2>(even, q + d, dim, sums);
      const __m256 odd[2] = {Odd(pairs[0]), Odd(pairs[1])};
      Multiply<T, 2>(odd, q + d + 1, dim, sums);
    }
  }
  template <int T, int V>
  static void Weigh(const float* p, int64_t p_stride, const uint16_t* values, int64_t dim,
                    int64_t positions, __m256 (&sums)[T][V]) {
    for (int64_t i = 0; i < positions; i += 2) {
      __m256i pairs[V];
      __m256 x[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        pairs[v] = LoadPairs(values + i * dim + 2 * v * kLanes);
        x[v] = Even(pairs[v]);
      }
      Multiply<T, V>(x, p + i, p_stride, sums);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) x[v] = Odd(pairs[v]);
      Multiply<T, V>(x, p + i + 1, p_stride, sums);
    }
  }
  static const uint16_t* ValuesAt(const uint16_t* values, int64_t d) { return values + 2 * d; }
};

template <typename Type, int T>
void Scores(const AttentionTile& tile, int64_t query) {
  const float* q = static_cast<const float*>(tile.queries) + query * tile.dim;
  float* s = tile.scores + query * kTileKeys;
  for (int64_t b = 0; b < tile.num_blocks; ++b, s += kKeyBlock) {
    __m256 sums[T][2];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) sums[t][0] = sums[t][1] = _mm256_setzero_ps();
    const auto* keys = static_cast<const typename Type::Scalar*>(tile.blocks[b].keys);
    Type::template Scores<T>(q, tile.dim, keys, sums);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      _mm256_storeu_ps(s + t * kTileKeys, sums[t][0]);
      _mm256_storeu_ps(s + t * kTileKeys + kLanes, sums[t][1]);
    }
  }
}

template <typename Type, int T, int V>
inline void WeighVectors(const AttentionTile& tile, int64_t query, int64_t d) {
  float* out = tile.sums + query * tile.sum_stride + d;
  const float* p = tile.scores + query * kTileKeys;
  __m256 sums[T][V];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[t][v] = _mm256_loadu_ps(out + t * tile.sum_stride + v * 8);
  }
  for (int64_t b = 0; b < tile.num_blocks; ++b, p += kKeyBlock) {
    const auto* values = static_cast<const typename Type::Scalar*>(tile.blocks[b].values);
    Type::template Weigh<T, V>(p, kTileKeys, Type::ValuesAt(values, d), tile.dim,
                               tile.blocks[b].positions, sums);
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) _mm256_storeu_ps(out + t * tile.sum_stride + v * 8, sums[t][v]);
  }
}

template <typename Type, int T>
void Weigh(const AttentionTile& tile, int64_t query) {
  int64_t d = 0;
  for (; d + 16 <= tile.dim; d += 16) WeighVectors<Type, T, 2>(tile, query, d);
  if (d < tile.dim) WeighVectors<Type, T, 1>(tile, query, d);
}

// 2^x for x <= 0 within 2e-7 relative, and 2^-126 from there on down; NaN stays NaN. The
// polynomial of Cephes' exp2f.
inline __m256 Exp2(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-126.0f), x);  // the second operand where one is NaN
  const __m256 power = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 r = _mm256_sub_ps(x, power);
  __m256 p = _mm256_set1_ps(1.535336188319500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.339887440266574e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(9.618437357674640e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.550332471162809e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(2.402264791363012e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(6.931472028550421e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

inline float HorizontalMax(__m256 x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

inline float HorizontalSum(__m256 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// All ones in the first `count` lanes.
inline __m256 LaneMask(int64_t count) {
  const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  return _mm256_castsi256_ps(
      _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)), lanes));
}

// Turns the scores of one query into weights, and scales what it has summed before.
void Exponentiate(const AttentionTile& tile, int64_t query) {
  float* s = tile.scores + query * kTileKeys;
  __m256 masks[2 * kTileBlocks];
  __m256 largest = _mm256_set1_ps(-__builtin_inff());
  for (int64_t i = 0; i < 2 * tile.num_blocks; ++i) {
    const KeyBlock& block = tile.blocks[i / 2];
    masks[i] =
        LaneMask(Max(0, Min(tile.limits[query] - block.begin, block.positions)) - i % 2 * kLanes);
    const __m256 scores = _mm256_loadu_ps(s + i * kLanes);
    largest = _mm256_max_ps(_mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), scores, masks[i]),
                            largest);
  }
  const float before = tile.maxima[query];
  const float found = HorizontalMax(largest);
  const float maximum = found > before ? found : before;
  __m256 total = _mm256_setzero_ps();
  for (int64_t i = 0; i < 2 * tile.num_blocks; ++i) {
    const __m256 e = Exp2(_mm256_sub_ps(_mm256_loadu_ps(s + i * kLanes), _mm256_set1_ps(maximum)));
    const __m256 p = _mm256_and_ps(e, masks[i]);
    _mm256_storeu_ps(s + i * kLanes, p);
    total = _mm256_add_ps(total, p);
  }
  if (maximum != before) {
    const __m256 correction = Exp2(_mm256_set1_ps(before - maximum));
    float* sums = tile.sums + query * tile.sum_stride;
    for (int64_t d = 0; d < tile.dim; d += kLanes)
      _mm256_storeu_ps(sums + d, _mm256_mul_ps(_mm256_loadu_ps(sums + d), correction));
    tile.totals[query] *= _mm256_cvtss_f32(correction);
    tile.maxima[query] = maximum;
  }
  tile.totals[query] += HorizontalSum(total);
}

template <typename Type>
void Attend(const AttentionTile& tile) {
  using Function = void (*)(const AttentionTile&, int64_t);
  constexpr Function kScores[] = {Scores<Type, 1>, Scores<Type, 2>, Scores<Type, 3>,
                                  Scores<Type, 4>};
  constexpr Function kWeigh[] = {Weigh<Type, 1>, Weigh<Type, 2>, Weigh<Type, 3>, Weigh<Type, 4>};
  for (int64_t i = 0; i < tile.num_queries; i += kMaxQueries)
    kScores[Min(kMaxQueries, tile.num_queries - i) - 1](tile, i);
  for (int64_t i = 0; i < tile.num_queries; ++i) Exponentiate(tile, i);
  for (int64_t i = 0; i < tile.num_queries; i += kMaxQueries)
    kWeigh[Min(kMaxQueries, tile.num_queries - i) - 1](tile, i);
}

}  // namespace

const AttentionKernels& Avx2Attention(KvCacheType type) {
  static constexpr AttentionKernels kFloat32 = {.attend = Attend<Float32>};
  static constexpr AttentionKernels kBfloat16 = {.attend = Attend<Bfloat16>};
  return type == KvCacheType::kFloat32 ? kFloat32 : kBfloat16;
}

}  // namespace nestor
