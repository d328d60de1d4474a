#include "kernels/cpu/kernels.h"

#include "kernels/backend.h"

namespace nestor {

const CpuKernels& KernelsFor(CpuInstructionSet instruction_set) {
  switch (instruction_set) {
    case CpuInstructionSet::kPortable:
      return PortableKernels();
    case CpuInstructionSet::kAvx2:
      return Avx2Kernels();
    case CpuInstructionSet::kAvx512:
      return Avx512Kernels();
    case CpuInstructionSet::kAvx512Bf16:
      return Avx512Bf16Kernels();
  }
  return PortableKernels();
}

ActivationFunction ActivationKernel(const CpuKernels& kernels, ActivationKind kind) {
  switch (kind) {
    case ActivationKind::kSilu:
      return kernels.silu;
    case ActivationKind::kGeluErf:
      return kernels.gelu_erf;
    case ActivationKind::kGeluTanh:
      return kernels.gelu_tanh;
  }
  return kernels.silu;
}

}  // namespace nestor
