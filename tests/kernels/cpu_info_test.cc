#include "kernels/cpu/cpu_info.h"

#include <filesystem>
#include <fstream>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/machine_probe.h"

namespace nestor {
namespace {

namespace fs = std::filesystem;

class Cgroup : public ::testing::Test {
 protected:
  Cgroup()
      : root_(fs::path(::testing::TempDir()) /
              ::testing::UnitTest::GetInstance()->current_test_info()->name()) {
    fs::remove_all(root_);
    fs::create_directories(root_);
  }
  ~Cgroup() override { fs::remove_all(root_); }

  void Write(const std::string& path, const std::string& content) {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << content;
  }
  std::optional<double> Quota() { return CgroupCpuQuota(root_ / "self", root_ / "fs"); }
  std::optional<int64_t> Memory() { return CgroupMemoryLimit(root_ / "self", root_ / "fs"); }

  const fs::path root_;
};

TEST_F(Cgroup, WithoutFilesThereIsNoLimit) {
  EXPECT_EQ(Quota(), std::nullopt);
  EXPECT_EQ(Memory(), std::nullopt);
}

TEST_F(Cgroup, Version2TakesTheTightestLimitOnTheWayToTheRoot) {
  Write("self", "0::/kubepods/pod7\n");
  Write("fs/kubepods/cpu.max", "150000 100000\n");
  Write("fs/kubepods/memory.max", "5000000\n");
  Write("fs/kubepods/pod7/cpu.max", "400000 100000\n");
  Write("fs/kubepods/pod7/memory.max", "4000000\n");
  EXPECT_EQ(Quota(), 1.5);
  EXPECT_EQ(Memory(), 4000000);
}

TEST_F(Cgroup, Version2WithoutLimitSaysMax) {
  Write("self", "0::/\n");
  Write("fs/cpu.max", "max 100000\n");
  Write("fs/memory.max", "max\n");
  EXPECT_EQ(Quota(), std::nullopt);
  EXPECT_EQ(Memory(), std::nullopt);
}

TEST_F(Cgroup, Version1ReadsItsOwnControllers) {
  Write("self", "5:memory:/a/b\n4:cpu,cpuacct:/a\n2:cpuset:/\n0::/\n");
  Write("fs/cpu,cpuacct/a/cpu.cfs_quota_us", "250000\n");
  Write("fs/cpu,cpuacct/a/cpu.cfs_period_us", "100000\n");
  Write("fs/memory/a/memory.limit_in_bytes", "123456\n");
  Write("fs/memory/memory.limit_in_bytes", "9223372036854771712\n");
  EXPECT_EQ(Quota(), 2.5);
  EXPECT_EQ(Memory(), 123456);
}

TEST_F(Cgroup, Version1WithoutQuotaIsMinusOne) {
  Write("self", "4:cpu:/\n");
  Write("fs/cpu/cpu.cfs_quota_us", "-1\n");
  Write("fs/cpu/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(Quota(), std::nullopt);
}

TEST_F(Cgroup, PathsOfTheHostThatTheContainerDoesNotSeeFallBackToItsRoot) {
  Write("self", "4:cpu:/docker/0123\n");
  Write("fs/cpu/cpu.cfs_quota_us", "50000\n");
  Write("fs/cpu/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(Quota(), 0.5);
}

TEST(CpuInfo, ThisMachineHasCpusMemoryAndAName) {
  EXPECT_GE(AvailableCpus(), 1);
  EXPECT_GT(AvailableMemoryBytes(), int64_t{64} << 20);
  EXPECT_THAT(DescribeCpu(CpuInstructionSet::kPortable), ::testing::EndsWith(" (portable)"));
}

TEST(MakeCpuBackend, RefusesANegativeNumberOfThreads) {
  const auto backend = MakeCpuBackend({.num_threads = -3});
  ASSERT_FALSE(backend.ok());
  EXPECT_EQ(backend.status().message(), "num_threads: must not be negative; was -3");
}

TEST(MeasureReadBandwidth, IsPositiveAndRefusesNoThreads) {
  const absl::StatusOr<double> bandwidth = MeasureReadBandwidth(1);
  ASSERT_TRUE(bandwidth.ok());
  EXPECT_GT(*bandwidth, 0.05);
  EXPECT_LT(*bandwidth, 10000);
  EXPECT_FALSE(MeasureReadBandwidth(0).ok());
}

TEST(MeasureGemmRate, IsPositiveAndRefusesNoThreads) {
  for (const CpuInstructionSet set : {CpuInstructionSet::kPortable, BestInstructionSet()}) {
    const absl::StatusOr<double> rate = MeasureGemmRate(2, set);
    ASSERT_TRUE(rate.ok());
    EXPECT_GT(*rate, 0);
    EXPECT_FALSE(MeasureGemmRate(0, set).ok());
  }
}

}  // namespace
}  // namespace nestor
