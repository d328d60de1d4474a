// Attention with AVX-512 BF16: both products in bf16 with sums in fp32, 64 operations an
// instruction. Compiled for that instruction set: plain data and intrinsics alone.
//
// Every template instance does the same operations for a query in the same order.

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/attention_softmax_avx512.h"

namespace nestor {
namespace {

void RoundQueries(const float* x, int64_t n, uint16_t* out) {
  for (int64_t j = 0; j < n; j += 8) {
    const __m128bh rounded = _mm256_cvtneps_pbh(_mm256_loadu_ps(x + j));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j), reinterpret_cast<__m128i>(rounded));
  }
}

// Two neighbours in every lane.
inline __m512bh BroadcastPair(const uint16_t* pair) {
  int32_t bits;
  __builtin_memcpy(&bits, pair, sizeof(bits));
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits));
}

inline __m512bh LoadPairs(const uint16_t* pairs) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(pairs));
}

struct Kernels {
  // Weights overwrite scores from the front, two for one.
  static constexpr int64_t kWeightStride = 2 * kTileKeys;

  template <int T>
  static void Scores(const AttentionTile& tile, int64_t query) {
    const int64_t dim = tile.dim;
    const uint16_t* q = static_cast<const uint16_t*>(tile.queries) + query * dim;
    float* s = tile.scores + query * kTileKeys;
    for (int64_t b = 0; b < tile.num_blocks; ++b, s += kKeyBlock) {
      const auto* keys = static_cast<const uint16_t*>(tile.blocks[b].keys);
      __m512 sums[T];
#pragma GCC unroll 12
      for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_ps();
      for (int64_t d = 0; d < dim; d += 2) {
        const __m512bh k = LoadPairs(keys + d * kKeyBlock);
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t)
          sums[t] = _mm512_dpbf16_ps(sums[t], k, BroadcastPair(q + t * dim + d));
      }
#pragma GCC unroll 12
      for (int t = 0; t < T; ++t) _mm512_store_ps(s + t * kTileKeys, sums[t]);
    }
  }

  // The total is that of the rounded weights: together they are 1.
  static void Exponentiate(const AttentionTile& tile, int64_t query) {
    auto* rounded = reinterpret_cast<uint16_t*>(tile.scores) + query * kWeightStride;
    nestor::Exponentiate(tile, query, [&](__m512 weights, int64_t j) {
      const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(weights));
      _mm256_store_si256(reinterpret_cast<__m256i*>(rounded + j), bits);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    });
  }

  template <int T, int V>
  static void Weigh(const AttentionTile& tile, int64_t query, int64_t d) {
    UpdateSums<T, V>(tile, query, d, [&](__m512(&sums)[T][V]) {
      const uint16_t* p = reinterpret_cast<const uint16_t*>(tile.scores) + query * kWeightStride;
      for (int64_t b = 0; b < tile.num_blocks; ++b, p += kKeyBlock) {
        const auto* values = static_cast<const uint16_t*>(tile.blocks[b].values) + 2 * d;
        const int64_t positions = tile.blocks[b].positions;
        for (int64_t i = 0; i < positions; i += 2) {
          __m512bh x[V];
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) x[v] = LoadPairs(values + i * tile.dim + 32 * v);
#pragma GCC unroll 12
          for (int t = 0; t < T; ++t) {
            const __m512bh weight = BroadcastPair(p + t * kWeightStride + i);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) sums[t][v] = _mm512_dpbf16_ps(sums[t][v], x[v], weight);
          }
        }
      }
    });
  }
};

}  // namespace

const AttentionKernels& Avx512Bf16Attention() {
  static constexpr AttentionKernels kKernels = {.round_queries = RoundQueries,
                                                .attend = QueryTiles<Kernels>::Attend};
  return kKernels;
}

}  // namespace nestor
