#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace nestor {

// In ascending order: a machine that has one has those before it.
//   kAvx2        AVX2 and FMA
//   kAvx512      AVX-512 F, BW, DQ, VL and VNNI
//   kAvx512Bf16  BF16 as well
enum class CpuInstructionSet : uint8_t { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// The best one that this machine and this build have.
CpuInstructionSet BestInstructionSet();
// "portable", "AVX2", "AVX-512", "AVX-512 BF16".
const char* InstructionSetName(CpuInstructionSet instruction_set);
// The one that a flag calls "portable", "avx2", "avx512" or "avx512_bf16".
std::optional<CpuInstructionSet> InstructionSetNamed(const std::string& name);
// "AMD EPYC 9B45 (AVX2)": the model name and the instruction set in use.
std::string DescribeCpu(CpuInstructionSet instruction_set);

// CPUs this process may really use: the smaller of the affinity mask and the cgroup's quota,
// rounded down (a pool wider than its quota is throttled as a whole) but at least 1.
int AvailableCpus();
// Numbers of the CPUs that this process may run on, ascending: the affinity mask, which the
// cgroup's cpuset bounds.
std::vector<int> AllowedCpus();
// Bytes this process may use: the smaller of physical memory and the cgroup's limit.
int64_t AvailableMemoryBytes();

// The tightest limit on the way from this process's cgroup to the root, of cgroup v1 and v2 alike;
// nullopt where there is none. `proc_cgroup_file` is /proc/self/cgroup, `cgroup_root`
// /sys/fs/cgroup; a group whose directory is not visible (a container's own mount) is skipped.
std::optional<double> CgroupCpuQuota(const std::string& proc_cgroup_file,
                                     const std::string& cgroup_root);
std::optional<int64_t> CgroupMemoryLimit(const std::string& proc_cgroup_file,
                                         const std::string& cgroup_root);

}  // namespace nestor
