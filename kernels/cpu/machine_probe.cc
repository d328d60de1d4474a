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
#include "kernels/cpu/aligned_buffer.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/memory_arena.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/nested_linear.h"

namespace nestor {
namespace {

constexpr int64_t kMinBufferBytes = int64_t{256} << 20;
constexpr int kPasses = 8;
constexpr int64_t kBytesPerTask = int64_t{1} << 20;

// A product of [rows, depth] and one panel: 80 KB, which a second-level cache holds.
constexpr int64_t kGemmRows = 64;
constexpr int64_t kGemmDepth = 256;
constexpr int64_t kGemmPanels = 64;  // multiplied by a task, all of them the same one
constexpr int kGemmTasks = 16;       // of a pass, for each thread
constexpr int kGemmPasses = 12;

// What one thread multiplies.
struct GemmOperands {
  AlignedBuffer<float> x;          // [kGemmRows, kGemmDepth]
  AlignedBuffer<float> panel;      // [kGemmDepth, kPanelOutputs]
  AlignedBuffer<int8_t> codes;     // like x
  AlignedBuffer<float> scales;     // [kGemmRows, kGemmDepth / kGroupSize]
  AlignedBuffer<int32_t> offsets;  // like scales
  AlignedBuffer<uint8_t> int8_panel;
  AlignedBuffer<float> out;  // [kGemmRows, kPanelOutputs]
};

constexpr int64_t kGemmGroups = kGemmDepth / kGroupSize;

void FillIn(const CpuKernels& kernels, GemmOperands* own) {
  own->x.GrowTo(kGemmRows * kGemmDepth);
  own->panel.GrowTo(kGemmDepth * kPanelOutputs);
  own->codes.GrowTo(kGemmRows * kGemmDepth);
  own->scales.GrowTo(kGemmRows * kGemmGroups);
  own->offsets.GrowTo(kGemmRows * kGemmGroups);
  own->int8_panel.GrowTo(kGemmGroups * kernels.int8_group_bytes);
  own->out.GrowTo(kGemmRows * kPanelOutputs);
  for (int64_t i = 0; i < kGemmRows * kGemmDepth; ++i) {
    own->x.data()[i] = 0.01F * static_cast<float>(i % 97);
    own->codes.data()[i] = static_cast<int8_t>(i % 251 - 125);
  }
  for (int64_t i = 0; i < kGemmDepth * kPanelOutputs; ++i)
    own->panel.data()[i] = 0.02F * static_cast<float>(i % 89);
  std::fill_n(own->scales.data(), kGemmRows * kGemmGroups, 0.5F);
  for (int64_t g = 0; g < kGemmGroups; ++g) {
    if (kernels.int8_gemm == nullptr) break;
    uint8_t* group = own->int8_panel.data() + g * kernels.int8_group_bytes;
    const int64_t code_bytes = kernels.int8_group_bytes - kPanelOutputs * 4;
    for (int64_t i = 0; i < code_bytes; ++i) group[i] = static_cast<uint8_t>(i % 255);
    std::fill_n(reinterpret_cast<float*>(group + code_bytes), kPanelOutputs, 0.25F);
  }
}

// One panel times the rows, in the arithmetic that the instruction set is fastest at.
void Multiply(const CpuKernels& kernels, GemmOperands* own) {
  if (kernels.int8_gemm == nullptr) {
    kernels.gemm(own->x.data(), kGemmDepth, kGemmRows, kGemmDepth, own->panel.data(),
                 /*bias=*/nullptr, own->out.data(), kPanelOutputs, kPanelOutputs, /*adds=*/false);
    return;
  }
  const QuantisedRows rows = {.codes = own->codes.data(),
                              .code_stride = kGemmDepth,
                              .scales = own->scales.data(),
                              .offsets = own->offsets.data(),
                              .scale_stride = kGemmGroups};
  kernels.int8_gemm(rows, kGemmRows, kGemmGroups, own->int8_panel.data(), /*bias=*/nullptr,
                    own->out.data(), kPanelOutputs, kPanelOutputs, /*adds=*/false);
}

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

absl::Status CheckThreads(int threads) {
  if (threads >= 1) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("threads: must be positive; was ", threads));
}

}  // namespace

absl::StatusOr<double> MeasureReadBandwidth(int threads) {
  NESTOR_RETURN_IF_ERROR(CheckThreads(threads));
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

absl::StatusOr<double> MeasureGemmRate(int threads, CpuInstructionSet instruction_set) {
  NESTOR_RETURN_IF_ERROR(CheckThreads(threads));
  const CpuKernels& kernels = KernelsFor(instruction_set);
  std::vector<GemmOperands> operands(threads);
  for (GemmOperands& own : operands) FillIn(kernels, &own);
  ThreadPool pool(threads);
  const int64_t num_tasks = int64_t{kGemmTasks} * threads;
  const double flops =
      2.0 * kGemmRows * kGemmDepth * kPanelOutputs * kGemmPanels * static_cast<double>(num_tasks);
  double best = 0;
  for (int pass = 0; pass < kGemmPasses; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    pool.Run(num_tasks, [&](int64_t, int thread) {
      for (int64_t panel = 0; panel < kGemmPanels; ++panel) Multiply(kernels, &operands[thread]);
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = std::max(best, flops / elapsed.count() * 1e-9);
  }
  return best;
}

}  // namespace nestor
