#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "kernels/cuda/probe/cuda_check.h"
#include "kernels/cuda/probe/number_type.h"

namespace nestor::probe {

// Copies of one layer's weights, together larger than the L2 cache, so that a round over all of
// them reads every one from memory. They are slices of one array of random numbers, all different.
struct ColdWeights {
  char* base = nullptr;
  int64_t stride_bytes = 0;
  int64_t copies = 0;

  char* copy(int64_t invocation) const { return base + invocation % copies * stride_bytes; }
};

// The random numbers that ColdWeights slices.
class WeightPool {
 public:
  WeightPool(NumberType type, int64_t bytes, int64_t l2_bytes)
      : type_(type), l2_bytes_(l2_bytes), memory_(bytes) {}

  NumberType type() const { return type_; }
  char* data() const { return memory_.data(); }
  int64_t num_elements() const { return memory_.size() / BytesOf(type_); }

  // Copies of `bytes` each, of which one invocation reads `touched_bytes`: at least three times the
  // L2 cache in all where the pool is large enough, and never less than one and a half times.
  ColdWeights Carve(int64_t bytes, int64_t touched_bytes) const {
    ColdWeights weights;
    weights.base = memory_.data();
    weights.stride_bytes = RoundUp(bytes, 256);
    const int64_t wanted = std::max<int64_t>(2, 3 * l2_bytes_ / touched_bytes + 1);
    weights.copies = std::min(wanted, memory_.size() / weights.stride_bytes);
    if (weights.copies < 2 || 2 * weights.copies * touched_bytes < 3 * l2_bytes_) {
      Fail("the pool of weights holds only " + std::to_string(weights.copies) + " copies of " +
           std::to_string(bytes) + " bytes");
    }
    return weights;
  }
  ColdWeights Carve(int64_t bytes) const { return Carve(bytes, bytes); }

 private:
  const NumberType type_;
  const int64_t l2_bytes_;
  const DeviceBuffer<char> memory_;
};

}  // namespace nestor::probe
