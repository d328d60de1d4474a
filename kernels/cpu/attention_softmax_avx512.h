#pragma once

// The softmax of a tile with AVX-512, for the files that are compiled for it: everything has
// internal linkage.

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/attention_kernels.h"

namespace nestor {
namespace {

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

// 2^x for x <= 0 within 2e-7 relative, 0 below -150; NaN stays NaN. The polynomial of Cephes'
// exp2f.
inline __m512 Exp2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-151.0f), x);  // the second operand where one is NaN
  const __m512 power = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, power);
  __m512 p = _mm512_set1_ps(1.535336188319500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.339887440266574e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.618437357674640e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550332471162809e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402264791363012e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931472028550421e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, power);
}

// The lanes of a block that a query with this limit sees.
inline __mmask16 VisibleLanes(const KeyBlock& block, int64_t limit) {
  const int64_t visible = Min(limit - block.begin, block.positions);
  return visible <= 0 ? __mmask16{0}
                      : static_cast<__mmask16>((1u << static_cast<unsigned>(visible)) - 1u);
}

// Turns the scores of one query into weights, and scales what it has summed before.
// store(weights, j) keeps the weights of lanes j to j + 15 of the tile and returns what it kept, as
// floats; it may write over scores up to these.
template <typename Store>
inline void Exponentiate(const AttentionTile& tile, int64_t query, Store store) {
  const float* s = tile.scores + query * kTileKeys;
  const int64_t limit = tile.limits[query];
  __m512 largest = _mm512_set1_ps(-__builtin_inff());
  for (int64_t b = 0; b < tile.num_blocks; ++b) {
    const __m512 scores = _mm512_load_ps(s + b * kKeyBlock);
    largest = _mm512_mask_max_ps(largest, VisibleLanes(tile.blocks[b], limit), scores, largest);
  }
  const float before = tile.maxima[query];
  const float found = _mm512_reduce_max_ps(largest);
  const float maximum = found > before ? found : before;
  __m512 total = _mm512_setzero_ps();
  for (int64_t b = 0; b < tile.num_blocks; ++b) {
    const __m512 scores = _mm512_load_ps(s + b * kKeyBlock);
    const __m512 e = Exp2(_mm512_sub_ps(scores, _mm512_set1_ps(maximum)));
    const __m512 p = _mm512_maskz_mov_ps(VisibleLanes(tile.blocks[b], limit), e);
    total = _mm512_add_ps(total, store(p, b * kKeyBlock));
  }
  if (maximum != before) {
    const __m512 correction = Exp2(_mm512_set1_ps(before - maximum));
    float* sums = tile.sums + query * tile.sum_stride;
    for (int64_t d = 0; d < tile.dim; d += 16)
      _mm512_store_ps(sums + d, _mm512_mul_ps(_mm512_load_ps(sums + d), correction));
    tile.totals[query] *= _mm512_cvtss_f32(correction);
    tile.maxima[query] = maximum;
  }
  tile.totals[query] += _mm512_reduce_add_ps(total);
}

// Loads the sums of T queries over V vectors of values, lets `add` work on them, and stores them.
template <int T, int V, typename Add>
inline void UpdateSums(const AttentionTile& tile, int64_t query, int64_t d, Add add) {
  float* out = tile.sums + query * tile.sum_stride + d;
  __m512 sums[T][V];
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[t][v] = _mm512_load_ps(out + t * tile.sum_stride + 16 * v);
  }
  add(sums);
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) _mm512_store_ps(out + t * tile.sum_stride + 16 * v, sums[t][v]);
  }
}

// Kernels::Scores<T> and Weigh<T, V> over all queries of a tile, as many at once as registers hold.
template <typename Kernels>
struct QueryTiles {
  static constexpr int kMax = 12;  // 24 sums, two vectors of values and a weight

  template <int T>
  static void Weigh(const AttentionTile& tile, int64_t query) {
    int64_t d = 0;
    for (; d + 16 < tile.dim; d += 32) Kernels::template Weigh<T, 2>(tile, query, d);
    if (d < tile.dim) Kernels::template Weigh<T, 1>(tile, query, d);
  }

  static void Attend(const AttentionTile& tile) {
    using Function = void (*)(const AttentionTile&, int64_t);
    constexpr Function kScores[] = {
        Kernels::template Scores<1>,  Kernels::template Scores<2>,  Kernels::template Scores<3>,
        Kernels::template Scores<4>,  Kernels::template Scores<5>,  Kernels::template Scores<6>,
        Kernels::template Scores<7>,  Kernels::template Scores<8>,  Kernels::template Scores<9>,
        Kernels::template Scores<10>, Kernels::template Scores<11>, Kernels::template Scores<12>};
    constexpr Function kWeigh[] = {Weigh<1>, Weigh<2>, Weigh<3>, Weigh<4>,  Weigh<5>,  Weigh<6>,
                                   Weigh<7>, Weigh<8>, Weigh<9>, Weigh<10>, Weigh<11>, Weigh<12>};
    const int64_t n = tile.num_queries;
    for (int64_t i = 0; i < n; i += kMax) kScores[Min(kMax, n - i) - 1](tile, i);
    for (int64_t i = 0; i < n; ++i) Kernels::Exponentiate(tile, i);
    for (int64_t i = 0; i < n; i += kMax) kWeigh[Min(kMax, n - i) - 1](tile, i);
  }
};

}  // namespace
}  // namespace nestor
