#include <algorithm>
#include <cmath>
#include <limits>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/nested_linear.h"
#include "tests/kernels/device.h"
#include "tests/kernels/random_layer.h"

namespace nestor {
namespace {

using ::testing::HasSubstr;

// Rows of one step up to which weights are not unpacked first.
constexpr int64_t kMaxFewRows = 16;

// Whether planes and A are multiplied by activations in int8; of many rows, B by z as well.
bool RoundsToInt8(CpuInstructionSet set, int64_t rows) {
  return rows <= kMaxFewRows || set >= CpuInstructionSet::kAvx2;
}

// Whether bf16 weights are multiplied in bf16.
bool RoundsToBf16(CpuInstructionSet set, int64_t rows) {
  return rows > kMaxFewRows && set == CpuInstructionSet::kAvx512Bf16;
}

// A product of two factors that are rounded to bf16 each, 2^-9 of its magnitude at most for each.
constexpr double kBf16Rounding = 2.01 * 0x1p-9;

struct Case {
  std::string name;
  RandomLayer::Shape shape;
  Form form = Form::kDense;
  int64_t rank = 0;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

std::vector<float> RunLinear(const Device& device, const RandomLayer& layer,
                             const std::vector<float>& x, const std::vector<RowGroup>& groups,
                             const std::vector<float>* initial = nullptr) {
  const int64_t rows = groups.back().end;
  const int64_t out = layer.shape().out;
  const LinearId id = device->LoadLinear(layer.View()).value();
  const Tensor y =
      initial == nullptr ? device.Poisoned(rows, out) : device.Upload(*initial, rows, out);
  const LinearPart part = {.layer = id, .groups = groups, .out = y};
  device->Linear({.in = device.Upload(x, rows, layer.shape().in),
                  .rows = rows,
                  .parts = {&part, 1},
                  .add_to_output = initial != nullptr});
  return device.Download(y);
}

// Half a step of the int8 rounding for every input: absmax of its group / 254.
std::vector<double> RoundingOf(const float* x, int64_t n) {
  std::vector<double> result(n);
  for (int64_t begin = 0; begin < n; begin += kGroupSize) {
    const int64_t end = std::min(begin + kGroupSize, n);
    double largest = 0;
    for (int64_t j = begin; j < end; ++j) largest = std::max<double>(largest, std::abs(x[j]));
    std::fill(result.begin() + begin, result.begin() + end, largest / 254);
  }
  return result;
}

// The classical bound of a sum of n products in fp32, n * 2^-24 of the sum of magnitudes; twice
// for the rounding of the scales' products.
double RoundingUnits(const Case& c) {
  return 2.0 * static_cast<double>(c.shape.in + c.rank + 16) * 0x1p-24;
}

void ExpectWithin(const std::vector<float>& actual, const std::vector<float>& expected,
                  const std::vector<double>& tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    ASSERT_LE(std::abs(static_cast<double>(actual[i]) - expected[i]), tolerance[i])
        << "at " << i << ": " << actual[i] << " for " << expected[i];
  }
}

class LinearForms : public ::testing::TestWithParam<std::tuple<CpuInstructionSet, Case>> {
 protected:
  CpuInstructionSet instruction_set() const { return std::get<0>(GetParam()); }
  const Case& param() const { return std::get<1>(GetParam()); }
  bool rounds_activations(int64_t rows) const {
    return RoundsToInt8(instruction_set(), rows) && !param().shape.float_activations &&
           (param().form != Form::kDense || param().shape.dense == DenseStorage::kPlanes);
  }
  // What rounding anything but the activations may add to the error of a row's outputs.
  std::vector<double> RoundingTolerance(const RandomLayer& layer, int64_t rows,
                                        const std::vector<double>& x) const {
    const Case& c = param();
    if (c.shape.float_activations) return std::vector<double>(c.shape.out);
    if (rows <= kMaxFewRows) return layer.RoundingOfZ(c.form, c.rank, x);
    std::vector<double> result(c.shape.out);
    if (RoundsToInt8(instruction_set(), rows)) result = layer.RoundingToGroups(c.form, c.rank, x);
    if (c.form == Form::kDense && c.shape.dense == DenseStorage::kBf16 &&
        RoundsToBf16(instruction_set(), rows)) {
      result = layer.Magnitude(c.form, c.rank, x);
      for (double& value : result) value *= kBf16Rounding;
    }
    return result;
  }
};

TEST_P(LinearForms, EqualsTheReferenceForAnyNumberOfRows) {
  const Case& c = param();
  const RandomLayer layer(c.shape, 7);
  for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 15, 16, 17, 20, 33, 197}) {
    SCOPED_TRACE(rows);
    const std::vector<float> x = RandomFloats(rows * c.shape.in, 11);
    const std::vector<float> initial = RandomFloats(rows * c.shape.out, 12);
    const std::vector<RowGroup> groups = {
        {.begin = 0, .end = rows, .form = c.form, .rank = c.rank}};
    std::vector<double> exact_tolerance;
    std::vector<double> tolerance;
    for (int64_t t = 0; t < rows; ++t) {
      const std::vector<double> row(x.begin() + t * c.shape.in, x.begin() + (t + 1) * c.shape.in);
      const std::vector<double> magnitude = layer.Magnitude(c.form, c.rank, row);
      const std::vector<double> inner = RoundingTolerance(layer, rows, row);
      const std::vector<double> rounding =
          layer.Magnitude(c.form, c.rank, RoundingOf(x.data() + t * c.shape.in, c.shape.in));
      for (int64_t i = 0; i < c.shape.out; ++i) {
        const double sum = magnitude[i] + std::abs(initial[t * c.shape.out + i]);
        tolerance.push_back(RoundingUnits(c) * sum + inner[i]);
        exact_tolerance.push_back(tolerance.back() +
                                  (rounds_activations(rows) ? rounding[i] : 0.0));
      }
    }
    const Device cpu = Device::Cpu(instruction_set(), 2);
    const std::vector<float> y = RunLinear(cpu, layer, x, groups);
    const std::vector<float> sum = RunLinear(cpu, layer, x, groups, &initial);
    const Device same = Device::Reference(rounds_activations(rows));
    ExpectWithin(y, RunLinear(same, layer, x, groups), tolerance);
    ExpectWithin(sum, RunLinear(same, layer, x, groups, &initial), tolerance);
    const Device exact = Device::Reference(false);
    ExpectWithin(y, RunLinear(exact, layer, x, groups), exact_tolerance);
  }
}

TEST_P(LinearForms, ExecutesWhatTheFormStates) {
  const Case& c = param();
  const RandomLayer layer(c.shape, 7);
  for (const int64_t rows : {1, 5, 16, 17, 40, 197}) {
    const Device cpu = Device::Cpu(instruction_set(), 2);
    RunLinear(cpu, layer, RandomFloats(rows * c.shape.in, 3), {{0, rows, c.form, c.rank}});
    const LinearCost stated =
        CostOfLinear(c.shape.out, c.shape.in, c.shape.has_bias, c.shape.dense, c.form, c.rank);
    EXPECT_EQ(cpu->executed().weight_bytes, stated.weight_bytes) << rows;
    EXPECT_EQ(cpu->executed().flops, rows * stated.flops) << rows;
  }
}

TEST_P(LinearForms, ARowIsTheSameBitForBitWhateverSharesItsStep) {
  const Case& c = param();
  const RandomLayer layer(c.shape, 7);
  const std::vector<float> x = RandomFloats(kMaxFewRows * c.shape.in, 21);
  const Device cpu = Device::Cpu(instruction_set(), 2);
  std::vector<float> alone;
  for (int64_t t = 0; t < kMaxFewRows; ++t) {
    const std::vector<float> row(x.begin() + t * c.shape.in, x.begin() + (t + 1) * c.shape.in);
    const std::vector<float> y = RunLinear(cpu, layer, row, {{0, 1, c.form, c.rank}});
    alone.insert(alone.end(), y.begin(), y.end());
  }
  for (int64_t rows = 2; rows <= kMaxFewRows; ++rows) {
    const std::vector<float> some(x.begin(), x.begin() + rows * c.shape.in);
    const std::vector<float> y = RunLinear(cpu, layer, some, {{0, rows, c.form, c.rank}});
    ASSERT_EQ(y, std::vector<float>(alone.begin(), alone.begin() + rows * c.shape.out)) << rows;
  }
}

TEST_P(LinearForms, AValueThatIsNotFiniteStaysInItsRow) {
  const Case& c = param();
  const RandomLayer layer(c.shape, 7);
  const Device cpu = Device::Cpu(instruction_set(), 2);
  for (const int64_t rows : {3, 20}) {
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      std::vector<float> x = RandomFloats(rows * c.shape.in, 5);
      const std::vector<float> good = RunLinear(cpu, layer, x, {{0, rows, c.form, c.rank}});
      x[c.shape.in + c.shape.in / 2] = bad;
      const std::vector<float> y = RunLinear(cpu, layer, x, {{0, rows, c.form, c.rank}});
      for (int64_t i = 0; i < c.shape.out; ++i) {
        EXPECT_EQ(y[i], good[i]);
        EXPECT_EQ(y[2 * c.shape.out + i], good[2 * c.shape.out + i]);
        const bool reads_input = c.form != Form::kPrefix || c.rank > 0;
        EXPECT_EQ(std::isfinite(y[c.shape.out + i]), !reads_input);
      }
    }
  }
}

std::vector<Case> Cases() {
  constexpr DenseStorage kPlanes = DenseStorage::kPlanes;
  constexpr DenseStorage kBf16 = DenseStorage::kBf16;
  return {
      {"PlanesAligned", {.out = 64, .in = 96, .dense = kPlanes}, Form::kDense, 0},
      {"PlanesOdd", {.out = 45, .in = 77, .dense = kPlanes, .has_bias = true}, Form::kDense, 0},
      {"PlanesOneByOne", {.out = 1, .in = 1, .dense = kPlanes}, Form::kDense, 0},
      {"PlanesTwoBlocks", {.out = 530, .in = 40, .dense = kPlanes}, Form::kDense, 0},
      {"CoarseAlone", {.out = 50, .in = 100, .dense = kPlanes}, Form::kResidual, 0},
      {"MiddleAligned", {.out = 64, .in = 96, .has_middle = true}, Form::kMiddle, 0},
      {"MiddleOdd", {.out = 45, .in = 277, .has_middle = true, .has_bias = true}, Form::kMiddle, 0},
      {"MiddleTwoBlocks", {.out = 530, .in = 40, .has_middle = true}, Form::kMiddle, 0},
      {"MiddleBesideBf16",
       {.out = 33, .in = 65, .dense = kBf16, .has_middle = true},
       Form::kMiddle,
       0},
      {"MiddleInFloats",
       {.out = 45, .in = 277, .has_middle = true, .has_bias = true, .float_activations = true},
       Form::kMiddle,
       0},
      {"Residual",
       {.out = 70, .in = 300, .dense = kPlanes, .residual_rank = 24, .has_bias = true},
       Form::kResidual,
       13},
      {"ResidualBesideBf16",
       {.out = 33, .in = 65, .dense = kBf16, .residual_rank = 8},
       Form::kResidual,
       8},
      {"PrefixOdd",
       {.out = 75, .in = 141, .dense = kPlanes, .prefix_rank = 61, .has_bias = true},
       Form::kPrefix,
       43},
      {"PrefixWide",
       {.out = 300, .in = 40, .dense = kPlanes, .prefix_rank = 290},
       Form::kPrefix,
       270},
      {"PrefixOfRankZero",
       {.out = 20, .in = 40, .dense = kPlanes, .prefix_rank = 8, .has_bias = true},
       Form::kPrefix,
       0},
      {"Bf16",
       {.out = 61, .in = 83, .dense = kBf16, .has_coarse = false, .has_bias = true},
       Form::kDense,
       0},
      {"Bf16TwoBlocks",
       {.out = 520, .in = 32, .dense = kBf16, .has_coarse = false},
       Form::kDense,
       0},
      {"Fp32",
       {.out = 37, .in = 91, .dense = DenseStorage::kF32, .has_coarse = false, .has_bias = true},
       Form::kDense,
       0},
      {"PlanesInFloats",
       {.out = 45, .in = 277, .dense = kPlanes, .has_bias = true, .float_activations = true},
       Form::kDense,
       0},
      {"ResidualInFloats",
       {.out = 70,
        .in = 300,
        .dense = kPlanes,
        .residual_rank = 24,
        .has_bias = true,
        .float_activations = true},
       Form::kResidual,
       13},
      {"PrefixInFloats",
       {.out = 300, .in = 40, .dense = kPlanes, .prefix_rank = 290, .float_activations = true},
       Form::kPrefix,
       270},
      {"GarAligned",
       {.out = 96, .in = 64, .dense = kPlanes, .gar_ranks = {64, 32}},
       Form::kGar,
       32},
      {"GarOdd",
       {.out = 75, .in = 141, .dense = kPlanes, .gar_ranks = {21, 43}, .has_bias = true},
       Form::kGar,
       43},
      {"GarOfAllRowsButOne",
       {.out = 71, .in = 80, .dense = kBf16, .gar_ranks = {70}, .has_bias = true},
       Form::kGar,
       70},
      {"GarOfOneRow", {.out = 530, .in = 40, .dense = kPlanes, .gar_ranks = {1}}, Form::kGar, 1},
      {"GarWide",
       {.out = 700, .in = 45, .dense = kPlanes, .gar_ranks = {290}, .has_bias = true},
       Form::kGar,
       290},
      {"GarInFloats",
       {.out = 70,
        .in = 300,
        .dense = kPlanes,
        .gar_ranks = {33},
        .has_bias = true,
        .float_activations = true},
       Form::kGar,
       33},
      {"Bf16InFloats",
       {.out = 61, .in = 83, .dense = kBf16, .has_coarse = false, .float_activations = true},
       Form::kDense,
       0},
  };
}

INSTANTIATE_TEST_SUITE_P(Cpu, LinearForms,
                         ::testing::Combine(::testing::ValuesIn(RunnableInstructionSets()),
                                            ::testing::ValuesIn(Cases())),
                         [](const auto& info) {
                           return NameOf(std::get<0>(info.param)) + std::get<1>(info.param).name;
                         });

class MixedGroups : public ::testing::TestWithParam<CpuInstructionSet> {};

constexpr int64_t kMixedGarRanks[] = {5, 16, 31};

// Three layers over one input, every form, in an order that no ladder would have.
std::vector<std::vector<RowGroup>> RandomGroups(int64_t rows, bool is_bf16, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<std::vector<RowGroup>> parts(3);
  for (std::vector<RowGroup>& groups : parts) {
    for (int64_t begin = 0; begin < rows;) {
      const int64_t end = std::min<int64_t>(rows, begin + 1 + random() % 5);
      const auto form = static_cast<Form>(random() % 5);
      int64_t rank =
          form == Form::kDense || form == Form::kMiddle ? 0 : random() % (is_bf16 ? 9 : 71);
      if (form == Form::kGar) rank = kMixedGarRanks[random() % 3];
      groups.push_back({.begin = begin, .end = end, .form = form, .rank = rank});
      begin = end;
    }
  }
  return parts;
}

// The second one's inputs may stay floats beside those of the others.
struct MixedCase {
  bool is_bf16 = false;
  bool has_floats = false;
};
constexpr MixedCase kMixedCases[] = {{false, false}, {true, false}, {false, true}, {true, true}};

std::vector<RandomLayer> MixedLayers(const MixedCase& c) {
  std::vector<RandomLayer> layers;
  for (const int64_t out : {96, 33, 47}) {
    layers.emplace_back(
        RandomLayer::Shape{.out = out,
                           .in = 150,
                           .dense = c.is_bf16 ? DenseStorage::kBf16 : DenseStorage::kPlanes,
                           .has_middle = true,
                           .residual_rank = 70,
                           .prefix_rank = 75,
                           .gar_ranks = {kMixedGarRanks, kMixedGarRanks + 3},
                           .has_bias = true,
                           .float_activations = c.has_floats && layers.size() == 1},
        static_cast<uint32_t>(out));
  }
  return layers;
}

std::vector<std::vector<float>> RunMixed(const Device& device,
                                         const std::vector<RandomLayer>& layers,
                                         const std::vector<float>& x,
                                         const std::vector<std::vector<RowGroup>>& groups) {
  const int64_t rows = groups[0].back().end;
  std::vector<LinearPart> parts;
  for (size_t i = 0; i < layers.size(); ++i) {
    parts.push_back({.layer = device->LoadLinear(layers[i].View()).value(),
                     .groups = groups[i],
                     .out = device.Poisoned(rows, layers[i].shape().out)});
  }
  device->Linear(
      {.in = device.Upload(x, rows, layers[0].shape().in), .rows = rows, .parts = parts});
  std::vector<std::vector<float>> results;
  for (const LinearPart& part : parts) results.push_back(device.Download(part.out));
  return results;
}

TEST_P(MixedGroups, OfFewRowsEqualTheirRowsAloneBitForBit) {
  for (const MixedCase& c : kMixedCases) {
    const std::vector<RandomLayer> layers = MixedLayers(c);
    const Device cpu = Device::Cpu(GetParam(), 2);
    for (uint32_t seed = 0; seed < 20; ++seed) {
      const int64_t rows = 1 + seed % kMaxFewRows;
      const auto groups = RandomGroups(rows, c.is_bf16, seed);
      const std::vector<float> x = RandomFloats(rows * 150, seed);
      const auto together = RunMixed(cpu, layers, x, groups);
      for (size_t i = 0; i < layers.size(); ++i) {
        const int64_t out = layers[i].shape().out;
        for (const RowGroup& group : groups[i]) {
          for (int64_t t = group.begin; t < group.end; ++t) {
            const std::vector<float> row(x.begin() + t * 150, x.begin() + (t + 1) * 150);
            const std::vector<float> alone =
                RunLinear(cpu, layers[i], row, {{0, 1, group.form, group.rank}});
            ASSERT_EQ(alone, std::vector<float>(together[i].begin() + t * out,
                                                together[i].begin() + (t + 1) * out))
                << "part " << i << " row " << t << " seed " << seed;
          }
        }
      }
    }
  }
}

TEST_P(MixedGroups, OfManyRowsEqualTheReference) {
  for (const MixedCase& c : kMixedCases) {
    const std::vector<RandomLayer> layers = MixedLayers(c);
    for (const int64_t rows : {41, 230}) {  // in one block of rows, and in one for each thread
      const auto groups = RandomGroups(rows, c.is_bf16, 3);
      const std::vector<float> x = RandomFloats(rows * 150, 4);
      const auto actual = RunMixed(Device::Cpu(GetParam(), 2), layers, x, groups);
      const bool in_int8 = RoundsToInt8(GetParam(), rows);
      const bool in_bf16 = RoundsToBf16(GetParam(), rows);
      const auto expected = RunMixed(Device::Reference(in_int8), layers, x, groups);
      for (size_t i = 0; i < layers.size(); ++i) {
        const bool in_floats = layers[i].shape().float_activations;
        const double relative =
            2 * 240 * 0x1p-24 + (c.is_bf16 && in_bf16 && !in_floats ? kBf16Rounding : 0.0);
        std::vector<double> tolerance;
        for (const RowGroup& group : groups[i]) {
          for (int64_t t = group.begin; t < group.end; ++t) {
            const std::vector<double> row(x.begin() + t * 150, x.begin() + (t + 1) * 150);
            const std::vector<double> magnitude = layers[i].Magnitude(group.form, group.rank, row);
            std::vector<double> rounding(magnitude.size());
            if (in_int8 && !in_floats)
              rounding = layers[i].RoundingToGroups(group.form, group.rank, row);
            for (size_t o = 0; o < magnitude.size(); ++o)
              tolerance.push_back(relative * magnitude[o] + rounding[o]);
          }
        }
        ExpectWithin(actual[i], expected[i], tolerance);
      }
    }
  }
}

// Which half of an MLP has inputs that stay floats: of the first, `up` alone.
enum class FloatHalf : uint8_t { kNeither, kFirst, kSecond };

// Layers of an MLP of `hidden` columns, {up, down} or {gate, up, down}.
std::vector<RandomLayer> MlpLayers(int64_t hidden, bool has_gate, DenseStorage dense,
                                   FloatHalf floats) {
  RandomLayer::Shape up = {.out = hidden,
                           .in = 70,
                           .dense = dense,
                           .has_middle = true,
                           .residual_rank = 40,
                           .prefix_rank = 50,
                           .gar_ranks = {kMixedGarRanks, kMixedGarRanks + 3},
                           .has_bias = true};
  RandomLayer::Shape down = up;
  down.out = 70;
  down.in = hidden;
  std::vector<RandomLayer> layers;
  if (has_gate) layers.emplace_back(up, 1);
  up.float_activations = floats == FloatHalf::kFirst;
  down.float_activations = floats == FloatHalf::kSecond;
  layers.emplace_back(up, 2);
  layers.emplace_back(down, 3);
  return layers;
}

// y = initial + the MLP of x, in one call, or in three.
std::vector<float> RunMlp(const Device& device, const std::vector<RandomLayer>& layers,
                          const std::vector<float>& x, const std::vector<float>& initial,
                          const std::vector<std::vector<RowGroup>>& groups,
                          ActivationKind activation, bool in_one_call) {
  const int64_t rows = groups[0].back().end;
  std::vector<LinearPart> parts;
  for (size_t i = 0; i < layers.size(); ++i) {
    parts.push_back({.layer = device->LoadLinear(layers[i].View()).value(),
                     .groups = groups[i + 3 - layers.size()],
                     .out = device.Poisoned(rows, layers[i].shape().out)});
  }
  parts.back().out = device.Upload(initial, rows, 70);
  const auto all = std::span<const LinearPart>(parts);
  const MlpCall call = {.expand = {.in = device.Upload(x, rows, 70),
                                   .rows = rows,
                                   .parts = all.first(layers.size() - 1)},
                        .activation = activation,
                        .contract = {.in = parts[layers.size() - 2].out,
                                     .rows = rows,
                                     .parts = all.last(1),
                                     .add_to_output = true}};
  if (in_one_call) {
    device->Mlp(call);
  } else {
    device->Linear(call.expand);
    device->Activation({.kind = activation,
                        .in = parts[0].out,
                        .up = layers.size() == 3 ? parts[1].out : Tensor{},
                        .out = call.contract.in,
                        .rows = rows});
    device->Linear(call.contract);
  }
  return device.Download(parts.back().out);
}

void ExpectTheSameInOneCall(CpuInstructionSet set, const std::vector<RandomLayer>& layers,
                            int64_t rows) {
  const bool has_gate = layers.size() == 3;
  auto groups =
      RandomGroups(rows, /*is_bf16=*/false, static_cast<uint32_t>(layers.back().shape().in));
  for (auto& part : groups) {
    for (RowGroup& group : part) group.rank = std::min<int64_t>(group.rank, 40);
  }
  std::vector<float> x = RandomFloats(rows * 70, 4);
  x[3 * 70 + 1] = std::numeric_limits<float>::infinity();  // that row alone is lost
  const std::vector<float> initial = RandomFloats(rows * 70, 5);
  const ActivationKind activation = has_gate ? ActivationKind::kSilu : ActivationKind::kGeluErf;
  const Device cpu = Device::Cpu(set, 2);
  const auto fused = RunMlp(cpu, layers, x, initial, groups, activation, true);
  const LinearCost executed = cpu->executed();
  const Device other = Device::Cpu(set, 2);
  const auto separate = RunMlp(other, layers, x, initial, groups, activation, false);
  for (size_t i = 0; i < fused.size(); ++i) {
    const bool is_lost = i / 70 == 3;
    ASSERT_EQ(!std::isfinite(fused[i]), is_lost) << i;
    if (is_lost) continue;
    ASSERT_EQ(fused[i], separate[i]) << i;
  }
  EXPECT_EQ(executed.flops, other->executed().flops);
  EXPECT_EQ(executed.weight_bytes, other->executed().weight_bytes);
}

TEST_P(MixedGroups, OfAnMlpGiveTheSameInOneCallBitForBit) {
  for (const DenseStorage dense : {DenseStorage::kPlanes, DenseStorage::kBf16}) {
    for (const FloatHalf floats : {FloatHalf::kNeither, FloatHalf::kFirst, FloatHalf::kSecond}) {
      for (const bool has_gate : {false, true}) {
        for (const int64_t hidden : {64, 83, 160}) {
          if (floats != FloatHalf::kNeither && hidden != 83) continue;
          for (const int64_t rows : {5, 41, 230}) {
            ExpectTheSameInOneCall(GetParam(), MlpLayers(hidden, has_gate, dense, floats), rows);
          }
        }
      }
    }
  }
}

TEST_P(MixedGroups, ReadEveryPartOnceAndCountItOnce) {
  for (const MixedCase& c : kMixedCases) {
    const std::vector<RandomLayer> layers = MixedLayers(c);
    for (const int64_t rows : {12, 41, 230}) {
      const auto groups = RandomGroups(rows, c.is_bf16, 5);
      const std::vector<float> x = RandomFloats(rows * 150, 4);
      const Device cpu = Device::Cpu(GetParam(), 2);
      const Device reference = Device::Reference(false);
      RunMixed(cpu, layers, x, groups);
      RunMixed(reference, layers, x, groups);
      EXPECT_EQ(cpu->executed().weight_bytes, reference->executed().weight_bytes);
      EXPECT_EQ(cpu->executed().flops, reference->executed().flops);
    }
  }
}

TEST_P(MixedGroups, SharedCoarsePlaneIsReadOnceForResidualMiddleAndDenseRows) {
  // 64 x 64: a plane is 2,048 bytes, scales 256; rank 4 is 4 * (64 + 64 + 4 + 4) = 544.
  const RandomLayer layer({.out = 64, .in = 64, .has_middle = true, .residual_rank = 4}, 1);
  for (const int64_t rows : {6, 30}) {
    const Device cpu = Device::Cpu(GetParam(), 1);
    RunLinear(cpu, layer, RandomFloats(rows * 64, 1),
              {{0, 2, Form::kResidual, 0}, {2, 4, Form::kResidual, 4}, {4, rows, Form::kDense, 0}});
    EXPECT_EQ(cpu->executed().weight_bytes, 2048 + 256 + 544 + 2048);
    EXPECT_EQ(cpu->executed().flops, rows * 8192 + 2 * 2 * 4 * 128);
    const Device other = Device::Cpu(GetParam(), 1);
    RunLinear(other, layer, RandomFloats(rows * 64, 1),
              {{0, 2, Form::kResidual, 4}, {2, 5, Form::kMiddle, 0}, {5, rows, Form::kDense, 0}});
    EXPECT_EQ(other->executed().weight_bytes, 2048 + 256 + 544 + 1024 + 2048);
  }
}

TEST_P(MixedGroups, EveryGarPairIsReadOnceWithTheOrderOfItsRows) {
  // Of 64 x 96: rank 32 is 32 * (96 + 32 + 2 * (3 + 1)) + 4 * 64, rank 4 is
  // 4 * (96 + 64 + 2 * (3 + 2)) + 4 * 64, since its 60 other rows are padded; the bias is 4 * 64.
  const RandomLayer layer({.out = 64, .in = 96, .gar_ranks = {4, 32}, .has_bias = true}, 1);
  for (const int64_t rows : {6, 30, 230}) {
    const Device cpu = Device::Cpu(GetParam(), 2);
    RunLinear(cpu, layer, RandomFloats(rows * 96, 1),
              {{0, 2, Form::kGar, 32}, {2, 5, Form::kGar, 4}, {5, rows, Form::kGar, 32}});
    EXPECT_EQ(cpu->executed().weight_bytes, 4352 + 256 + 680 + 256 + 256);
    EXPECT_EQ(cpu->executed().flops, 2 * ((rows - 3) * 32 * 128 + 3 * 4 * 156));
  }
}

TEST_P(MixedGroups, ResidentBytesAreThoseOfOneLayout) {
  // Planes 2 * 2,048 + scales 256, factors 4 * 136, no padding at these sizes, but for the 32
  // largest scales of B.
  const RandomLayer layer({.out = 64, .in = 64, .residual_rank = 4}, 1);
  const Device cpu = Device::Cpu(GetParam(), 1);
  ASSERT_TRUE(cpu->LoadLinear(layer.View()).ok());
  EXPECT_EQ(cpu->resident_weight_bytes(), 2 * 2048 + 256 + 544 + 64);
}

INSTANTIATE_TEST_SUITE_P(Cpu, MixedGroups, ::testing::ValuesIn(RunnableInstructionSets()),
                         [](const auto& info) { return NameOf(info.param); });

TEST(LoadLinear, NamesTheLayerAndWhatDoesNotFit) {
  const RandomLayer layer({.out = 64, .in = 64, .residual_rank = 4}, 1);
  const RandomLayer gar({.out = 8, .in = 64, .gar_ranks = {3, 5}}, 1);
  for (const Device& device :
       {Device::Reference(false), Device::Cpu(CpuInstructionSet::kPortable, 1)}) {
    LinearWeights weights = layer.View();
    weights.name = "blocks.3.up";
    weights.scales = nullptr;
    EXPECT_THAT(std::string(device->LoadLinear(weights).status().message()),
                HasSubstr("layer blocks.3.up [64, 64]: has a coarse plane but no scales"));
    weights = layer.View();
    const uint8_t middle = 0;
    weights.middle = &middle;
    weights.coarse = nullptr;
    weights.fine = nullptr;
    weights.scales = nullptr;
    const uint16_t bf16 = 0;
    weights.dense_bf16 = &bf16;
    EXPECT_THAT(std::string(device->LoadLinear(weights).status().message()),
                HasSubstr("has a middle plane but no coarse one"));
    weights = layer.View();
    weights.fine = nullptr;
    EXPECT_THAT(std::string(device->LoadLinear(weights).status().message()),
                HasSubstr("needs one dense form"));
    weights = layer.View();
    weights.residual.bt = nullptr;
    EXPECT_THAT(std::string(device->LoadLinear(weights).status().message()),
                HasSubstr("residual factors of rank 4 lack their codes"));
    weights = gar.View();
    weights.gar[0].factors.a_scales = nullptr;
    EXPECT_THAT(std::string(device->LoadLinear(weights).status().message()),
                HasSubstr("gar factors of rank 3 lack their scales"));
    weights = gar.View();
    weights.gar[1].factors.max_rank = 8;
    EXPECT_THAT(std::string(device->LoadLinear(weights).status().message()),
                HasSubstr("layer random [8, 64]: gar rank is 8"));
    weights = gar.View();
    weights.gar[1] = weights.gar[0];
    EXPECT_THAT(std::string(device->LoadLinear(weights).status().message()),
                HasSubstr("has two gar pairs of rank 3"));
    weights = gar.View();
    const int32_t twice[] = {0, 1, 2, 3, 4, 5, 6, 2};
    weights.gar[1].rows = twice;
    EXPECT_THAT(std::string(device->LoadLinear(weights).status().message()),
                HasSubstr("gar pair of rank 5: rows[7] is 2, expected a permutation"));
    weights = layer.View();
    weights.in = 0;
    EXPECT_EQ(device->LoadLinear(weights).status().code(), absl::StatusCode::kInvalidArgument);
  }
}

}  // namespace
}  // namespace nestor
