#include "kernels/cpu/attention_kernels.h"

namespace nestor {

const AttentionKernels& AttentionKernelsFor(CpuInstructionSet instruction_set, KvCacheType type) {
  switch (instruction_set) {
    case CpuInstructionSet::kPortable:
      return PortableAttention(type);
    case CpuInstructionSet::kAvx2:
      return Avx2Attention(type);
    case CpuInstructionSet::kAvx512:
      return Avx512Attention(type);
    case CpuInstructionSet::kAvx512Bf16:
      return type == KvCacheType::kBfloat16 ? Avx512Bf16Attention() : Avx512Attention(type);
  }
  return PortableAttention(type);
}

}  // namespace nestor
