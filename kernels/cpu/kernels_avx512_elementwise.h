#pragma once

#include "kernels/cpu/kernels.h"

namespace nestor {

// Norms and activations with AVX-512. REQUIRES, of whoever calls them: as Avx512Kernels().
void SetAvx512Elementwise(CpuKernels* kernels);

}  // namespace nestor
