#include "kernels/cpu/cpu_info.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <string_view>
#include <vector>

namespace nestor {
namespace {

constexpr char kProcCgroup[] = "/proc/self/cgroup";
constexpr char kCgroupRoot[] = "/sys/fs/cgroup";

std::string FirstLine(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::optional<int64_t> FirstNumber(const std::string& path) {
  std::istringstream line(FirstLine(path));
  int64_t value = 0;
  if (line >> value) return value;
  return std::nullopt;
}

// The directories from `path` up to `mount`, both included.
std::vector<std::string> DirectoriesUpwards(const std::string& mount, std::string path) {
  std::vector<std::string> result;
  while (!path.empty() && path != "/") {
    result.push_back(mount + path);
    path.resize(path.find_last_of('/'));
  }
  result.push_back(mount);
  return result;
}

bool Lists(std::string_view controllers, std::string_view name) {
  while (!controllers.empty()) {
    const size_t comma = controllers.find(',');
    if (controllers.substr(0, comma) == name) return true;
    controllers.remove_prefix(comma == std::string_view::npos ? controllers.size() : comma + 1);
  }
  return false;
}

struct CgroupDirectories {
  std::vector<std::string> v1;  // of the controller asked for
  std::vector<std::string> v2;
};

// Every directory whose limits apply. A line of the file is "id:controllers:path"; version 2 has
// no controllers.
CgroupDirectories DirectoriesOf(const std::string& controller, const std::string& proc_cgroup_file,
                                const std::string& cgroup_root) {
  CgroupDirectories result;
  std::ifstream file(proc_cgroup_file);
  std::string line;
  while (std::getline(file, line)) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    if (controllers.empty()) {
      for (const std::string& mount : {cgroup_root, cgroup_root + "/unified"}) {
        for (std::string& directory : DirectoriesUpwards(mount, path))
          result.v2.push_back(std::move(directory));
      }
    } else if (Lists(controllers, controller)) {
      for (const std::string& mount :
           {cgroup_root + "/" + controller, cgroup_root + "/" + controllers}) {
        for (std::string& directory : DirectoriesUpwards(mount, path))
          result.v1.push_back(std::move(directory));
      }
    }
  }
  return result;
}

template <typename T>
void TakeSmaller(std::optional<T>* limit, T value) {
  if (!limit->has_value() || value < **limit) *limit = value;
}

}  // namespace

std::optional<double> CgroupCpuQuota(const std::string& proc_cgroup_file,
                                     const std::string& cgroup_root) {
  const CgroupDirectories directories = DirectoriesOf("cpu", proc_cgroup_file, cgroup_root);
  std::optional<double> limit;
  for (const std::string& directory : directories.v2) {
    std::istringstream line(FirstLine(directory + "/cpu.max"));  // "max 100000", "150000 100000"
    double quota = 0;
    double period = 0;
    if (line >> quota >> period && quota > 0 && period > 0) TakeSmaller(&limit, quota / period);
  }
  for (const std::string& directory : directories.v1) {
    const std::optional<int64_t> quota = FirstNumber(directory + "/cpu.cfs_quota_us");
    const std::optional<int64_t> period = FirstNumber(directory + "/cpu.cfs_period_us");
    if (quota && period && *quota > 0 && *period > 0)
      TakeSmaller(&limit, static_cast<double>(*quota) / static_cast<double>(*period));
  }
  return limit;
}

std::optional<int64_t> CgroupMemoryLimit(const std::string& proc_cgroup_file,
                                         const std::string& cgroup_root) {
  const CgroupDirectories directories = DirectoriesOf("memory", proc_cgroup_file, cgroup_root);
  std::optional<int64_t> limit;
  for (const std::string& directory : directories.v2) {
    const std::optional<int64_t> bytes = FirstNumber(directory + "/memory.max");  // or "max"
    if (bytes && *bytes > 0) TakeSmaller(&limit, *bytes);
  }
  for (const std::string& directory : directories.v1) {
    const std::optional<int64_t> bytes = FirstNumber(directory + "/memory.limit_in_bytes");
    if (bytes && *bytes > 0) TakeSmaller(&limit, *bytes);
  }
  return limit;
}

int AvailableCpus() {
  int cpus = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof(mask), &mask) == 0) cpus = CPU_COUNT(&mask);
  const std::optional<double> quota = CgroupCpuQuota(kProcCgroup, kCgroupRoot);
  if (quota && *quota < cpus) cpus = static_cast<int>(std::floor(*quota));
  return std::max(cpus, 1);
}

std::vector<int> AllowedCpus() {
  std::vector<int> cpus;
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof(mask), &mask) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &mask)) cpus.push_back(cpu);
  }
  return cpus;
}

int64_t AvailableMemoryBytes() {
  const int64_t physical =
      static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<int64_t>(sysconf(_SC_PAGESIZE));
  const std::optional<int64_t> limit = CgroupMemoryLimit(kProcCgroup, kCgroupRoot);
  return limit ? std::min(*limit, physical) : physical;
}

CpuInstructionSet BestInstructionSet() {
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!has_avx2) return CpuInstructionSet::kPortable;
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512vnni");
  if (!has_avx512) return CpuInstructionSet::kAvx2;
  return __builtin_cpu_supports("avx512bf16") ? CpuInstructionSet::kAvx512Bf16
                                              : CpuInstructionSet::kAvx512;
}

const char* InstructionSetName(CpuInstructionSet instruction_set) {
  switch (instruction_set) {
    case CpuInstructionSet::kPortable:
      return "portable";
    case CpuInstructionSet::kAvx2:
      return "AVX2";
    case CpuInstructionSet::kAvx512:
      return "AVX-512";
    case CpuInstructionSet::kAvx512Bf16:
      return "AVX-512 BF16";
  }
  return "unknown";
}

std::optional<CpuInstructionSet> InstructionSetNamed(const std::string& name) {
  if (name == "portable") return CpuInstructionSet::kPortable;
  if (name == "avx2") return CpuInstructionSet::kAvx2;
  if (name == "avx512") return CpuInstructionSet::kAvx512;
  if (name == "avx512_bf16") return CpuInstructionSet::kAvx512Bf16;
  return std::nullopt;
}

std::string DescribeCpu(CpuInstructionSet instruction_set) {
  std::ifstream file("/proc/cpuinfo");
  std::string name = "unknown CPU";
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) {
      name = line.substr(colon + 2);
      break;
    }
  }
  return name + " (" + InstructionSetName(instruction_set) + ")";
}

}  // namespace nestor
