// out = softmax(q k^T * scale) v.
//
// Bound with few rows: bytes of the cache, 4 * head_dim (bf16) or 8 * head_dim (fp32) for a
// position and kv head. With many: 4 * head_dim FLOPs for a query head and position, of which an
// instruction does 64 (AVX-512 BF16), 32 or 16, and one 2^x for 4 * head_dim FLOPs, some 16
// instructions for 16 of them.

#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "base/bfloat16.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/call_checks.h"

namespace nestor {
namespace {

// Query vectors (rows times heads of a kv head) that share one pass over the keys: twice what the
// widest kernels hold in registers, and with their scores and a tile of keys in bf16 28 KB.
constexpr int64_t kQueriesPerItem = 24;
// Multiply-adds below which waking the pool costs more than it saves.
constexpr int64_t kMinParallelWork = 40000;
// What kernels may read behind the last values.
constexpr int64_t kReadBehind = 64;

int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
int64_t NumBlocks(int64_t positions) { return RoundUp(positions, kKeyBlock) / kKeyBlock; }

template <typename T>
void GrowTo(std::vector<T>* buffer, int64_t size) {
  if (static_cast<int64_t>(buffer->size()) < size) buffer->resize(size);
}

float* RowOf(const Tensor& tensor, int64_t row) {
  return static_cast<float*>(tensor.data) + row * tensor.cols;
}

int64_t BlockBytes(int64_t dim, KvCacheType type) {
  return 2 * KeyBlockSize(dim) *
         static_cast<int64_t>(type == KvCacheType::kFloat32 ? sizeof(float) : sizeof(uint16_t));
}

// Write the key or the value of one position, [dim], to its lane of a block.
void StoreKey(const float* key, int64_t dim, int64_t lane, float* keys) {
  for (int64_t d = 0; d < dim; ++d) keys[d * kKeyBlock + lane] = key[d];
}

void StoreKey(const float* key, int64_t dim, int64_t lane, uint16_t* keys) {
  for (int64_t d = 0; d < dim; d += 2) {
    uint16_t* pair = keys + d * kKeyBlock + 2 * lane;
    pair[0] = Bfloat16FromFloat(key[d]);
    pair[1] = Bfloat16FromFloat(key[d + 1]);
  }
}

void StoreValue(const float* value, int64_t head_dim, int64_t dim, int64_t lane, float* values) {
  values += lane * dim;
  std::copy_n(value, head_dim, values);
  std::fill(values + head_dim, values + dim, 0.0f);
}

void StoreValue(const float* value, int64_t head_dim, int64_t dim, int64_t lane, uint16_t* values) {
  values += lane / 2 * 2 * dim + lane % 2;
  for (int64_t d = 0; d < head_dim; ++d) values[2 * d] = Bfloat16FromFloat(value[d]);
  for (int64_t d = head_dim; d < dim; ++d) values[2 * d] = 0;
}

}  // namespace

AttentionRunner::AttentionRunner(CpuInstructionSet instruction_set, KvCacheType type,
                                 ThreadPool* pool)
    : instruction_set_(instruction_set),
      cache_type_(type),
      pool_(pool),
      type_(instruction_set == CpuInstructionSet::kAvx512Bf16 ? type : KvCacheType::kFloat32),
      kernels_(&AttentionKernelsFor(instruction_set, type_)),
      threads_(pool->num_threads()) {}

int64_t AttentionRunner::CacheBytes(const KvCacheShape& shape) const {
  return shape.num_pages * shape.num_layers * shape.num_kv_heads * NumBlocks(shape.page_size) *
         BlockBytes(RoundUp(shape.head_dim, 8), cache_type_);
}

absl::Status AttentionRunner::AllocateCache(const KvCacheShape& shape) {
  NESTOR_CHECK(!has_cache());
  if (shape.num_layers <= 0 || shape.num_kv_heads <= 0 || shape.head_dim <= 0 ||
      shape.page_size <= 0 || shape.num_pages <= 0)
    return absl::InvalidArgumentError(
        absl::StrCat("KV cache: every size must be positive; was layers ", shape.num_layers,
                     ", heads ", shape.num_kv_heads, ", head size ", shape.head_dim, ", page size ",
                     shape.page_size, ", pages ", shape.num_pages));
  NESTOR_ASSIGN_OR_RETURN(cache_, MappedMemory::Map(CacheBytes(shape) + kReadBehind));
  cache_bytes_ = CacheBytes(shape);
  shape_ = shape;
  type_ = cache_type_;
  kernels_ = &AttentionKernelsFor(instruction_set_, type_);
  return absl::OkStatus();
}

int64_t AttentionRunner::LimitOf(const AttentionCall& call, const SequenceRows& sequence,
                                 int64_t row) {
  return sequence.position + (call.causal ? row + 1 : sequence.rows);
}

int64_t AttentionRunner::block_bytes() const { return BlockBytes(padded_dim_, type_); }

void AttentionRunner::PrepareScratch(const AttentionCall& call) {
  const int64_t heads_per_kv_head = call.num_heads / call.num_kv_heads;
  padded_dim_ = RoundUp(call.head_dim, 8);
  sum_stride_ = RoundUp(call.head_dim, 16);
  rows_per_item_ = std::max<int64_t>(1, kQueriesPerItem / heads_per_kv_head);
  const int64_t queries = rows_per_item_ * heads_per_kv_head;
  for (ThreadState& thread : threads_) {
    thread.queries.GrowTo(queries * padded_dim_);
    thread.rounded_queries.GrowTo(queries * padded_dim_);
    thread.limits.GrowTo(queries);
    thread.scores.GrowTo(queries * kTileKeys);
    thread.maxima.GrowTo(queries);
    thread.totals.GrowTo(queries);
    thread.sums.GrowTo(queries * sum_stride_);
    thread.key.GrowTo(padded_dim_);
  }
  if (has_cache()) return;
  int64_t blocks = 0;
  GrowTo(&own_blocks_, call.sequences.size());
  for (size_t s = 0; s < call.sequences.size(); ++s) {
    own_blocks_[s] = blocks;
    blocks += call.num_kv_heads * NumBlocks(call.sequences[s].rows);
  }
  own_keys_.GrowTo(blocks * block_bytes() + kReadBehind);
}

void AttentionRunner::PrepareRotations(const AttentionCall& call,
                                       std::span<const float> inverse_frequencies) {
  const int64_t half = call.head_dim / 2;
  NESTOR_CHECK(static_cast<int64_t>(inverse_frequencies.size()) == half);
  bool is_same = rotated_by_ == inverse_frequencies.data();
  size_t count = 0;
  int64_t last_row = 0;
  for (const SequenceRows& sequence : call.sequences) {
    last_row = std::max(last_row, sequence.row_begin + sequence.rows);
    for (int64_t i = 0; i < sequence.rows; ++i, ++count) {
      const std::pair<int64_t, int64_t> entry(sequence.row_begin + i, sequence.position + i);
      if (count < rotated_rows_.size() && rotated_rows_[count] == entry) continue;
      is_same = false;
      if (count >= rotated_rows_.size()) rotated_rows_.resize(count + 1);
      rotated_rows_[count] = entry;
    }
  }
  if (is_same) return;
  rotated_rows_.resize(count);
  rotated_by_ = inverse_frequencies.data();
  GrowTo(&cosines_, last_row * half);
  GrowTo(&sines_, last_row * half);
  for (size_t i = 0; i < count; ++i) {
    const auto [row, position] = rotated_rows_[i];
    for (int64_t d = 0; d < half; ++d) {
      // In double: at position 8,000 a float angle is off by 5e-4.
      const double angle = static_cast<double>(position) * inverse_frequencies[d];
      cosines_[row * half + d] = static_cast<float>(std::cos(angle));
      sines_[row * half + d] = static_cast<float>(std::sin(angle));
    }
  }
}

void AttentionRunner::PlanWork(const AttentionCall& call) {
  items_.clear();
  stores_first_ = false;
  for (size_t s = 0; s < call.sequences.size(); ++s) {
    const SequenceRows& sequence = call.sequences[s];
    // Several items read what each of them stores.
    stores_first_ = stores_first_ || sequence.rows > rows_per_item_;
    // By rows first: a thread's share is then about the rows that it has in the linear layers.
    for (int64_t row = 0; row < sequence.rows; row += rows_per_item_) {
      for (int64_t head = 0; head < call.num_kv_heads; ++head) {
        items_.push_back({.sequence = static_cast<int64_t>(s),
                          .kv_head = head,
                          .row = row,
                          .rows = std::min(rows_per_item_, sequence.rows - row)});
      }
    }
  }
}

KeyBlock AttentionRunner::BlockAt(const AttentionCall& call, const WorkItem& item, int64_t index,
                                  int64_t end) {
  const SequenceRows& sequence = call.sequences[item.sequence];
  const int64_t page_size = has_cache() ? shape_.page_size : sequence.rows;
  const int64_t blocks_of_page = NumBlocks(page_size);
  const int64_t page_index = index / blocks_of_page;
  const int64_t block = index % blocks_of_page;
  std::byte* head = nullptr;
  if (has_cache()) {
    NESTOR_CHECK(page_index < static_cast<int64_t>(sequence.pages.size()));
    const int64_t page = sequence.pages[page_index];
    NESTOR_CHECK(page >= 0 && page < shape_.num_pages);
    head = cache_.data() +
           ((page * shape_.num_layers + call.layer) * shape_.num_kv_heads + item.kv_head) *
               blocks_of_page * block_bytes();
  } else {
    head = own_keys_.data() +
           (own_blocks_[item.sequence] + item.kv_head * blocks_of_page) * block_bytes();
  }
  std::byte* keys = head + block * block_bytes();
  const int64_t begin = FirstPosition(sequence) + page_index * page_size + block * kKeyBlock;
  const int64_t positions = std::min(kKeyBlock, page_size - block * kKeyBlock);
  return {.keys = keys,
          .values = keys + block_bytes() / 2,
          .begin = begin,
          .positions = std::min(positions, end - begin)};
}

void AttentionRunner::Rotate(const AttentionCall& call, const float* head, int64_t row,
                             float factor, float* out) const {
  if (call.inverse_frequencies == kNone) {
    for (int64_t d = 0; d < call.head_dim; ++d) out[d] = head[d] * factor;
  } else {
    const int64_t half = call.head_dim / 2;
    const float* cosines = cosines_.data() + row * half;
    const float* sines = sines_.data() + row * half;
    for (int64_t d = 0; d < half; ++d) {
      const float first = head[d] * factor;
      const float second = head[d + half] * factor;
      out[d] = first * cosines[d] - second * sines[d];
      out[d + half] = second * cosines[d] + first * sines[d];
    }
  }
  std::fill(out + call.head_dim, out + padded_dim_, 0.0f);
}

template <typename Scalar>
void AttentionRunner::Store(const AttentionCall& call, const WorkItem& item, ThreadState* state) {
  const SequenceRows& sequence = call.sequences[item.sequence];
  const int64_t end = sequence.position + sequence.rows;
  const int64_t page_size = has_cache() ? shape_.page_size : sequence.rows;
  for (int64_t i = item.row; i < item.row + item.rows; ++i) {
    const int64_t row = sequence.row_begin + i;
    const int64_t position = sequence.position + i;
    const int64_t offset = position - FirstPosition(sequence);
    const int64_t index =
        offset / page_size * NumBlocks(page_size) + offset % page_size / kKeyBlock;
    const KeyBlock block = BlockAt(call, item, index, end);
    const int64_t lane = position - block.begin;
    auto* values = static_cast<Scalar*>(block.values);
    float* key = state->key.data();
    Rotate(call, RowOf(call.k, row) + item.kv_head * call.head_dim, row, 1.0f, key);
    StoreKey(key, padded_dim_, lane, static_cast<Scalar*>(block.keys));
    const float* value = RowOf(call.v, row) + item.kv_head * call.head_dim;
    StoreValue(value, call.head_dim, padded_dim_, lane, values);
    // The second of a pair is multiplied by a weight of zero while there is no such position: it
    // must not be a NaN that the page's last owner has left.
    if (std::is_same_v<Scalar, uint16_t> && lane % 2 == 0 && lane + 1 == block.positions) {
      std::fill_n(key, padded_dim_, 0.0f);
      StoreValue(key, padded_dim_, padded_dim_, lane + 1, values);
    }
  }
}

void AttentionRunner::LoadQueries(const AttentionCall& call, const WorkItem& item,
                                  ThreadState* state) {
  const int64_t heads = call.num_heads / call.num_kv_heads;
  const SequenceRows& sequence = call.sequences[item.sequence];
  const float factor = call.scale * std::numbers::log2e_v<float>;
  float* query = state->queries.data();
  int64_t* limit = state->limits.data();
  for (int64_t i = item.row; i < item.row + item.rows; ++i) {
    const int64_t row = sequence.row_begin + i;
    const float* q = RowOf(call.q, row) + item.kv_head * heads * call.head_dim;
    for (int64_t head = 0; head < heads; ++head, query += padded_dim_) {
      Rotate(call, q + head * call.head_dim, row, factor, query);
      *limit++ = LimitOf(call, sequence, i);
    }
  }
  const int64_t queries = item.rows * heads;
  if (kernels_->round_queries != nullptr) {
    kernels_->round_queries(state->queries.data(), queries * padded_dim_,
                            state->rounded_queries.data());
  }
  std::fill_n(state->maxima.data(), queries, -std::numeric_limits<float>::infinity());
  std::fill_n(state->totals.data(), queries, 0.0f);
  std::fill_n(state->sums.data(), queries * sum_stride_, 0.0f);
}

void AttentionRunner::WriteOutputs(const AttentionCall& call, const WorkItem& item,
                                   const ThreadState& state) {
  const int64_t heads = call.num_heads / call.num_kv_heads;
  const float* sums = state.sums.data();
  const float* total = state.totals.data();
  for (int64_t i = 0; i < item.rows; ++i) {
    const int64_t row = call.sequences[item.sequence].row_begin + item.row + i;
    float* out = RowOf(call.out, row) + item.kv_head * heads * call.head_dim;
    for (int64_t head = 0; head < heads; ++head, sums += sum_stride_, out += call.head_dim) {
      const float inverse = 1.0f / *total++;
      for (int64_t d = 0; d < call.head_dim; ++d) out[d] = sums[d] * inverse;
    }
  }
}

void AttentionRunner::Attend(const AttentionCall& call, const WorkItem& item, ThreadState* state) {
  const SequenceRows& sequence = call.sequences[item.sequence];
  const int64_t end = LimitOf(call, sequence, item.row + item.rows - 1);
  LoadQueries(call, item, state);
  KeyBlock blocks[kTileBlocks];
  AttentionTile tile = {.blocks = blocks,
                        .dim = padded_dim_,
                        .num_queries = item.rows * (call.num_heads / call.num_kv_heads),
                        .queries = kernels_->round_queries != nullptr
                                       ? static_cast<const void*>(state->rounded_queries.data())
                                       : state->queries.data(),
                        .limits = state->limits.data(),
                        .scores = state->scores.data(),
                        .maxima = state->maxima.data(),
                        .totals = state->totals.data(),
                        .sums = state->sums.data(),
                        .sum_stride = sum_stride_};
  int64_t position = FirstPosition(sequence);
  for (int64_t index = 0; position < end;) {
    tile.num_blocks = 0;
    while (tile.num_blocks < kTileBlocks && position < end) {
      const KeyBlock block = BlockAt(call, item, index++, end);
      blocks[tile.num_blocks++] = block;
      position = block.begin + block.positions;
    }
    kernels_->attend(tile);
  }
  WriteOutputs(call, item, *state);
}

void AttentionRunner::Run(const AttentionCall& call, std::span<const float> inverse_frequencies) {
  CheckAttentionCall(call);
  if (has_cache()) {
    NESTOR_CHECK(call.num_kv_heads == shape_.num_kv_heads && call.head_dim == shape_.head_dim &&
                 call.layer >= 0 && call.layer < shape_.num_layers);
  }
  PrepareScratch(call);
  if (call.inverse_frequencies != kNone) PrepareRotations(call, inverse_frequencies);
  PlanWork(call);
  int64_t work = 0;
  for (const SequenceRows& sequence : call.sequences)
    work += sequence.rows * (sequence.position + sequence.rows) * call.q.cols * 2;
  const auto store = type_ == KvCacheType::kFloat32 ? &AttentionRunner::Store<float>
                                                    : &AttentionRunner::Store<uint16_t>;
  const auto num_items = static_cast<int64_t>(items_.size());
  const int64_t items_per_task = work < kMinParallelWork ? std::max<int64_t>(num_items, 1) : 1;
  if (stores_first_) {
    pool_->RunRanges(num_items, items_per_task, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t i = begin; i < end; ++i) (this->*store)(call, items_[i], &threads_[thread]);
    });
  }
  pool_->RunRanges(num_items, items_per_task, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) {
      if (!stores_first_) (this->*store)(call, items_[i], &threads_[thread]);
      Attend(call, items_[i], &threads_[thread]);
    }
  });
}

}  // namespace nestor
