#include <algorithm>
#include <vector>

#include "base/bfloat16.h"
#include "gtest/gtest.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/packed_linear.h"
#include "tests/kernels/device.h"

namespace nestor {
namespace {

// 248 outputs of 37 inputs: code q of [-128, 119] stands at every position of a group in turn.
class PlaneLayout : public ::testing::Test {
 protected:
  static constexpr int64_t kOut = 248;
  static constexpr int64_t kIn = 37;
  static constexpr int64_t kRowBytes = 32;  // two groups

  static int CodeAt(int64_t row, int64_t col) {
    return static_cast<int>((row + 7 * col) % 248) - 128;
  }
  static float ScaleAt(int64_t row, int64_t group) {
    const float scale = 0.5f + 0.25f * static_cast<float>((row + group) % 3);  // exact in bf16
    return row % 2 == 0 ? scale : -scale;
  }

  PlaneLayout() : coarse_(kOut * kRowBytes, 0x88), fine_(kOut * kRowBytes, 0x88) {
    for (int64_t row = 0; row < kOut; ++row) {
      for (int64_t col = 0; col < kIn; ++col) {
        const int q = CodeAt(row, col);
        const int hi = (q + 8 + 1600) / 16 - 100;  // floor((q + 8) / 16)
        const int lo = q - 16 * hi;
        EXPECT_GE(hi, -8);
        EXPECT_LE(hi, 7);
        EXPECT_GE(lo, -8);
        EXPECT_LE(lo, 7);
        Set(&coarse_, row, col, hi + 8);
        Set(&fine_, row, col, lo + 8);
      }
      for (int64_t group = 0; group < 2; ++group)
        scales_.push_back(Bfloat16FromFloat(ScaleAt(row, group)));
    }
  }

  static void Set(std::vector<uint8_t>* plane, int64_t row, int64_t col, int code) {
    uint8_t& byte = (*plane)[row * kRowBytes + col / 2];
    byte = static_cast<uint8_t>(col % 2 == 0 ? (byte & 0xf0) | code : (byte & 0x0f) | (code << 4));
  }

  LinearWeights Weights() const {
    LinearWeights weights;
    weights.name = "codes";
    weights.out = kOut;
    weights.in = kIn;
    weights.coarse = coarse_.data();
    weights.fine = fine_.data();
    weights.scales = scales_.data();
    return weights;
  }

  std::vector<uint8_t> coarse_;
  std::vector<uint8_t> fine_;
  std::vector<uint16_t> scales_;
};

TEST_F(PlaneLayout, EveryCodeComesBackFromThePackedPanels) {
  MemoryArena arena(1 << 20);
  const PackedLinear layer = PackLinear(Weights(), &arena).value();
  std::vector<float> row(kIn);
  for (int64_t i = 0; i < kOut; ++i) {
    UnpackDenseRow(layer, i, row.data());
    for (int64_t j = 0; j < kIn; ++j)
      ASSERT_EQ(row[j], ScaleAt(i, j / 32) * static_cast<float>(CodeAt(i, j)));
  }
}

TEST_F(PlaneLayout, EveryCodeComesBackAsFloatsInEveryInstructionSet) {
  MemoryArena arena(1 << 20);
  const PackedLinear layer = PackLinear(Weights(), &arena).value();
  for (const CpuInstructionSet set : RunnableInstructionSets()) {
    const CpuKernels& kernels = KernelsFor(set);
    for (int64_t panel = 0; panel < 16; ++panel) {
      alignas(64) float dense[64 * 16];
      alignas(64) float coarse[64 * 16];
      std::fill_n(dense, 64 * 16, -1e9f);
      std::fill_n(coarse, 64 * 16, -1e9f);
      kernels.panel_from_planes(layer.CoarsePanel(panel), layer.FinePanel(panel), 2, dense);
      kernels.panel_from_planes(layer.CoarsePanel(panel), nullptr, 2, coarse);
      for (int64_t o = 0; o < 16 && panel * 16 + o < kOut; ++o) {
        const int64_t i = panel * 16 + o;
        for (int64_t j = 0; j < kIn; ++j) {
          const int q = CodeAt(i, j);
          const int hi = (q + 8 + 1600) / 16 - 100;
          ASSERT_EQ(dense[j * 16 + o], ScaleAt(i, j / 32) * static_cast<float>(q));
          ASSERT_EQ(coarse[j * 16 + o], ScaleAt(i, j / 32) * static_cast<float>(16 * hi));
        }
      }
    }
  }
}

TEST_F(PlaneLayout, TheWidestSumsDoNotOverflow) {
  // Codes 15 (hi = 7) and -119's extremes against inputs of +-127 in every place.
  const int64_t groups = 2;
  alignas(64) uint8_t coarse[2 * kCoarseGroupBytes];
  alignas(64) uint8_t fine[2 * kFineGroupBytes];
  for (uint8_t& byte : coarse) byte = 0xff;
  for (uint8_t& byte : fine) byte = 0xff;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t o = 0; o < 16; ++o) {
      coarse[g * kCoarseGroupBytes + 256 + 2 * o] = 0x80;  // 1.0 in bf16
      coarse[g * kCoarseGroupBytes + 257 + 2 * o] = 0x3f;
    }
  }
  for (const int sign : {1, -1}) {
    const std::vector<int8_t> codes(64, static_cast<int8_t>(sign * 127));
    const std::vector<float> scales(8, 1.0f);
    const std::vector<int32_t> offsets(2, -128 * sign * 127 * 32);
    const QuantisedRow row = {codes.data(), scales.data(), offsets.data(), 0};
    for (const CpuInstructionSet set : RunnableInstructionSets()) {
      const CpuKernels& kernels = KernelsFor(set);
      float out[32];
      kernels.planes(coarse, fine, groups, &row, 1, out);
      for (int o = 0; o < 16; ++o)
        EXPECT_EQ(out[o], static_cast<float>(sign * 64 * 127 * 119)) << NameOf(set);
      kernels.planes(coarse, nullptr, groups, &row, 1, out);
      for (int o = 0; o < 16; ++o)
        EXPECT_EQ(out[o], static_cast<float>(sign * 64 * 127 * 112)) << NameOf(set);
    }
  }
}

}  // namespace
}  // namespace nestor
