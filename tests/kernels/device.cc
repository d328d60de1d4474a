#include "tests/kernels/device.h"

#include <limits>
#include <random>
#include <utility>

#include "base/check.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/reference/reference_backend.h"

namespace nestor {

Device Device::Reference(bool quantises_activations) {
  return Device(MakeReferenceBackend({.quantises_activations = quantises_activations}), true);
}

Device Device::Cpu(CpuInstructionSet instruction_set, int num_threads, KvCacheType kv_cache_type) {
  auto backend = MakeCpuBackend({.num_threads = num_threads,
                                 .instruction_set = instruction_set,
                                 .kv_cache_type = kv_cache_type});
  NESTOR_CHECK(backend.ok());
  return Device(*std::move(backend), false);
}

Tensor Device::Upload(std::span<const float> values, int64_t rows, int64_t cols) const {
  NESTOR_CHECK(static_cast<int64_t>(values.size()) == rows * cols);
  absl::StatusOr<Tensor> tensor = backend_->Allocate(rows, cols);
  NESTOR_CHECK(tensor.ok());
  for (size_t i = 0; i < values.size(); ++i) {
    if (is_double_) {
      static_cast<double*>(tensor->data)[i] = values[i];
    } else {
      static_cast<float*>(tensor->data)[i] = values[i];
    }
  }
  return *tensor;
}

Tensor Device::Poisoned(int64_t rows, int64_t cols) const {
  return Upload(std::vector<float>(rows * cols, std::numeric_limits<float>::quiet_NaN()), rows,
                cols);
}

std::vector<float> Device::Download(const Tensor& tensor) const {
  std::vector<float> values(tensor.rows * tensor.cols);
  backend_->Read(tensor, 0, tensor.rows, values.data());
  return values;
}

std::vector<CpuInstructionSet> RunnableInstructionSets() {
  std::vector<CpuInstructionSet> sets = {CpuInstructionSet::kPortable};
  for (const CpuInstructionSet set :
       {CpuInstructionSet::kAvx2, CpuInstructionSet::kAvx512, CpuInstructionSet::kAvx512Bf16}) {
    if (BestInstructionSet() >= set) sets.push_back(set);
  }
  return sets;
}

std::string NameOf(CpuInstructionSet instruction_set) {
  switch (instruction_set) {
    case CpuInstructionSet::kPortable:
      return "Portable";
    case CpuInstructionSet::kAvx2:
      return "Avx2";
    case CpuInstructionSet::kAvx512:
      return "Avx512";
    case CpuInstructionSet::kAvx512Bf16:
      return "Avx512Bf16";
  }
  return "Unknown";
}

std::vector<float> RandomFloats(int64_t count, uint32_t seed, float deviation) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

}  // namespace nestor
