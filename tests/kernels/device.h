#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/cpu_info.h"
#include "kernels/cpu/kv_cache_type.h"

namespace nestor {

// A backend and the knowledge of its scalar type, so that tests can fill and read its tensors.
class Device {
 public:
  static Device Reference(bool quantises_activations);
  static Device Cpu(CpuInstructionSet instruction_set, int num_threads,
                    KvCacheType kv_cache_type = KvCacheType::kBfloat16);

  Backend* operator->() const { return backend_.get(); }
  // A tensor with these values, row-major.
  Tensor Upload(std::span<const float> values, int64_t rows, int64_t cols) const;
  // A tensor full of NaN: what an operation leaves out shows.
  Tensor Poisoned(int64_t rows, int64_t cols) const;
  std::vector<float> Download(const Tensor& tensor) const;

 private:
  Device(std::unique_ptr<Backend> backend, bool is_double)
      : backend_(std::move(backend)), is_double_(is_double) {}
  std::unique_ptr<Backend> backend_;
  bool is_double_;
};

// The instruction sets that this machine can run.
std::vector<CpuInstructionSet> RunnableInstructionSets();
std::string NameOf(CpuInstructionSet instruction_set);

// `count` values, normal with the given deviation, the same for the same seed.
std::vector<float> RandomFloats(int64_t count, uint32_t seed, float deviation = 1);

}  // namespace nestor
