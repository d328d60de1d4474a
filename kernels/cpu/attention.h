#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cpu/aligned_buffer.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/memory_arena.h"
#include "kernels/cpu/thread_pool.h"

namespace nestor {

// Attention over a paged cache in fp32, or over the call's own keys where there is no cache.
//
// A page holds, for every layer and kv head, keys transposed, [head_dim][page_size], and values,
// [page_size][head_dim]: both products then run along vectors, with no sum across lanes. A query
// sees its keys in order and alone, so its result does not depend on the rest of the step.
//
// Not thread-safe. Scratch grows to the largest call seen and stays.
class AttentionRunner {
 public:
  // Both must outlive the runner.
  AttentionRunner(const CpuKernels* kernels, ThreadPool* pool);

  // Reserves address space; pages take memory when they are first written. RESOURCE_EXHAUSTED says
  // how many bytes were needed. REQUIRES: called at most once.
  absl::Status AllocateCache(const KvCacheShape& shape);
  int64_t cache_bytes() const { return cache_.bytes(); }
  static int64_t CacheBytes(const KvCacheShape& shape);

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
  // A run of keys and values that lie together.
  struct Tile {
    float* keys = nullptr;
    int64_t key_stride = 0;
    float* values = nullptr;
    int64_t begin = 0;  // position of the first key
    int64_t count = 0;
  };
  struct alignas(64) ThreadState {
    AlignedBuffer<float> queries;   // [queries of a block][padded_dim_]
    AlignedBuffer<float> scores;    // [queries of a block][score_stride_]
    AlignedBuffer<float> sums;      // [queries of a block][padded_dim_]
    AlignedBuffer<float> inverses;  // [queries of a block], 1 / the sum of its weights
    AlignedBuffer<float> key;       // [padded_dim_]
  };

  void PrepareScratch(const AttentionCall& call);
  void PrepareRotations(const AttentionCall& call, std::span<const float> inverse_frequencies);
  void PlanWork(const AttentionCall& call);
  // The tile of a sequence that holds `position`, cut off at `end`.
  Tile TileAt(const AttentionCall& call, int64_t sequence, int64_t kv_head, int64_t position,
              int64_t end);
  // out[0..padded_dim) = head * factor, rotated for row `row` of the step.
  void Rotate(const AttentionCall& call, const float* head, int64_t row, float factor,
              float* out) const;
  void Store(const AttentionCall& call, const WorkItem& item, ThreadState* state);
  void Attend(const AttentionCall& call, const WorkItem& item, ThreadState* state);
  void LoadQueries(const AttentionCall& call, const WorkItem& item, ThreadState* state);
  // Turns scores into weights, up to the factors that it leaves in `inverses`.
  void ExponentiateScores(const AttentionCall& call, const WorkItem& item, int64_t first,
                          ThreadState* state);
  // Positions [0, limit) are visible to row `row` of a sequence.
  static int64_t LimitOf(const AttentionCall& call, const SequenceRows& sequence, int64_t row);
  // The first position that the step can read: 0 with a cache.
  int64_t FirstPosition(const SequenceRows& sequence) const;
  bool has_cache() const { return shape_.num_pages > 0; }

  const CpuKernels* const kernels_;
  ThreadPool* const pool_;

  KvCacheShape shape_;
  MappedMemory cache_;
  int64_t page_stride_ = 0;   // floats of a page, all layers
  int64_t layer_stride_ = 0;  // floats of one layer in a page

  // Of the call at hand.
  int64_t padded_dim_ = 0;  // head_dim rounded up to 8
  int64_t score_stride_ = 0;
  int64_t rows_per_block_ = 0;
  std::vector<WorkItem> items_;
  bool stores_first_ = false;  // in a phase before, not item by item
  std::vector<ThreadState> threads_;
  // Without a cache, sequence by sequence: [kv_head][padded_dim_][keys],
  // [kv_head][keys][padded_dim_].
  AlignedBuffer<float> own_keys_;
  AlignedBuffer<float> own_values_;
  std::vector<int64_t> own_offsets_;  // the first key of each sequence, a multiple of 8
  int64_t own_total_ = 0;

  // cos and sin for [row of the step][head_dim / 2], kept while positions stay the same: all
  // layers of a step share them.
  std::vector<float> cosines_;
  std::vector<float> sines_;
  std::vector<std::pair<int64_t, int64_t>> rotated_rows_;  // {row, position}
  const float* rotated_by_ = nullptr;
};

}  // namespace nestor
