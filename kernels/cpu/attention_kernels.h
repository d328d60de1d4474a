#pragma once

#include <cstdint>

#include "kernels/cpu/cpu_info.h"
#include "kernels/cpu/kv_cache_type.h"

namespace nestor {

// The inner loops of attention, a table for every instruction set and type of the cache. Plain
// data only, as in kernels.h.
//
// Keys and values lie in blocks of 16 positions, so that both products run along vectors with no
// sum across lanes. `dim` is head_dim rounded up to 8, with zeros behind:
//   fp32   keys [dim][16]           values [16][dim]
//   bf16   keys [dim / 2][16][2]    values [8][dim][2], the second of a pair the odd position
// A softmax takes its keys tile by tile (Milakov and Gimelshein, "Online normalizer calculation for
// softmax"; Dao et al., "FlashAttention"). Tiles begin at fixed positions and queries do not meet,
// so what a query yields does not depend on the others.

inline constexpr int64_t kKeyBlock = 16;  // positions
inline constexpr int64_t kTileBlocks = 8;
inline constexpr int64_t kTileKeys = kTileBlocks * kKeyBlock;

// Scalars of the keys of a block, or of its values.
inline constexpr int64_t KeyBlockSize(int64_t dim) { return kKeyBlock * dim; }

// Some positions of one sequence and kv head. Values may be read 32 bytes behind the last one.
struct KeyBlock {
  void* keys = nullptr;
  void* values = nullptr;
  int64_t begin = 0;      // position of the first
  int64_t positions = 0;  // 1 to 16. Behind them lies anything, but in bf16 a finite last value
};

// One tile, and the queries of one sequence and kv head with what they have summed so far.
struct AttentionTile {
  const KeyBlock* blocks = nullptr;
  int64_t num_blocks = 0;  // <= kTileBlocks
  int64_t dim = 0;
  int64_t num_queries = 0;
  const void* queries = nullptr;    // [num_queries][dim], times log2(e) and the call's scale
  const int64_t* limits = nullptr;  // [num_queries]: positions below are visible
  float* scores = nullptr;          // [num_queries][kTileKeys], scratch
  float* maxima = nullptr;          // [num_queries], -inf at first
  float* totals = nullptr;          // [num_queries], of 2^(score - maximum); 0 at first
  float* sums = nullptr;            // [num_queries][sum_stride], of values so weighted; 0 at first
  int64_t sum_stride = 0;           // dim rounded up to 16
};

struct AttentionKernels {
  // out[0..n) = x, to nearest even; null where queries stay fp32. n is a multiple of 8.
  void (*round_queries)(const float* x, int64_t n, uint16_t* out) = nullptr;
  // Adds the tile to the sums. A query that sees none of its keys stays as it is.
  void (*attend)(const AttentionTile& tile) = nullptr;
};

// Rounds queries and weights to bf16 with AVX-512 BF16 and a cache in bf16; all else is fp32.
// REQUIRES: the machine has `instruction_set`.
const AttentionKernels& AttentionKernelsFor(CpuInstructionSet instruction_set, KvCacheType type);

const AttentionKernels& PortableAttention(KvCacheType type);
const AttentionKernels& Avx2Attention(KvCacheType type);
const AttentionKernels& Avx512Attention(KvCacheType type);
const AttentionKernels& Avx512Bf16Attention();  // of a cache in bf16

}  // namespace nestor
