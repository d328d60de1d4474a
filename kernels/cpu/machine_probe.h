#pragma once

#include "absl/status/statusor.h"
#include "kernels/cpu/cpu_info.h"

namespace nestor {

// Memory read bandwidth in GB/s with `threads` threads, each reading its own part of a buffer that
// is larger than the last-level cache and lies in huge pages; the best of several passes, taking
// about half a second. RESOURCE_EXHAUSTED without memory for the buffer; INVALID_ARGUMENT for
// threads < 1.
absl::StatusOr<double> MeasureReadBandwidth(int threads);

// Rate of matrix products in GFLOP/s with `threads` threads: the kernel that steps of many rows
// multiply planes with (int8, or fp32 in the portable one), on operands
// that stay in each thread's cache; the best of several passes, taking about a quarter of a second.
// INVALID_ARGUMENT for threads < 1. REQUIRES: the machine has `instruction_set`.
absl::StatusOr<double> MeasureGemmRate(int threads, CpuInstructionSet instruction_set);

}  // namespace nestor
