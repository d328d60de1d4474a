#include "compress/targets.h"

#include <cstddef>
#include <vector>

#include "gtest/gtest.h"

namespace nestor {
namespace {

TEST(TargetsTest, AscendFromTheCheapestAndCoverTheFineRegion) {
  for (int count = 1; count <= 12; ++count) {
    const std::vector<double> residual = ResidualTargets(count, 0.53);
    const std::vector<double> encoder = PrefixTargets(count, true);
    const std::vector<double> language = PrefixTargets(count, false);
    for (const auto* targets : {&residual, &encoder, &language}) {
      ASSERT_EQ(targets->size(), static_cast<size_t>(count));
      for (size_t i = 1; i < targets->size(); ++i) EXPECT_GT((*targets)[i], (*targets)[i - 1]);
      EXPECT_LT(targets->back(), 1);
    }
    // A level just within 0.6 of the bytes; an encoder's at 0.4 of the FLOPs or below.
    bool reaches = false;
    for (const double target : residual) reaches = reaches || (target > 0.59 && target <= 0.6);
    EXPECT_TRUE(reaches || count == 0) << count;
    EXPECT_LE(encoder.front(), 0.4);
  }
}

}  // namespace
}  // namespace nestor
