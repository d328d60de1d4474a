#include "kernels/cpu/kernels.h"

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

}  // namespace nestor
