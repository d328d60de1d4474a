#include "kernels/cpu/machine_probe.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cpu/memory_arena.h"
#include "kernels/cpu/thread_pool.h"

namespace nestor {
namespace {

constexpr int64_t kMinBufferBytes = int64_t{256} << 20;
constexpr int kPasses = 8;
constexpr int64_t kBytesPerTask = int64_t{1} << 20;

// Eight independent sums, so that loads and not additions set the pace.
uint64_t SumOf(const uint64_t* words, int64_t count) {
  uint64_t sums[8] = {};
  for (int64_t i = 0; i + 8 <= count; i += 8) {
    for (int64_t lane = 0; lane < 8; ++lane) sums[lane] += words[i + lane];
  }
  uint64_t total = 0;
  for (const uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace

absl::StatusOr<double> MeasureReadBandwidth(int threads) {
  if (threads < 1)
    return absl::InvalidArgumentError(absl::StrCat("threads: must be positive; was ", threads));
  const int64_t cache_bytes = std::max<int64_t>(0, sysconf(_SC_LEVEL3_CACHE_SIZE));
  const int64_t bytes = std::max(kMinBufferBytes, 4 * cache_bytes);
  NESTOR_ASSIGN_OR_RETURN(MappedMemory buffer, MappedMemory::Map(bytes));
  ThreadPool pool(threads);
  const int64_t num_tasks = bytes / kBytesPerTask;
  pool.Run(num_tasks, [&](int64_t task, int) {
    std::memset(buffer.data() + task * kBytesPerTask, static_cast<int>(task), kBytesPerTask);
  });
  constexpr int64_t kWordsPerTask = kBytesPerTask / static_cast<int64_t>(sizeof(uint64_t));
  const auto* words = reinterpret_cast<const uint64_t*>(buffer.data());
  std::vector<uint64_t> sums(num_tasks);
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    pool.Run(num_tasks, [&](int64_t task, int) {
      sums[task] += SumOf(words + task * kWordsPerTask, kWordsPerTask);
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(num_tasks * kBytesPerTask) / elapsed.count() * 1e-9);
  }
  // The sums must be needed, or the compiler drops the reads.
  const volatile uint64_t needed = sums[num_tasks - 1];
  static_cast<void>(needed);
  return best;
}

}  // namespace nestor
