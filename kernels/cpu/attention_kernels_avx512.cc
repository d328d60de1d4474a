// Attention with AVX-512, products in fp32. A value in bf16 becomes fp32 by a shift or a mask.
// Compiled for that instruction set: plain data and intrinsics alone, as in kernels_avx512.cc.
//
// Every template instance does the same operations for a query in the same order.

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/attention_softmax_avx512.h"

namespace nestor {
namespace {

inline __m512 Even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 Odd(__m512i pairs) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}

// sums[t][v] += x[v] * weights[t * stride].
template <int T, int V>
inline void Multiply(const __m512 (&x)[V], const float* weights, int64_t stride,
                     __m512 (&sums)[T][V]) {
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
    const __m512 weight = _mm512_set1_ps(weights[t * stride]);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[t][v] = _mm512_fmadd_ps(x[v], weight, sums[t][v]);
  }
}

struct Float32 {
  using Scalar = float;
  template <int T>
  static void Scores(const float* q, int64_t dim, const float* keys, __m512 (&sums)[T][1]) {
    for (int64_t d = 0; d < dim; ++d) {
      const __m512 k[1] = {_mm512_load_ps(keys + d * kKeyBlock)};
      Multiply<T, 1>(k, q + d, dim, sums);
    }
  }
  template <int T, int V>
  static void Weigh(const float* p, const float* values, int64_t dim, int64_t d, int64_t positions,
                    __m512 (&sums)[T][V]) {
    for (int64_t i = 0; i < positions; ++i) {
      __m512 x[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) x[v] = _mm512_loadu_ps(values + i * dim + d + 16 * v);
      Multiply<T, V>(x, p + i, kTileKeys, sums);
    }
  }
};

struct Bfloat16 {
  using Scalar = uint16_t;
  template <int T>
  static void Scores(const float* q, int64_t dim, const uint16_t* keys, __m512 (&sums)[T][1]) {
    for (int64_t d = 0; d < dim; d += 2) {
      const __m512i pairs = _mm512_load_si512(keys + d * kKeyBlock);
      const __m512 even[1] = {Even(pairs)};
      Multiply<T, 1>(even, q + d, dim, sums);
      const __m512 odd[1] = {Odd(pairs)};
      Multiply<T, 1>(odd, q + d + 1, dim, sums);
    }
  }
  template <int T, int V>
  static void Weigh(const float* p, const uint16_t* values, int64_t dim, int64_t d,
                    int64_t positions, __m512 (&sums)[T][V]) {
    for (int64_t i = 0; i < positions; i += 2) {
      __m512i pairs[V];
      __m512 x[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        pairs[v] = _mm512_loadu_si512(values + i * dim + 2 * (d + 16 * v));
        x[v] = Even(pairs[v]);
      }
      Multiply<T, V>(x, p + i, kTileKeys, sums);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) x[v] = Odd(pairs[v]);
      Multiply<T, V>(x, p + i + 1, kTileKeys, sums);
    }
  }
};

template <typename Type>
struct Kernels {
  using Scalar = typename Type::Scalar;

  template <int T>
  static void Scores(const AttentionTile& tile, int64_t query) {
    const float* q = static_cast<const float*>(tile.queries) + query * tile.dim;
    float* s = tile.scores + query * kTileKeys;
    for (int64_t b = 0; b < tile.num_blocks; ++b, s += kKeyBlock) {
      __m512 sums[T][1];
#pragma GCC unroll 12
      for (int t = 0; t < T; ++t) sums[t][0] = _mm512_setzero_ps();
      Type::template Scores<T>(q, tile.dim, static_cast<const Scalar*>(tile.blocks[b].keys), sums);
#pragma GCC unroll 12
      for (int t = 0; t < T; ++t) _mm512_store_ps(s + t * kTileKeys, sums[t][0]);
    }
  }

  static void Exponentiate(const AttentionTile& tile, int64_t query) {
    float* s = tile.scores + query * kTileKeys;
    nestor::Exponentiate(tile, query, [&](__m512 weights, int64_t j) {
      _mm512_store_ps(s + j, weights);
      return weights;
    });
  }

  template <int T, int V>
  static void Weigh(const AttentionTile& tile, int64_t query, int64_t d) {
    UpdateSums<T, V>(tile, query, d, [&](__m512(&sums)[T][V]) {
      const float* p = tile.scores + query * kTileKeys;
      for (int64_t b = 0; b < tile.num_blocks; ++b, p += kKeyBlock) {
        const KeyBlock& block = tile.blocks[b];
        Type::template Weigh<T, V>(p, static_cast<const Scalar*>(block.values), tile.dim, d,
                                   block.positions, sums);
      }
    });
  }
};

}  // namespace

const AttentionKernels& Avx512Attention(KvCacheType type) {
  static constexpr AttentionKernels kFloat32 = {.attend = QueryTiles<Kernels<Float32>>::Attend};
  static constexpr AttentionKernels kBfloat16 = {.attend = QueryTiles<Kernels<Bfloat16>>::Attend};
  return type == KvCacheType::kFloat32 ? kFloat32 : kBfloat16;
}

}  // namespace nestor
