#include "tests/kernels/random_layer.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <utility>

#include "base/bfloat16.h"
#include "kernels/cpu/kernels.h"

namespace nestor {
namespace {

uint16_t RandomScale(std::mt19937* random) {
  return Bfloat16FromFloat(std::uniform_real_distribution<float>(0.002f, 0.02f)(*random));
}

}  // namespace

FactorView RandomLayer::Factors::View() const {
  return {.max_rank = rank,
          .a = a.data(),
          .a_scales = a_scales.data(),
          .bt = bt.data(),
          .bt_scales = bt_scales.data()};
}

RandomLayer::Factors RandomLayer::MakeFactors(int64_t rank, int64_t out, int64_t in,
                                              uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> code(-127, 127);
  Factors factors = {.rank = rank,
                     .out = out,
                     .a = std::vector<int8_t>(rank * PaddedToGroup(in)),
                     .bt = std::vector<int8_t>(rank * PaddedToGroup(out)),
                     .a_scales = std::vector<uint16_t>(rank * NumGroups(in)),
                     .bt_scales = std::vector<uint16_t>(rank * NumGroups(out)),
                     .rows = {}};
  for (int64_t k = 0; k < rank; ++k) {
    for (int64_t j = 0; j < in; ++j)
      factors.a[k * PaddedToGroup(in) + j] = static_cast<int8_t>(code(random));
    for (int64_t i = 0; i < out; ++i)
      factors.bt[k * PaddedToGroup(out) + i] = static_cast<int8_t>(code(random));
  }
  for (uint16_t& scale : factors.a_scales) scale = RandomScale(&random);
  for (uint16_t& scale : factors.bt_scales) scale = RandomScale(&random);
  return factors;
}

RandomLayer::RandomLayer(const Shape& shape, uint32_t seed) : shape_(shape) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> weight(-1.0f, 1.0f);
  std::uniform_int_distribution<int> code(-128, 119);
  const int64_t out = shape.out;
  const int64_t in = shape.in;
  if (shape.dense == DenseStorage::kF32) {
    f32_.resize(out * in);
    for (float& value : f32_) value = weight(random);
  }
  if (shape.dense == DenseStorage::kBf16) {
    bf16_.resize(out * in);
    for (uint16_t& value : bf16_) value = Bfloat16FromFloat(weight(random));
  }
  if (shape.dense == DenseStorage::kPlanes || shape.has_coarse) {
    const int64_t row_bytes = PaddedToGroup(in) / 2;
    coarse_.assign(out * row_bytes, 0x88);
    if (shape.dense == DenseStorage::kPlanes) fine_.assign(out * row_bytes, 0x88);
    for (int64_t i = 0; i < out; ++i) {
      for (int64_t j = 0; j < in; ++j) {
        const int q = code(random);
        const int hi = (q + 8 + 128) / 16 - 8;
        const int lo = q - 16 * hi;
        const auto set = [&](std::vector<uint8_t>* plane, int value) {
          uint8_t& byte = (*plane)[i * row_bytes + j / 2];
          byte = static_cast<uint8_t>(j % 2 == 0 ? (byte & 0xf0) | value
                                                 : (byte & 0x0f) | (value << 4));
        };
        set(&coarse_, hi + 8);
        if (!fine_.empty()) set(&fine_, lo + 8);
      }
    }
    scales_.resize(out * NumGroups(in));
    // Those of planes may be negative.
    for (uint16_t& scale : scales_) {
      scale = RandomScale(&random);
      if (random() % 2 == 0) scale |= 0x8000;
    }
  }
  if (shape.has_middle) {
    // Padding is random as well: it meets inputs that are zeros.
    middle_.resize(out * PaddedToGroup(in) / 4);
    for (uint8_t& byte : middle_) byte = static_cast<uint8_t>(random());
    for (int64_t i = 0; i < out; ++i) {
      for (int64_t j = 0; j < in; ++j) {
        const uint8_t pair = coarse_[i * (PaddedToGroup(in) / 2) + j / 2];
        const bool is_smallest = (j % 2 == 0 ? pair & 0x0f : pair >> 4) == 0;
        if (is_smallest) middle_[i * (PaddedToGroup(in) / 4) + j / 4] |= 2 << (2 * (j % 4));
      }
    }
  }
  residual_ = MakeFactors(shape.residual_rank, out, in, seed + 1);
  prefix_ = MakeFactors(shape.prefix_rank, out, in, seed + 2);
  for (const int64_t rank : shape.gar_ranks) {
    Factors& pair = gar_.emplace_back(
        MakeFactors(rank, out - rank, in, seed + 3 + static_cast<uint32_t>(rank)));
    pair.rows.resize(out);
    std::iota(pair.rows.begin(), pair.rows.end(), 0);
    std::shuffle(pair.rows.begin(), pair.rows.end(), random);
  }
  if (shape.has_bias) {
    bias_.resize(out);
    for (float& value : bias_) value = weight(random);
  }
}

LinearWeights RandomLayer::View() const {
  const auto data = [](const auto& values) { return values.empty() ? nullptr : values.data(); };
  std::vector<GarView> gar;
  for (const Factors& pair : gar_)
    gar.push_back({.factors = pair.View(), .rows = pair.rows.data()});
  return {.name = "random",
          .out = shape_.out,
          .in = shape_.in,
          .dense_f32 = data(f32_),
          .dense_bf16 = data(bf16_),
          .coarse = data(coarse_),
          .fine = data(fine_),
          .middle = data(middle_),
          .scales = data(scales_),
          .residual = residual_.View(),
          .prefix = prefix_.View(),
          .gar = std::move(gar),
          .bias = data(bias_),
          .float_activations = shape_.float_activations};
}

double RandomLayer::WeightAt(Form form, int64_t row, int64_t col) const {
  if (form == Form::kDense && !f32_.empty()) return f32_[row * shape_.in + col];
  if (form == Form::kDense && !bf16_.empty())
    return FloatFromBfloat16(bf16_[row * shape_.in + col]);
  const auto code = [&](const std::vector<uint8_t>& plane) {
    const uint8_t byte = plane[row * (PaddedToGroup(shape_.in) / 2) + col / 2];
    return (col % 2 == 0 ? byte & 0x0f : byte >> 4) - 8;
  };
  const double scale = FloatFromBfloat16(scales_[row * NumGroups(shape_.in) + col / kGroupSize]);
  int below = 0;  // the coarse plane
  if (form == Form::kDense) below = code(fine_);
  if (form == Form::kMiddle) {
    const uint8_t byte = middle_[row * (PaddedToGroup(shape_.in) / 4) + col / 4];
    below = 4 * (byte >> (2 * (col % 4)) & 3) - 6;
  }
  return scale * (16 * code(coarse_) + below);
}

const RandomLayer::Factors& RandomLayer::FactorsOf(Form form, int64_t rank) const {
  if (form == Form::kResidual) return residual_;
  if (form == Form::kPrefix) return prefix_;
  return *std::find_if(gar_.begin(), gar_.end(),
                       [&](const Factors& pair) { return pair.rank == rank; });
}

std::vector<double> RandomLayer::InOrder(const Factors& factors,
                                         const std::vector<double>& values) const {
  if (factors.rows.empty()) return values;
  std::vector<double> result(shape_.out);
  for (size_t i = 0; i < values.size(); ++i) result[factors.rows[factors.rank + i]] = values[i];
  return result;
}

std::vector<double> RandomLayer::Magnitude(Form form, int64_t rank,
                                           std::span<const double> x) const {
  std::vector<double> result(shape_.out);
  for (int64_t i = 0; i < shape_.out; ++i) {
    if (!bias_.empty()) result[i] = std::abs(bias_[i]);
    if (form == Form::kPrefix || form == Form::kGar) continue;
    for (int64_t j = 0; j < shape_.in; ++j) result[i] += std::abs(WeightAt(form, i, j) * x[j]);
  }
  if (rank == 0) return result;
  const Factors& factors = FactorsOf(form, rank);
  const std::vector<double> z = LargestComponents(factors, rank, x);
  std::vector<double> products(factors.out);
  for (int64_t i = 0; i < factors.out; ++i) {
    const std::vector<double> b = RowOfB(factors, rank, i);
    for (int64_t k = 0; k < rank; ++k) products[i] += z[k] * b[k];
  }
  products = InOrder(factors, products);
  for (int64_t i = 0; i < shape_.out; ++i) result[i] += products[i];
  for (int64_t k = 0; k < rank && form == Form::kGar; ++k) result[factors.rows[k]] += z[k];
  return result;
}

std::vector<double> RandomLayer::LargestComponents(const Factors& factors, int64_t rank,
                                                   std::span<const double> x) const {
  std::vector<double> z(rank);
  for (int64_t k = 0; k < rank; ++k) {
    for (int64_t j = 0; j < shape_.in; ++j) {
      z[k] +=
          std::abs(FloatFromBfloat16(factors.a_scales[k * NumGroups(shape_.in) + j / kGroupSize]) *
                   factors.a[k * PaddedToGroup(shape_.in) + j] * x[j]);
    }
  }
  return z;
}

std::vector<double> RandomLayer::RowOfB(const Factors& factors, int64_t rank, int64_t row) const {
  std::vector<double> result(rank);
  for (int64_t k = 0; k < rank; ++k) {
    result[k] = std::abs(
        FloatFromBfloat16(factors.bt_scales[k * NumGroups(factors.out) + row / kGroupSize]) *
        factors.bt[k * PaddedToGroup(factors.out) + row]);
  }
  return result;
}

std::vector<double> RandomLayer::RoundingOfZ(Form form, int64_t rank,
                                             std::span<const double> x) const {
  if (rank == 0) return std::vector<double>(shape_.out);
  const Factors& factors = FactorsOf(form, rank);
  std::vector<double> result(factors.out);
  const std::vector<double> z = LargestComponents(factors, rank, x);
  for (int64_t i = 0; i < factors.out; ++i) {
    double largest = 0;
    double codes = 0;
    for (int64_t k = 0; k < rank; ++k) {
      const double scale =
          FloatFromBfloat16(factors.bt_scales[k * NumGroups(factors.out) + i / kGroupSize]);
      largest = std::max(largest, std::abs(z[k] * scale));
      codes += std::abs(factors.bt[k * PaddedToGroup(factors.out) + i]);
    }
    result[i] = codes * largest / (2.0 * static_cast<double>(LargestZ(rank)));
  }
  return InOrder(factors, result);
}

std::vector<double> RandomLayer::RoundingToGroups(Form form, int64_t rank,
                                                  std::span<const double> x) const {
  if (rank == 0) return std::vector<double>(shape_.out);
  const Factors& factors = FactorsOf(form, rank);
  std::vector<double> result(factors.out);
  std::vector<double> z = LargestComponents(factors, rank, x);
  std::vector<double> largest(rank);
  const int64_t groups = NumGroups(factors.out);
  for (int64_t k = 0; k < rank; ++k) {
    for (int64_t g = 0; g < groups; ++g)
      largest[k] =
          std::max<double>(largest[k], FloatFromBfloat16(factors.bt_scales[k * groups + g]));
    z[k] *= largest[k];
  }
  for (int64_t i = 0; i < factors.out; ++i) {
    const std::vector<double> b = RowOfB(factors, rank, i);
    for (int64_t begin = 0; begin < rank; begin += kGroupSize) {
      const int64_t end = std::min(begin + kGroupSize, rank);
      const double z_step = *std::max_element(z.begin() + begin, z.begin() + end) / 254;
      // Ratios of scales are rounded as well, to 2^-15.
      constexpr double kCodeStep = 0.51;
      for (int64_t k = begin; k < end; ++k)
        result[i] += z_step * (b[k] / largest[k] + kCodeStep) + kCodeStep * z[k];
    }
  }
  return InOrder(factors, result);
}

}  // namespace nestor
