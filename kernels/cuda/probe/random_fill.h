#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/probe/number_type.h"

namespace nestor::probe {

// Fills `out` with `count` independent N(0, scale²) numbers, a pure function of `seed`.
cudaError_t FillNormal(void* out, NumberType type, int64_t count, float scale, uint32_t seed,
                       cudaStream_t stream);
// Bytes of two 4-bit codes, each uniform in [1, 15].
cudaError_t FillNibbles(uint8_t* out, int64_t count, uint32_t seed, cudaStream_t stream);

}  // namespace nestor::probe
