#include "compress/gar.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>

#include "base/bfloat16.h"
#include "compress/layer.h"
#include "gtest/gtest.h"

namespace nestor {
namespace {

struct Case {
  std::string name;
  int64_t out;
  int64_t in;
  int64_t rank;
  double decay = 1;           // of singular values, from one to the next
  bool repeats_rows = false;  // the first `rank` rows are equal
  bool is_singular = false;   // half of the inputs are zero
};
void PrintTo(const Case& value, std::ostream* out) { *out << value.name; }

// A sum of outer products of random vectors, each `decay` of the one before.
std::vector<float> RandomWeights(const Case& c, std::mt19937_64* random) {
  std::normal_distribution<double> normal;
  std::vector<double> weights(static_cast<size_t>(c.out * c.in));
  double scale = 1;
  for (int64_t k = 0; k < std::min(c.out, c.in); ++k, scale *= c.decay) {
    std::vector<double> u(static_cast<size_t>(c.out)), v(static_cast<size_t>(c.in));
    for (double& value : u) value = normal(*random);
    for (double& value : v) value = normal(*random);
    for (int64_t i = 0; i < c.out; ++i) {
      for (int64_t j = 0; j < c.in; ++j) {
        weights[static_cast<size_t>(i * c.in + j)] +=
            scale * u[static_cast<size_t>(i)] * v[static_cast<size_t>(j)];
      }
    }
  }
  for (int64_t i = 1; i < c.rank && c.repeats_rows; ++i) {
    std::copy_n(weights.begin(), c.in, weights.begin() + i * c.in);
  }
  return {weights.begin(), weights.end()};
}

std::vector<double> RandomMoment(const Case& c, std::mt19937_64* random) {
  std::normal_distribution<double> normal;
  const int64_t n = c.in;
  std::vector<double> moment(static_cast<size_t>(n * n));
  std::vector<double> x(static_cast<size_t>(n));
  for (int64_t row = 0; row < 3 * n; ++row) {
    for (int64_t j = 0; j < n; ++j) {
      // A few dominant directions, as activations have.
      x[static_cast<size_t>(j)] = normal(*random) * (j % 7 == 0 ? 5.0 : 0.5);
      if (c.is_singular && j % 2 == 0) x[static_cast<size_t>(j)] = 0;
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        moment[static_cast<size_t>(i * n + j)] +=
            x[static_cast<size_t>(i)] * x[static_cast<size_t>(j)] / static_cast<double>(3 * n);
      }
    }
  }
  return moment;
}

// tr(D S D^T) in plain loops.
double Energy(const std::vector<double>& d, int64_t in, const std::vector<double>& moment) {
  double energy = 0;
  for (size_t row = 0; row < d.size(); row += static_cast<size_t>(in)) {
    for (int64_t j = 0; j < in; ++j) {
      for (int64_t k = 0; k < in; ++k) {
        energy += d[row + static_cast<size_t>(j)] * moment[static_cast<size_t>(j * in + k)] *
                  d[row + static_cast<size_t>(k)];
      }
    }
  }
  return energy;
}

// The matrix [out, in] that a stored pair stands for.
std::vector<double> MatrixOf(const GarPair& pair, const Case& c) {
  const std::vector<float> a = DequantiseFactor(pair.a);
  const std::vector<float> bt = DequantiseFactor(pair.bt);
  const int64_t others = c.out - c.rank;
  std::vector<double> matrix(static_cast<size_t>(c.out * c.in));
  for (int64_t place = 0; place < c.out; ++place) {
    double* const row = matrix.data() + pair.rows[static_cast<size_t>(place)] * c.in;
    for (int64_t k = 0; k < c.rank; ++k) {
      const double b = place < c.rank ? (place == k ? 1.0 : 0.0)
                                      : bt[static_cast<size_t>(k * others + place - c.rank)];
      for (int64_t j = 0; j < c.in; ++j) row[j] += b * a[static_cast<size_t>(k * c.in + j)];
    }
  }
  return matrix;
}

// The first `rank` components, not quantised.
std::vector<double> Sliced(const Decomposition& decomposition, const Case& c) {
  std::vector<double> matrix(static_cast<size_t>(c.out * c.in));
  for (int64_t k = 0; k < c.rank; ++k) {
    for (int64_t i = 0; i < c.out; ++i) {
      for (int64_t j = 0; j < c.in; ++j) {
        matrix[static_cast<size_t>(i * c.in + j)] +=
            static_cast<double>(decomposition.bt[static_cast<size_t>(k * c.out + i)]) *
            decomposition.a[static_cast<size_t>(k * c.in + j)];
      }
    }
  }
  return matrix;
}

template <typename T>
std::vector<double> Difference(const std::vector<T>& a, const std::vector<double>& b) {
  std::vector<double> difference;
  for (size_t i = 0; i < a.size(); ++i) difference.push_back(static_cast<double>(a[i]) - b[i]);
  return difference;
}

class GarTest : public testing::TestWithParam<Case> {
 protected:
  GarTest() {
    std::mt19937_64 random(5);
    weights_ = RandomWeights(GetParam(), &random);
    moment_ = RandomMoment(GetParam(), &random);
    const auto& [name, out, in, rank, decay, repeats_rows, is_singular] = GetParam();
    decomposition_ = Decompose(weights_, out, in, moment_, std::min(out, in)).value();
    fit_ = FitGar(decomposition_, weights_, out, in, moment_, rank).value();
  }
  std::vector<float> weights_;
  std::vector<double> moment_;
  Decomposition decomposition_;
  GarFit fit_;
};

TEST_P(GarTest, EqualsSlicedFactors) {
  const std::vector<double> sliced = Sliced(decomposition_, GetParam());
  const double apart =
      Energy(Difference(MatrixOf(fit_.pair, GetParam()), sliced), GetParam().in, moment_);
  // What int8 leaves of a pair with pivots (methods: 2-4e-2 of the output's length).
  EXPECT_LT(std::sqrt(apart / Energy(sliced, GetParam().in, moment_)), 0.04);
}

TEST_P(GarTest, StatesWhatItLosesAndWhatPlainFactorsDo) {
  const Case& c = GetParam();
  const double energy = Energy({weights_.begin(), weights_.end()}, c.in, moment_);
  const double lost = Energy(Difference(weights_, MatrixOf(fit_.pair, c)), c.in, moment_);
  EXPECT_NEAR(fit_.error, lost / energy, 1e-3 * fit_.error + 1e-9);
  // The best of its rank, and rounding.
  double tail = 0;
  for (size_t k = static_cast<size_t>(c.rank); k < decomposition_.singular_values.size(); ++k) {
    tail += std::pow(decomposition_.singular_values[k], 2);
  }
  EXPECT_GE(fit_.plain_error, 0.999 * tail / energy);
  EXPECT_LT(fit_.plain_error, 1.1 * tail / energy + 1e-3);
  EXPECT_LT(fit_.error, 1.2 * fit_.plain_error + 1e-3);
}

TEST_P(GarTest, HasARowForEveryOutput) {
  std::vector<int32_t> rows = fit_.pair.rows;
  std::sort(rows.begin(), rows.end());
  std::vector<int32_t> all(static_cast<size_t>(GetParam().out));
  std::iota(all.begin(), all.end(), 0);
  EXPECT_EQ(rows, all);
  EXPECT_EQ(fit_.pair.a.rank, GetParam().rank);
  EXPECT_EQ(fit_.pair.bt.size, GetParam().out - GetParam().rank);
}

// Components that are neither orthogonal nor in the order of their size: random ones before those
// of the weight, as a trained term stands.
class GarOfFactorsTest : public GarTest {
 protected:
  GarOfFactorsTest() {
    const auto& [name, out, in, rank, decay, repeats_rows, is_singular] = GetParam();
    std::mt19937_64 random(8);
    std::normal_distribution<float> normal(0, 0.3f);
    const int64_t term = (rank + 3) / 4;
    std::vector<float> a(static_cast<size_t>(term * in)), bt(static_cast<size_t>(term * out));
    for (float& value : a) value = normal(random);
    for (float& value : bt) value = normal(random);
    a.insert(a.end(), decomposition_.a.begin(), decomposition_.a.end());
    bt.insert(bt.end(), decomposition_.bt.begin(), decomposition_.bt.end());
    const int64_t stored = term + decomposition_.rank;
    factors_ = {.a = QuantiseFactor(a, stored, in), .bt = QuantiseFactor(bt, stored, out)};
    fit_ = FitGarToFactors(factors_, weights_, out, in, moment_, rank).value();
    const Decomposition first = {.singular_values = {},
                                 .rank = rank,
                                 .a = DequantiseFactor(factors_.a),
                                 .bt = DequantiseFactor(factors_.bt)};
    product_ = Sliced(first, GetParam());
  }
  FactorPair factors_;
  std::vector<double> product_;
};

TEST_P(GarOfFactorsTest, EqualsTheirProduct) {
  const int64_t in = GetParam().in;
  const double apart = Energy(Difference(MatrixOf(fit_.pair, GetParam()), product_), in, moment_);
  EXPECT_LT(std::sqrt(apart / Energy(product_, in, moment_)), 0.04);
  // Not the weight.
  EXPECT_LT(apart, 0.1 * Energy(Difference(weights_, product_), in, moment_));
}

TEST_P(GarOfFactorsTest, StatesWhatTheyLoseAndWhatItLosesOfThem) {
  const int64_t in = GetParam().in;
  const double energy = Energy({weights_.begin(), weights_.end()}, in, moment_);
  const double lost = Energy(Difference(weights_, product_), in, moment_) / energy;
  const double apart =
      Energy(Difference(MatrixOf(fit_.pair, GetParam()), product_), in, moment_) / energy;
  EXPECT_NEAR(fit_.plain_error, lost, 1e-4 * lost);
  EXPECT_NEAR(fit_.error - fit_.plain_error, apart, 1e-3 * apart + 1e-6 * lost);
}

const auto NameOfCase = [](const auto& info) { return info.param.name; };

INSTANTIATE_TEST_SUITE_P(
    Shapes, GarOfFactorsTest,
    testing::Values(Case{"square", 64, 64, 32}, Case{"of_nine_tenths", 64, 64, 57},
                    Case{"wide", 40, 90, 17}, Case{"tall", 150, 37, 33},
                    Case{"of_one_component", 30, 50, 1}, Case{"all_but_one", 33, 70, 32},
                    Case{"ill_conditioned", 60, 60, 40, 0.7},
                    Case{"of_inputs_that_span_less", 50, 64, 24, 0.9, false, true}),
    NameOfCase);

INSTANTIATE_TEST_SUITE_P(
    Shapes, GarTest,
    testing::Values(Case{"square", 64, 64, 32}, Case{"wide", 40, 90, 17}, Case{"tall", 150, 37, 33},
                    Case{"of_one_component", 30, 50, 1}, Case{"all_but_one", 33, 70, 32},
                    Case{"ill_conditioned", 60, 60, 40, 0.7},
                    Case{"with_equal_first_rows", 64, 64, 16, 1, true},
                    Case{"of_inputs_that_span_less", 50, 64, 24, 0.9, false, true}),
    NameOfCase);

// The energy that the other outputs lose where z is rounded to int8 in groups of 32, scaled by the
// largest scale of each component of B, as share of theirs. Of inputs with variances 1.
double LostByRounding(const GarPair& pair, std::mt19937_64* random) {
  const int64_t rank = pair.a.rank, in = pair.a.size, others = pair.bt.size;
  const std::vector<float> a = DequantiseFactor(pair.a);
  const std::vector<float> bt = DequantiseFactor(pair.bt);
  std::normal_distribution<double> normal;
  double lost = 0;
  double energy = 0;
  for (int sample = 0; sample < 40; ++sample) {
    std::vector<double> x(static_cast<size_t>(in));
    for (double& value : x) value = normal(*random);
    std::vector<double> z, change;
    for (int64_t k = 0; k < rank; ++k) {
      z.push_back(std::inner_product(x.begin(), x.end(), a.begin() + k * in, 0.0));
    }
    for (int64_t first = 0; first < rank; first += kGroupSize) {
      const int64_t end = std::min(rank, first + kGroupSize);
      const auto scale = [&](int64_t k) {
        const auto scales = pair.bt.scales.begin() + k * NumGroups(others);
        return FloatFromBfloat16(*std::max_element(scales, scales + NumGroups(others)));
      };
      double step = 0;
      for (int64_t k = first; k < end; ++k) {
        step = std::max(step, std::abs(z[static_cast<size_t>(k)]) * scale(k) / 127);
      }
      for (int64_t k = first; k < end; ++k) {
        const double exact = z[static_cast<size_t>(k)];
        change.push_back(std::round(exact * scale(k) / step) * step / scale(k) - exact);
      }
    }
    for (int64_t i = 0; i < others; ++i) {
      double exact = 0;
      double off = 0;
      for (int64_t k = 0; k < rank; ++k) {
        exact += bt[static_cast<size_t>(k * others + i)] * z[static_cast<size_t>(k)];
        off += bt[static_cast<size_t>(k * others + i)] * change[static_cast<size_t>(k)];
      }
      energy += exact * exact;
      lost += off * off;
    }
  }
  return lost / energy;
}

FactorCodes Reordered(const FactorCodes& factor, const std::vector<int64_t>& order) {
  const int64_t codes = PaddedToGroup(factor.size), scales = NumGroups(factor.size);
  FactorCodes result = factor;
  for (size_t i = 0; i < order.size(); ++i) {
    const auto to = static_cast<int64_t>(i);
    std::copy_n(factor.codes.begin() + order[i] * codes, codes, result.codes.begin() + to * codes);
    std::copy_n(factor.scales.begin() + order[i] * scales, scales,
                result.scales.begin() + to * scales);
  }
  return result;
}

TEST(Gar, PivotsStandWhereTheyRoundWell) {
  std::mt19937_64 random(9);
  const Case c = {.name = "", .out = 200, .in = 150, .rank = 100, .decay = 0.95};
  std::vector<float> weights = RandomWeights(c, &random);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < c.out; ++i) {  // outputs of many sizes
    const float size = std::exp(1.5f * normal(random));
    for (int64_t j = 0; j < c.in; ++j) weights[static_cast<size_t>(i * c.in + j)] *= size;
  }
  std::vector<double> moment(static_cast<size_t>(c.in * c.in));
  for (int64_t j = 0; j < c.in; ++j) moment[static_cast<size_t>(j * c.in + j)] = 1;
  const Decomposition decomposition = Decompose(weights, c.out, c.in, moment, c.rank).value();
  const GarFit fit = FitGar(decomposition, weights, c.out, c.in, moment, c.rank).value();
  std::vector<int64_t> order(static_cast<size_t>(c.rank));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  const GarPair shuffled = {
      .a = Reordered(fit.pair.a, order), .bt = Reordered(fit.pair.bt, order), .rows = {}};
  EXPECT_LT(1.25 * LostByRounding(fit.pair, &random), LostByRounding(shuffled, &random));
}

TEST(Gar, NoTwoEqualRowsArePivots) {
  std::mt19937_64 random(6);
  const Case c = {.name = "", .out = 40, .in = 40, .rank = 12, .repeats_rows = true};
  const std::vector<float> weights = RandomWeights(c, &random);
  const std::vector<double> moment = RandomMoment(c, &random);
  const Decomposition decomposition = Decompose(weights, c.out, c.in, moment, c.rank).value();
  const GarFit fit = FitGar(decomposition, weights, c.out, c.in, moment, c.rank).value();
  const auto pivots_end = fit.pair.rows.begin() + c.rank;
  EXPECT_LE(
      std::count_if(fit.pair.rows.begin(), pivots_end, [&](int32_t row) { return row < c.rank; }),
      1);
}

TEST(Gar, OfInputsThatAreAlwaysZeroLosesNothing) {
  const std::vector<float> weights(6 * 4, 1.0f);
  const std::vector<double> moment(4 * 4);
  const Decomposition decomposition = Decompose(weights, 6, 4, moment, 2).value();
  const auto fit = FitGar(decomposition, weights, 6, 4, moment, 2);
  ASSERT_TRUE(fit.ok()) << fit.status();
  EXPECT_EQ(fit->error, 0);
  EXPECT_EQ(fit->plain_error, 0);
}

TEST(Gar, OfFactorsThatAreZeroIsZero) {
  std::mt19937_64 random(7);
  const Case c = {.name = "", .out = 20, .in = 30, .rank = 6};
  const std::vector<float> weights = RandomWeights(c, &random);
  const std::vector<double> moment = RandomMoment(c, &random);
  const FactorPair zeros = {.a = QuantiseFactor(std::vector<float>(6 * 30), 6, 30),
                            .bt = QuantiseFactor(std::vector<float>(6 * 20), 6, 20)};
  const auto fit = FitGarToFactors(zeros, weights, c.out, c.in, moment, c.rank);
  ASSERT_TRUE(fit.ok()) << fit.status();
  EXPECT_EQ(Energy(MatrixOf(fit->pair, c), c.in, moment), 0);
  EXPECT_NEAR(fit->error, 1, 1e-6);
}

TEST(Gar, IsTakenFromAQuarterOfTheRankOn) {
  EXPECT_EQ(CheapestPrefix(64, 100, 15, true), (FormAndRank{Form::kPrefix, 15}));
  EXPECT_EQ(CheapestPrefix(64, 100, 16, true), (FormAndRank{Form::kGar, 16}));
  EXPECT_EQ(CheapestPrefix(64, 100, 16, false), (FormAndRank{Form::kPrefix, 16}));
  // A pair of a head saves next to nothing.
  EXPECT_EQ(CheapestPrefix(1000, 64, 60, true), (FormAndRank{Form::kPrefix, 60}));
  EXPECT_EQ(CheapestPrefix(160, 64, 14, true), (FormAndRank{Form::kPrefix, 14}));
  EXPECT_EQ(CheapestPrefix(160, 64, 16, true), (FormAndRank{Form::kGar, 16}));
}

TEST(Gar, RanksReachBeyondBreakEven) {
  EXPECT_EQ(PrefixRanks(576, 576, false).back(), 280);  // 576 / 2 is break-even
  EXPECT_EQ(PrefixRanks(576, 576, true).back(), 512);   // 0.9 * 576 is 518
  EXPECT_EQ(PrefixRanks(576, 576, true).front(), 8);
}

}  // namespace
}  // namespace nestor
