#pragma once

#include <memory>
#include <optional>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cpu/cpu_info.h"
#include "kernels/cpu/kv_cache_type.h"

namespace nestor {

struct CpuOptions {
  // Threads of the pool, the caller's included. 0: as many as the cgroup and the affinity mask
  // grant.
  int num_threads = 0;
  // Pins every thread but the caller's to a CPU of its own, of those that the affinity mask and the
  // cgroup's cpuset allow. More threads than CPUs are INVALID_ARGUMENT.
  bool pin_threads = false;
  // Forces a lower instruction set than the machine's, for tests. Asking for more than the machine
  // has is INVALID_ARGUMENT.
  std::optional<CpuInstructionSet> instruction_set = std::nullopt;
  KvCacheType kv_cache_type = KvCacheType::kBfloat16;
};

// The CPU backend. Steps of up to 16 rows run integer kernels on int8 activations, and a row's
// result is the same bit for bit whatever it shares the step with; LinearRunner (linear.h) says
// what larger ones multiply in.
absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(const CpuOptions& options);

}  // namespace nestor
