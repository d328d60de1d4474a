// The reference against numbers worked out by hand: everything else is compared with it.

#include <cmath>
#include <vector>

#include "base/bfloat16.h"
#include "gtest/gtest.h"
#include "kernels/reference/reference_backend.h"
#include "tests/kernels/device.h"

namespace nestor {
namespace {

// Two outputs, two inputs: q = {{100, -5}, {8, -119}}, scales 0.5 and 0.25.
// hi = {{6, 0}, {1, -7}}, lo = {{4, -5}, {-8, -7}}.
class ReferenceLinear : public ::testing::Test {
 protected:
  ReferenceLinear() : coarse_(32, 0x88), fine_(32, 0x88), a_(32), bt_(32) {
    coarse_[0] = 14 | (8 << 4);
    fine_[0] = 12 | (3 << 4);
    coarse_[16] = 9 | (1 << 4);
    fine_[16] = 0 | (1 << 4);
    a_[0] = 2;
    a_[1] = -3;
    bt_[0] = 5;
    bt_[1] = 7;
  }

  std::vector<float> Run(Form form, int64_t rank) {
    const Device device = Device::Reference(false);
    LinearWeights weights;
    weights.name = "by hand";
    weights.out = 2;
    weights.in = 2;
    weights.coarse = coarse_.data();
    weights.fine = fine_.data();
    weights.scales = scales_;
    weights.residual = {1, a_.data(), &one_, bt_.data(), &half_};
    weights.prefix = weights.residual;
    weights.bias = bias_;
    const LinearId id = device->LoadLinear(weights).value();
    const RowGroup group = {.begin = 0, .end = 1, .form = form, .rank = rank};
    const LinearPart part = {.layer = id, .groups = {&group, 1}, .out = device.Poisoned(1, 2)};
    device->Linear(
        {.in = device.Upload(std::vector<float>{3, 2}, 1, 2), .rows = 1, .parts = {&part, 1}});
    return device.Download(part.out);
  }

  std::vector<uint8_t> coarse_, fine_;
  std::vector<int8_t> a_, bt_;
  const uint16_t scales_[2] = {Bfloat16FromFloat(0.5f), Bfloat16FromFloat(0.25f)};
  const uint16_t one_ = Bfloat16FromFloat(1.0f);
  const uint16_t half_ = Bfloat16FromFloat(0.5f);
  const float bias_[2] = {1000, 2000};
};

TEST_F(ReferenceLinear, DenseIsBothPlanes) {
  // 0.5 * (300 - 10) + 1000, 0.25 * (24 - 238) + 2000.
  EXPECT_EQ(Run(Form::kDense, 0), (std::vector<float>{1145, 1946.5}));
}

TEST_F(ReferenceLinear, ResidualIsTheCoarsePlanePlusItsFactors) {
  // 0.5 * 16 * 18 = 144; 0.25 * 16 * (3 - 14) = -44; z = 2 * 3 - 3 * 2 = 0 adds nothing.
  EXPECT_EQ(Run(Form::kResidual, 0), (std::vector<float>{1144, 1956}));
  a_[1] = -2;  // z = 2, B z = {5, 7}
  EXPECT_EQ(Run(Form::kResidual, 1), (std::vector<float>{1149, 1963}));
}

TEST_F(ReferenceLinear, PrefixIsItsFactorsAlone) {
  a_[1] = 5;  // z = 16, B z = {40, 56}
  EXPECT_EQ(Run(Form::kPrefix, 1), (std::vector<float>{1040, 2056}));
  EXPECT_EQ(Run(Form::kPrefix, 0), (std::vector<float>{1000, 2000}));
}

TEST(ReferenceGarForm, GivesItsPivotsAsTheyAreAndTheOthersByThem) {
  // Three outputs of two inputs, rank 2: outputs 2 and 0 are pivots.
  const std::vector<float> dense(6, 100);
  std::vector<int8_t> a(64), bt(64);
  a[0] = 1;
  a[1] = 2;
  a[32] = -3;
  a[33] = 4;
  bt[0] = 5;
  bt[32] = 7;
  const uint16_t scales[] = {Bfloat16FromFloat(1.0f), Bfloat16FromFloat(0.5f)};
  const int32_t rows[] = {2, 0, 1};
  const float bias[] = {1000, 2000, 3000};
  LinearWeights weights;
  weights.name = "by hand";
  weights.out = 3;
  weights.in = 2;
  weights.dense_f32 = dense.data();
  weights.gar = {{.factors = {2, a.data(), scales, bt.data(), scales}, .rows = rows}};
  weights.bias = bias;
  const Device device = Device::Reference(false);
  const LinearId id = device->LoadLinear(weights).value();
  const RowGroup group = {.begin = 0, .end = 1, .form = Form::kGar, .rank = 2};
  const LinearPart part = {.layer = id, .groups = {&group, 1}, .out = device.Poisoned(1, 3)};
  device->Linear(
      {.in = device.Upload(std::vector<float>{3, 2}, 1, 2), .rows = 1, .parts = {&part, 1}});
  // z = {1 * (3 + 4), 0.5 * (-9 + 8)}; the last output is 1 * 5 * 7 + 0.5 * 7 * -0.5.
  EXPECT_EQ(device.Download(part.out), (std::vector<float>{999.5, 2033.25, 3007}));
  EXPECT_EQ(device->executed().flops, 2 * 2 * 3);
}

TEST(ReferenceNorm, ScalesToUnitRootMeanSquareAndToUnitDeviation) {
  const Device device = Device::Reference(false);
  const VectorId gain = device->LoadVector(std::vector<float>{1, 2}).value();
  const Tensor out = device.Poisoned(1, 2);
  NormCall call = {.kind = NormKind::kRms, .epsilon = 0, .gain = gain};
  call.in = device.Upload(std::vector<float>{1, 7}, 1, 2);
  call.out = out;
  call.rows = 1;
  device->Norm(call);  // sqrt(50 / 2) = 5
  EXPECT_FLOAT_EQ(device.Download(out)[0], 0.2f);
  EXPECT_FLOAT_EQ(device.Download(out)[1], 2.8f);
  call.kind = NormKind::kLayerNorm;
  device->Norm(call);  // mean 4, deviation 3
  EXPECT_EQ(device.Download(out), (std::vector<float>{-1, 2}));
}

TEST(ReferenceActivation, KnownValues) {
  const Device device = Device::Reference(false);
  const auto at_one = [&](ActivationKind kind) {
    ActivationCall call = {.kind = kind};
    call.in = device.Upload(std::vector<float>{1}, 1, 1);
    call.out = call.in;
    call.rows = 1;
    device->Activation(call);
    return device.Download(call.out)[0];
  };
  EXPECT_FLOAT_EQ(at_one(ActivationKind::kSilu), 0.7310586f);
  EXPECT_FLOAT_EQ(at_one(ActivationKind::kGeluErf), 0.8413447f);
  EXPECT_FLOAT_EQ(at_one(ActivationKind::kGeluTanh), 0.8411920f);
}

TEST(ReferenceAttention, RotatesByPositionAndWeighsByScore) {
  const Device device = Device::Reference(false);
  ASSERT_TRUE(
      device
          ->AllocateKvCache(
              {.num_layers = 1, .num_kv_heads = 1, .head_dim = 2, .page_size = 4, .num_pages = 1})
          .ok());
  // A quarter turn for each position.
  const VectorId frequency = device->LoadVector(std::vector<float>{1.57079633f}).value();
  const std::vector<int32_t> pages = {0};
  const SequenceRows sequence = {.row_begin = 0, .rows = 2, .position = 0, .pages = pages};
  AttentionCall call = {.num_heads = 1, .num_kv_heads = 1, .head_dim = 2, .scale = 1};
  call.inverse_frequencies = frequency;
  // Rotated: k0 = (1, 0), k1 = (0, 1); q1 = (2, 0) becomes (0, 2).
  call.q = device.Upload(std::vector<float>{1, 0, 2, 0}, 2, 2);
  call.k = device.Upload(std::vector<float>{1, 0, 1, 0}, 2, 2);
  call.v = device.Upload(std::vector<float>{10, 20, 30, 40}, 2, 2);
  call.out = device.Poisoned(2, 2);
  call.sequences = {&sequence, 1};
  device->Attention(call);
  const std::vector<float> out = device.Download(call.out);
  EXPECT_EQ(out[0], 10);
  EXPECT_EQ(out[1], 20);
  // Scores 0 and 2: weights 1 / (1 + e^2) and the rest.
  const double first = 1 / (1 + std::exp(2.0));
  EXPECT_NEAR(out[2], 30 - 20 * first, 1e-5);
  EXPECT_NEAR(out[3], 40 - 20 * first, 1e-5);
}

TEST(ReferencePool, MeanIsScaledToUnitLength) {
  const Device device = Device::Reference(false);
  const SequenceRows sequence = {.row_begin = 0, .rows = 2};
  const Tensor out = device.Poisoned(1, 2);
  device->Pool({.kind = PoolingKind::kMean,
                .normalise = true,
                .in = device.Upload(std::vector<float>{2, 3, 4, 5}, 2, 2),
                .out = out,
                .sequences = {&sequence, 1}});
  EXPECT_FLOAT_EQ(device.Download(out)[0], 0.6f);
  EXPECT_FLOAT_EQ(device.Download(out)[1], 0.8f);
}

}  // namespace
}  // namespace nestor
