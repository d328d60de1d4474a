#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/nested_linear.h"

namespace nestor {

// A nested layer with random contents, and what its forms mean in plain double arithmetic.
class RandomLayer {
 public:
  struct Shape {
    int64_t out = 0;
    int64_t in = 0;
    DenseStorage dense = DenseStorage::kPlanes;
    bool has_coarse = true;  // beside a bf16 dense form; planes always have one
    bool has_middle = false;
    int64_t residual_rank = 0;
    int64_t prefix_rank = 0;
    std::vector<int64_t> gar_ranks = {};
    bool has_bias = false;
    bool float_activations = false;
  };
  RandomLayer(const Shape& shape, uint32_t seed);

  const Shape& shape() const { return shape_; }
  LinearWeights View() const;

  // For one row x: the sum over everything that adds up to y of its magnitude. Rounding errors of
  // any order of summation are bounded by a multiple of it.
  std::vector<double> Magnitude(Form form, int64_t rank, std::span<const double> x) const;

  // What rounding z times the scales of B to integers of at most LargestZ(rank) may add to an
  // error: half a step for every component, at the largest magnitude that z can have.
  std::vector<double> RoundingOfZ(Form form, int64_t rank, std::span<const double> x) const;

  // What rounding z times the largest scale of each component to int8 in groups of 32 may add, and
  // codes of B times their own scale over that: half a step of each at the other's magnitude.
  std::vector<double> RoundingToGroups(Form form, int64_t rank, std::span<const double> x) const;

 private:
  struct Factors {
    int64_t rank = 0;
    int64_t out = 0;
    std::vector<int8_t> a, bt;
    std::vector<uint16_t> a_scales, bt_scales;
    std::vector<int32_t> rows;  // of a gar pair
    FactorView View() const;
  };
  static Factors MakeFactors(int64_t rank, int64_t out, int64_t in, uint32_t seed);
  const Factors& FactorsOf(Form form, int64_t rank) const;
  // What belongs to outputs of B, in the layer's order of outputs; pivots have 0.
  std::vector<double> InOrder(const Factors& factors, const std::vector<double>& values) const;
  // |A| |x|, and the magnitudes of a row of B.
  std::vector<double> LargestComponents(const Factors& factors, int64_t rank,
                                        std::span<const double> x) const;
  std::vector<double> RowOfB(const Factors& factors, int64_t rank, int64_t row) const;
  double WeightAt(Form form, int64_t row, int64_t col) const;

  Shape shape_;
  std::vector<float> f32_;
  std::vector<uint16_t> bf16_;
  std::vector<uint8_t> coarse_, fine_, middle_;
  std::vector<uint16_t> scales_;
  Factors residual_, prefix_;
  std::vector<Factors> gar_;
  std::vector<float> bias_;
};

}  // namespace nestor
