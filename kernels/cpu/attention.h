#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cpu/aligned_buffer.h"
#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/memory_arena.h"
#include "kernels/cpu/thread_pool.h"

namespace nestor {

// Attention over a paged cache, or over the call's own keys where there is no cache.
//
// A page holds, for every layer and kv head, blocks of 16 positions, their keys and then their
// values (attention_kernels.h says how they lie). A query takes its keys in tiles that begin at
// fixed positions, and alone, so its result does not depend on the rest of the step.
//
// Not thread-safe. Scratch grows to the largest call seen and stays.
class AttentionRunner {
 public:
  // `type` is the cache's. Without one, keys and values are kept in bf16 only where products in
  // bf16 gain by it. `pool` must outlive the runner.
  AttentionRunner(CpuInstructionSet instruction_set, KvCacheType type, ThreadPool* pool);

  // Reserves address space; pages take memory when they are first written. RESOURCE_EXHAUSTED says
  // how many bytes were needed. REQUIRES: called at most once.
  absl::Status AllocateCache(const KvCacheShape& shape);
  int64_t cache_bytes() const { return cache_bytes_; }
  // Bytes that a cache of this shape takes. Pages take whole blocks.
  int64_t CacheBytes(const KvCacheShape& shape) const;

  // `inverse_frequencies` is empty where q and k are not rotated.
  void Run(const AttentionCall& call, std::span<const float> inverse_frequencies);

 private:
  // Rows of one sequence and one kv head: to store, and to attend with.
  struct WorkItem {
    int64_t sequence = 0;
    int64_t kv_head = 0;
    int64_t row = 0;  // the first, within the sequence
    int64_t rows = 0;
  };
  struct alignas(64) ThreadState {
    AlignedBuffer<float> queries;             // [queries of an item][padded_dim_]
    AlignedBuffer<uint16_t> rounded_queries;  // the same
    AlignedBuffer<int64_t> limits;            // [queries of an item]
    AlignedBuffer<float> scores;              // [queries of an item][kTileKeys]
    AlignedBuffer<float> maxima;              // [queries of an item]
    AlignedBuffer<float> totals;              // [queries of an item]
    AlignedBuffer<float> sums;                // [queries of an item][sum_stride_]
    AlignedBuffer<float> key;                 // [padded_dim_]
  };

  void PrepareScratch(const AttentionCall& call);
  void PrepareRotations(const AttentionCall& call, std::span<const float> inverse_frequencies);
  void PlanWork(const AttentionCall& call);
  // Block `index` of a sequence with its positions below `end`.
  KeyBlock BlockAt(const AttentionCall& call, const WorkItem& item, int64_t index, int64_t end);
  // out[0..padded_dim) = head * factor, rotated for row `row` of the step.
  void Rotate(const AttentionCall& call, const float* head, int64_t row, float factor,
              float* out) const;
  template <typename Scalar>
  void Store(const AttentionCall& call, const WorkItem& item, ThreadState* state);
  void Attend(const AttentionCall& call, const WorkItem& item, ThreadState* state);
  void LoadQueries(const AttentionCall& call, const WorkItem& item, ThreadState* state);
  void WriteOutputs(const AttentionCall& call, const WorkItem& item, const ThreadState& state);
  // Positions [0, limit) are visible to row `row` of a sequence.
  static int64_t LimitOf(const AttentionCall& call, const SequenceRows& sequence, int64_t row);
  bool has_cache() const { return shape_.num_pages > 0; }
  // Where its blocks begin: 0 with a cache.
  int64_t FirstPosition(const SequenceRows& sequence) const {
    return has_cache() ? 0 : sequence.position;
  }
  int64_t block_bytes() const;  // of its keys and values, at padded_dim_

  const CpuInstructionSet instruction_set_;
  const KvCacheType cache_type_;
  ThreadPool* const pool_;
  KvCacheType type_;  // of the keys and values at hand
  const AttentionKernels* kernels_;

  KvCacheShape shape_;
  MappedMemory cache_;  // [page][layer][kv_head][block]
  int64_t cache_bytes_ = 0;

  // Of the call at hand.
  int64_t padded_dim_ = 0;  // head_dim rounded up to 8
  int64_t sum_stride_ = 0;  // head_dim rounded up to 16
  int64_t rows_per_item_ = 0;
  std::vector<WorkItem> items_;
  bool stores_first_ = false;  // in a phase before, not item by item
  std::vector<ThreadState> threads_;
  // Without a cache, sequence by sequence: [kv_head][block].
  AlignedBuffer<std::byte> own_keys_;
  std::vector<int64_t> own_blocks_;  // the first block of each sequence

  // cos and sin for [row of the step][head_dim / 2], kept while positions stay the same: all
  // layers of a step share them.
  std::vector<float> cosines_;
  std::vector<float> sines_;
  std::vector<std::pair<int64_t, int64_t>> rotated_rows_;  // {row, position}
  const float* rotated_by_ = nullptr;
};

}  // namespace nestor
