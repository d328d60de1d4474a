// out = softmax(q k^T * scale) v. With few rows bound by the bytes of the cache, 8 * head_dim for
// a position and kv head; with many by 4 * head_dim FLOPs for a query head and position.

#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/call_checks.h"

namespace nestor {
namespace {

// Query vectors (rows times heads of a kv head) that share one pass over the keys: their scores
// over 8,192 positions take 512 KB, and every tile of keys is read from the first-level cache.
constexpr int64_t kQueriesPerBlock = 16;
constexpr int kQueriesPerTile = 4;  // what the kernels take at once
// Multiply-adds below which waking the pool costs more than it saves.
constexpr int64_t kMinParallelWork = 40000;

int64_t RoundUp8(int64_t value) { return (value + 7) / 8 * 8; }

template <typename T>
void GrowTo(std::vector<T>* buffer, int64_t size) {
  if (static_cast<int64_t>(buffer->size()) < size) buffer->resize(size);
}

float* RowOf(const Tensor& tensor, int64_t row) {
  return static_cast<float*>(tensor.data) + row * tensor.cols;
}

// Floats of the keys and values of one layer in a page.
int64_t LayerStride(const KvCacheShape& shape) {
  const int64_t dim = RoundUp8(shape.head_dim);
  return shape.num_kv_heads * dim * (RoundUp8(shape.page_size) + shape.page_size);
}

}  // namespace

AttentionRunner::AttentionRunner(const CpuKernels* kernels, ThreadPool* pool)
    : kernels_(kernels), pool_(pool), threads_(pool->num_threads()) {}

int64_t AttentionRunner::CacheBytes(const KvCacheShape& shape) {
  return shape.num_pages * shape.num_layers * LayerStride(shape) *
         static_cast<int64_t>(sizeof(float));
}

absl::Status AttentionRunner::AllocateCache(const KvCacheShape& shape) {
  NESTOR_CHECK(!has_cache());
  if (shape.num_layers <= 0 || shape.num_kv_heads <= 0 || shape.head_dim <= 0 ||
      shape.page_size <= 0 || shape.num_pages <= 0)
    return absl::InvalidArgumentError(
        absl::StrCat("KV cache: every size must be positive; was layers ", shape.num_layers,
                     ", heads ", shape.num_kv_heads, ", head size ", shape.head_dim, ", page size ",
                     shape.page_size, ", pages ", shape.num_pages));
  NESTOR_ASSIGN_OR_RETURN(cache_, MappedMemory::Map(CacheBytes(shape)));
  shape_ = shape;
  layer_stride_ = LayerStride(shape);
  page_stride_ = layer_stride_ * shape.num_layers;
  return absl::OkStatus();
}

int64_t AttentionRunner::LimitOf(const AttentionCall& call, const SequenceRows& sequence,
                                 int64_t row) {
  return sequence.position + (call.causal ? row + 1 : sequence.rows);
}

int64_t AttentionRunner::FirstPosition(const SequenceRows& sequence) const {
  return has_cache() ? 0 : sequence.position;
}

void AttentionRunner::PrepareScratch(const AttentionCall& call) {
  const int64_t heads_per_kv_head = call.num_heads / call.num_kv_heads;
  padded_dim_ = RoundUp8(call.head_dim);
  rows_per_block_ = std::max<int64_t>(1, kQueriesPerBlock / heads_per_kv_head);
  const int64_t queries = rows_per_block_ * heads_per_kv_head;
  int64_t max_keys = 0;
  int64_t max_reserved = 0;  // keys that a sequence has room for
  own_total_ = 0;
  GrowTo(&own_offsets_, call.sequences.size());
  for (size_t s = 0; s < call.sequences.size(); ++s) {
    const SequenceRows& sequence = call.sequences[s];
    max_keys = std::max(max_keys, sequence.position + sequence.rows - FirstPosition(sequence));
    max_reserved =
        std::max(max_reserved, static_cast<int64_t>(sequence.pages.size()) * shape_.page_size);
    own_offsets_[s] = own_total_;
    own_total_ += RoundUp8(sequence.rows);
  }
  score_stride_ = RoundUp8(max_keys) + 8;
  // Room for what the sequences may grow to, so that a step that only goes on does not allocate.
  const int64_t capacity = std::max(score_stride_, RoundUp8(max_reserved) + 8);
  for (ThreadState& thread : threads_) {
    thread.queries.GrowTo(queries * padded_dim_);
    thread.sums.GrowTo(queries * padded_dim_);
    thread.inverses.GrowTo(queries);
    thread.scores.GrowTo(queries * capacity);
    thread.key.GrowTo(padded_dim_);
  }
  if (!has_cache()) {
    own_keys_.GrowTo(call.num_kv_heads * padded_dim_ * own_total_);
    own_values_.GrowTo(call.num_kv_heads * padded_dim_ * own_total_);
  }
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
    // Several blocks read what each of them stores.
    stores_first_ = stores_first_ || sequence.rows > rows_per_block_;
    // By rows first: a thread's share is then about the rows that it has in the linear layers.
    for (int64_t row = 0; row < sequence.rows; row += rows_per_block_) {
      for (int64_t head = 0; head < call.num_kv_heads; ++head) {
        items_.push_back({.sequence = static_cast<int64_t>(s),
                          .kv_head = head,
                          .row = row,
                          .rows = std::min(rows_per_block_, sequence.rows - row)});
      }
    }
  }
}

AttentionRunner::Tile AttentionRunner::TileAt(const AttentionCall& call, int64_t sequence,
                                              int64_t kv_head, int64_t position, int64_t end) {
  const SequenceRows& rows = call.sequences[sequence];
  if (!has_cache()) {
    // All heads of a sequence together: rows of keys as long as the whole step would fall into few
    // sets of the cache.
    const int64_t stride = RoundUp8(rows.rows);
    const int64_t offset =
        (own_offsets_[sequence] * call.num_kv_heads + kv_head * stride) * padded_dim_;
    return {.keys = own_keys_.data() + offset,
            .key_stride = stride,
            .values = own_values_.data() + offset,
            .begin = rows.position,
            .count = end - rows.position};
  }
  const auto index = static_cast<size_t>(position / shape_.page_size);
  NESTOR_CHECK(index < rows.pages.size());
  const int64_t page = rows.pages[index];
  NESTOR_CHECK(page >= 0 && page < shape_.num_pages);
  const int64_t key_stride = RoundUp8(shape_.page_size);
  float* layer =
      reinterpret_cast<float*>(cache_.data()) + page * page_stride_ + call.layer * layer_stride_;
  float* values = layer + shape_.num_kv_heads * padded_dim_ * key_stride;
  const int64_t begin = static_cast<int64_t>(index) * shape_.page_size;
  return {.keys = layer + kv_head * padded_dim_ * key_stride,
          .key_stride = key_stride,
          .values = values + kv_head * shape_.page_size * padded_dim_,
          .begin = begin,
          .count = std::min(shape_.page_size, end - begin)};
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

void AttentionRunner::Store(const AttentionCall& call, const WorkItem& item, ThreadState* state) {
  const SequenceRows& sequence = call.sequences[item.sequence];
  const int64_t end = sequence.position + sequence.rows;
  for (int64_t i = item.row; i < item.row + item.rows; ++i) {
    const int64_t row = sequence.row_begin + i;
    const int64_t position = sequence.position + i;
    const Tile tile = TileAt(call, item.sequence, item.kv_head, position, end);
    const int64_t slot = position - tile.begin;
    Rotate(call, RowOf(call.k, row) + item.kv_head * call.head_dim, row, 1.0f, state->key.data());
    const float* key = state->key.data();
    for (int64_t d = 0; d < padded_dim_; ++d) tile.keys[d * tile.key_stride + slot] = key[d];
    float* value = tile.values + slot * padded_dim_;
    std::copy_n(RowOf(call.v, row) + item.kv_head * call.head_dim, call.head_dim, value);
    std::fill(value + call.head_dim, value + padded_dim_, 0.0f);
  }
}

void AttentionRunner::LoadQueries(const AttentionCall& call, const WorkItem& item,
                                  ThreadState* state) {
  const int64_t heads = call.num_heads / call.num_kv_heads;
  float* query = state->queries.data();
  for (int64_t i = 0; i < item.rows; ++i) {
    const int64_t row = call.sequences[item.sequence].row_begin + item.row + i;
    const float* q = RowOf(call.q, row) + item.kv_head * heads * call.head_dim;
    for (int64_t head = 0; head < heads; ++head, query += padded_dim_)
      Rotate(call, q + head * call.head_dim, row, call.scale, query);
  }
}

void AttentionRunner::ExponentiateScores(const AttentionCall& call, const WorkItem& item,
                                         int64_t first, ThreadState* state) {
  const SequenceRows& sequence = call.sequences[item.sequence];
  const int64_t heads = call.num_heads / call.num_kv_heads;
  const int64_t last = LimitOf(call, sequence, item.row + item.rows - 1) - first;
  float* scores = state->scores.data();
  float* sums = state->sums.data();
  float* inverses = state->inverses.data();
  for (int64_t i = 0; i < item.rows; ++i) {
    const int64_t count = LimitOf(call, sequence, item.row + i) - first;
    for (int64_t head = 0; head < heads; ++head, scores += score_stride_, sums += padded_dim_) {
      *inverses++ = 1.0f / kernels_->softmax(scores, count, last);
      std::fill_n(sums, padded_dim_, 0.0f);
    }
  }
}

void AttentionRunner::Attend(const AttentionCall& call, const WorkItem& item, ThreadState* state) {
  const SequenceRows& sequence = call.sequences[item.sequence];
  const int64_t heads = call.num_heads / call.num_kv_heads;
  const int64_t queries = item.rows * heads;
  const int64_t first = FirstPosition(sequence);
  const int64_t end = LimitOf(call, sequence, item.row + item.rows - 1);
  LoadQueries(call, item, state);
  for (int64_t at = first; at < end;) {
    const Tile tile = TileAt(call, item.sequence, item.kv_head, at, end);
    for (int64_t i = 0; i < queries; i += kQueriesPerTile) {
      kernels_->scores(state->queries.data() + i * padded_dim_,
                       static_cast<int>(std::min<int64_t>(kQueriesPerTile, queries - i)),
                       padded_dim_, tile.keys, tile.key_stride, tile.count,
                       state->scores.data() + i * score_stride_ + tile.begin - first,
                       score_stride_);
    }
    at += tile.count;
  }
  ExponentiateScores(call, item, first, state);
  for (int64_t at = first; at < end;) {
    const Tile tile = TileAt(call, item.sequence, item.kv_head, at, end);
    for (int64_t i = 0; i < queries; i += kQueriesPerTile) {
      kernels_->weigh_values(
          state->scores.data() + i * score_stride_ + tile.begin - first, score_stride_,
          static_cast<int>(std::min<int64_t>(kQueriesPerTile, queries - i)), tile.values,
          padded_dim_, tile.count, state->sums.data() + i * padded_dim_);
    }
    at += tile.count;
  }
  const float* sums = state->sums.data();
  const float* inverses = state->inverses.data();
  for (int64_t i = 0; i < item.rows; ++i) {
    float* out =
        RowOf(call.out, sequence.row_begin + item.row + i) + item.kv_head * heads * call.head_dim;
    for (int64_t head = 0; head < heads; ++head, sums += padded_dim_, out += call.head_dim) {
      const float inverse = *inverses++;
      for (int64_t d = 0; d < call.head_dim; ++d) out[d] = sums[d] * inverse;
    }
  }
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
  const auto num_items = static_cast<int64_t>(items_.size());
  const int64_t items_per_task = work < kMinParallelWork ? std::max<int64_t>(num_items, 1) : 1;
  if (stores_first_) {
    pool_->RunRanges(num_items, items_per_task, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t i = begin; i < end; ++i) Store(call, items_[i], &threads_[thread]);
    });
  }
  pool_->RunRanges(num_items, items_per_task, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) {
      if (!stores_first_) Store(call, items_[i], &threads_[thread]);
      Attend(call, items_[i], &threads_[thread]);
    }
  });
}

}  // namespace nestor
