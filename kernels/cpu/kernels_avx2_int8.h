#pragma once

#include "kernels/cpu/kernels.h"

namespace nestor {

// Fills in the int8 path of many rows with AVX2 and FMA, quantise_groups apart.
void SetAvx2Int8(CpuKernels* kernels);

}  // namespace nestor
