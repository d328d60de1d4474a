#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/bfloat16.h"
#include "gtest/gtest.h"
#include "kernels/cpu/kernels.h"
#include "tests/kernels/device.h"
#include "tests/kernels/random_layer.h"

namespace nestor {
namespace {

class Elementwise : public ::testing::TestWithParam<CpuInstructionSet> {
 protected:
  Elementwise()
      : cpu_(Device::Cpu(GetParam(), 2)),
        reference_(Device::Reference(false)),
        kernels_(KernelsFor(GetParam())) {}

  const Device cpu_;
  const Device reference_;
  const CpuKernels& kernels_;
};

void ExpectClose(const std::vector<float>& actual, const std::vector<float>& expected,
                 double tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) ASSERT_NEAR(actual[i], expected[i], tolerance) << i;
}

TEST_P(Elementwise, NormsEqualTheReference) {
  for (const int64_t n : {1, 7, 8, 45, 576}) {
    for (const int64_t rows : {1, 3, 70}) {
      const std::vector<float> x = RandomFloats(rows * n, 1);
      const std::vector<float> gain = RandomFloats(n, 2);
      const std::vector<float> bias = RandomFloats(n, 3);
      for (const NormKind kind : {NormKind::kRms, NormKind::kLayerNorm}) {
        for (const bool has_bias : {false, true}) {
          std::vector<float> results[2];
          const Device* devices[2] = {&cpu_, &reference_};
          for (int i = 0; i < 2; ++i) {
            const Device& device = *devices[i];
            NormCall call = {.kind = kind, .epsilon = 1e-5f, .rows = rows};
            call.gain = device->LoadVector(gain).value();
            if (has_bias) call.bias = device->LoadVector(bias).value();
            call.in = device.Upload(x, rows, n);
            call.out = device.Poisoned(rows, n);
            device->Norm(call);
            results[i] = device.Download(call.out);
            call.out = call.in;
            device->Norm(call);
            EXPECT_EQ(device.Download(call.in), results[i]) << "in place";
          }
          // Values up to about 4 times a gain of about 4, with a few roundings.
          ExpectClose(results[0], results[1], 2e-5);
        }
      }
    }
  }
}

TEST_P(Elementwise, ActivationsEqualTheReferenceOverTheWholeRange) {
  std::vector<float> x;
  for (double v = -100; v <= 100; v += 0.0371) x.push_back(static_cast<float>(v));
  for (double v = 1e-30; v < 1; v *= 7) {
    x.push_back(static_cast<float>(v));
    x.push_back(static_cast<float>(-v));
  }
  const auto n = static_cast<int64_t>(x.size());
  for (const ActivationKind kind :
       {ActivationKind::kSilu, ActivationKind::kGeluErf, ActivationKind::kGeluTanh}) {
    for (const bool has_up : {false, true}) {
      const std::vector<float> up = RandomFloats(n, 9);
      std::vector<float> results[2];
      const Device* devices[2] = {&cpu_, &reference_};
      for (int i = 0; i < 2; ++i) {
        const Device& device = *devices[i];
        ActivationCall call = {.kind = kind};
        call.in = device.Upload(x, 1, n);
        if (has_up) call.up = device.Upload(up, 1, n);
        call.out = device.Poisoned(1, n);
        call.rows = 1;
        device->Activation(call);
        results[i] = device.Download(call.out);
      }
      for (int64_t i = 0; i < n; ++i) {
        // Relative where the result matters; far out on the left it vanishes beside its input.
        const double tolerance =
            2e-6 * std::abs(results[1][i]) + 1e-7 * std::exp(-0.5 * std::abs(x[i])) + 1e-30;
        ASSERT_NEAR(results[0][i], results[1][i], tolerance) << "x = " << x[i];
      }
    }
  }
}

TEST_P(Elementwise, ActivationsKeepNan) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float x[3] = {1.0f, nan, 2.0f};
  float y[3];
  for (const auto activation : {kernels_.silu, kernels_.gelu_erf, kernels_.gelu_tanh}) {
    activation(x, nullptr, 3, y);
    EXPECT_TRUE(std::isfinite(y[0]) && std::isnan(y[1]) && std::isfinite(y[2]));
  }
}

TEST_P(Elementwise, QuantisesToNearestEvenWithTheScaleOfTheGroup) {
  std::vector<float> x(40, 0.0f);
  x[0] = 127.0f;
  x[1] = 0.5f;
  x[2] = 1.5f;
  x[3] = -2.5f;
  x[4] = -126.6f;
  x[32] = -2.0f;  // a second group, cut short at 8 inputs
  x[33] = 1.0f;
  std::vector<int8_t> codes(64, 77);
  std::vector<float> scales(8);
  std::vector<int32_t> offsets(2);
  kernels_.quantise(x.data(), 40, codes.data(), scales.data(), offsets.data());
  EXPECT_EQ(std::vector<int8_t>(codes.begin(), codes.begin() + 6),
            (std::vector<int8_t>{127, 0, 2, -2, -127, 0}));
  EXPECT_EQ(codes[32], -127);
  EXPECT_EQ(codes[33], 64);  // 63.5 to even
  for (int j = 34; j < 64; ++j) EXPECT_EQ(codes[j], 0);
  EXPECT_EQ(scales[0], 1.0f);
  EXPECT_EQ(scales[1], 2.0f / 127.0f);
  EXPECT_EQ(offsets[0], 0);
  EXPECT_EQ(offsets[1], -128 * -63);
}

TEST_P(Elementwise, QuantisesZerosTinyAndNonFiniteGroups) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float extreme : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()}) {
    std::vector<float> x = RandomFloats(96, 1);
    x[5] = extreme;
    std::fill(x.begin() + 32, x.begin() + 64, 1e-40f);
    std::fill(x.begin() + 64, x.end(), 0.0f);
    std::vector<int8_t> codes(96, 77);
    std::vector<float> scales(8);
    std::vector<int32_t> offsets(3, 77);
    kernels_.quantise(x.data(), 96, codes.data(), scales.data(), offsets.data());
    EXPECT_EQ(codes, std::vector<int8_t>(96, 0));
    EXPECT_EQ(offsets, std::vector<int32_t>(3, 0));
    EXPECT_TRUE(std::isnan(scales[0]));
    EXPECT_TRUE(std::isfinite(scales[1]) && std::isfinite(scales[2]));
  }
}

TEST_P(Elementwise, QuantisesManyGroupsAsOneByOne) {
  constexpr int64_t kGroups = 23;
  std::vector<float> x = RandomFloats(32 * kGroups, 3);
  x[5 * 32 + 7] = std::numeric_limits<float>::quiet_NaN();
  std::fill_n(x.begin() + 9 * 32, 32, 0.0f);
  std::vector<int8_t> codes(32 * kGroups, 77), one(32);
  std::vector<float> scales(32);
  std::vector<int32_t> offsets(kGroups, 77);
  kernels_.quantise(x.data(), 32 * kGroups, codes.data(), scales.data(), offsets.data());
  for (int64_t g = 0; g < kGroups; ++g) {
    float scale[8];
    int32_t offset;
    kernels_.quantise(x.data() + 32 * g, 32, one.data(), scale, &offset);
    EXPECT_EQ(std::vector<int8_t>(codes.begin() + 32 * g, codes.begin() + 32 * (g + 1)), one) << g;
    EXPECT_EQ(std::isnan(scales[g]), g == 5);
    if (g != 5) {
      EXPECT_EQ(scales[g], scale[0]) << g;
    }
    EXPECT_EQ(offsets[g], offset) << g;
  }
}

TEST_P(Elementwise, PoolsMeansAndFirstRows) {
  const int64_t n = 45;
  const std::vector<float> x = RandomFloats(10 * n, 1);
  const std::vector<SequenceRows> sequences = {
      {.row_begin = 0, .rows = 4}, {.row_begin = 4, .rows = 1}, {.row_begin = 5, .rows = 5}};
  for (const PoolingKind kind : {PoolingKind::kMean, PoolingKind::kCls}) {
    for (const bool normalise : {false, true}) {
      std::vector<float> results[2];
      const Device* devices[2] = {&cpu_, &reference_};
      for (int i = 0; i < 2; ++i) {
        const Tensor out = devices[i]->Poisoned(3, n);
        (*devices[i])
            ->Pool({.kind = kind,
                    .normalise = normalise,
                    .in = devices[i]->Upload(x, 10, n),
                    .out = out,
                    .sequences = sequences});
        results[i] = devices[i]->Download(out);
      }
      ExpectClose(results[0], results[1], 2e-6);
    }
  }
}

TEST_P(Elementwise, GathersRows) {
  const std::vector<float> x = RandomFloats(5 * 3, 1);
  const Tensor out = cpu_.Poisoned(2, 3);
  const std::vector<int64_t> rows = {4, 1};
  cpu_->Gather(cpu_.Upload(x, 5, 3), rows, out);
  EXPECT_EQ(cpu_.Download(out), (std::vector<float>{x[12], x[13], x[14], x[3], x[4], x[5]}));
}

TEST_P(Elementwise, EmbedsFromATableAndAdds) {
  std::vector<float> exact = RandomFloats(7 * 12, 1);
  const std::vector<float> rough = exact;  // needs fp32
  for (float& value : exact) value = FloatFromBfloat16(Bfloat16FromFloat(value));
  const std::vector<int32_t> ids = {6, 0, 6};
  for (const std::vector<float>& table : {exact, rough}) {
    const int64_t before = cpu_->resident_weight_bytes();
    const TableId id = cpu_->LoadTable(table, 7, 12).value();
    EXPECT_EQ(cpu_->resident_weight_bytes() - before, 7 * 12 * (table == exact ? 2 : 4));
    const Tensor out = cpu_.Poisoned(3, 12);
    EmbedCall call = {.table = id, .ids = ids};
    call.out = out;
    cpu_->Embed(call);
    const std::vector<float> once = cpu_.Download(out);
    for (int64_t t = 0; t < 3; ++t) {
      for (int64_t j = 0; j < 12; ++j) ASSERT_EQ(once[t * 12 + j], table[ids[t] * 12 + j]);
    }
    call.add_to_output = true;
    cpu_->Embed(call);
    for (size_t i = 0; i < once.size(); ++i) ASSERT_EQ(cpu_.Download(out)[i], 2 * once[i]);
  }
}

TEST_P(Elementwise, EmbedsFromATiedHead) {
  const std::vector<int32_t> ids = {0, 40, 16, 15, 39};
  for (const DenseStorage storage :
       {DenseStorage::kPlanes, DenseStorage::kBf16, DenseStorage::kF32}) {
    const RandomLayer layer({.out = 41, .in = 75, .dense = storage, .has_coarse = false}, 3);
    std::vector<float> results[2];
    const Device* devices[2] = {&cpu_, &reference_};
    for (int i = 0; i < 2; ++i) {
      EmbedCall call = {.ids = ids};
      call.linear = (*devices[i])->LoadLinear(layer.View()).value();
      call.out = devices[i]->Poisoned(5, 75);
      (*devices[i])->Embed(call);
      results[i] = devices[i]->Download(call.out);
    }
    EXPECT_EQ(results[0], results[1]);  // a code times a scale of 8 bits is exact
  }
}

TEST_P(Elementwise, RefusesATableOfAnotherSize) {
  const std::vector<float> values(5, 1.5f);
  EXPECT_EQ(cpu_->LoadTable(values, 2, 3).status().code(), absl::StatusCode::kInvalidArgument);
}

INSTANTIATE_TEST_SUITE_P(Cpu, Elementwise, ::testing::ValuesIn(RunnableInstructionSets()),
                         [](const auto& info) { return NameOf(info.param); });

}  // namespace
}  // namespace nestor
