#include "tests/kernels/random_layer.h"

#include <algorithm>
#include <cmath>
#include <random>

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
                     .a = std::vector<int8_t>(rank * PaddedToGroup(in)),
                     .bt = std::vector<int8_t>(rank * PaddedToGroup(out)),
                     .a_scales = std::vector<uint16_t>(rank * NumGroups(in)),
                     .bt_scales = std::vector<uint16_t>(rank * NumGroups(out))};
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
  std::uniform_int_distribution<int> code(-119, 119);
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
    for (uint16_t& scale : scales_) scale = RandomScale(&random);
  }
  residual_ = MakeFactors(shape.residual_rank, out, in, seed + 1);
  prefix_ = MakeFactors(shape.prefix_rank, out, in, seed + 2);
  if (shape.has_bias) {
    bias_.resize(out);
    for (float& value : bias_) value = weight(random);
  }
}

LinearWeights RandomLayer::View() const {
  const auto data = [](const auto& values) { return values.empty() ? nullptr : values.data(); };
  return {.name = "random",
          .out = shape_.out,
          .in = shape_.in,
          .dense_f32 = data(f32_),
          .dense_bf16 = data(bf16_),
          .coarse = data(coarse_),
          .fine = data(fine_),
          .scales = data(scales_),
          .residual = residual_.View(),
          .prefix = prefix_.View(),
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
  return scale * (16 * code(coarse_) + (form == Form::kDense ? code(fine_) : 0));
}

std::vector<double> RandomLayer::Magnitude(Form form, int64_t rank,
                                           std::span<const double> x) const {
  const int64_t in = shape_.in;
  const int64_t out = shape_.out;
  std::vector<double> result(out);
  for (int64_t i = 0; i < out; ++i) {
    if (!bias_.empty()) result[i] = std::abs(bias_[i]);
    if (form == Form::kPrefix) continue;
    for (int64_t j = 0; j < in; ++j) result[i] += std::abs(WeightAt(form, i, j) * x[j]);
  }
  const Factors& factors = form == Form::kPrefix ? prefix_ : residual_;
  for (int64_t k = 0; form != Form::kDense && k < rank; ++k) {
    double z = 0;
    for (int64_t j = 0; j < in; ++j) {
      z += std::abs(FloatFromBfloat16(factors.a_scales[k * NumGroups(in) + j / kGroupSize]) *
                    factors.a[k * PaddedToGroup(in) + j] * x[j]);
    }
    for (int64_t i = 0; i < out; ++i) {
      result[i] +=
          z * std::abs(FloatFromBfloat16(factors.bt_scales[k * NumGroups(out) + i / kGroupSize]) *
                       factors.bt[k * PaddedToGroup(out) + i]);
    }
  }
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
        FloatFromBfloat16(factors.bt_scales[k * NumGroups(shape_.out) + row / kGroupSize]) *
        factors.bt[k * PaddedToGroup(shape_.out) + row]);
  }
  return result;
}

std::vector<double> RandomLayer::RoundingOfZ(Form form, int64_t rank,
                                             std::span<const double> x) const {
  std::vector<double> result(shape_.out);
  if (form == Form::kDense || rank == 0) return result;
  const Factors& factors = form == Form::kPrefix ? prefix_ : residual_;
  const std::vector<double> z = LargestComponents(factors, rank, x);
  for (int64_t i = 0; i < shape_.out; ++i) {
    double largest = 0;
    double codes = 0;
    for (int64_t k = 0; k < rank; ++k) {
      const double scale =
          FloatFromBfloat16(factors.bt_scales[k * NumGroups(shape_.out) + i / kGroupSize]);
      largest = std::max(largest, std::abs(z[k] * scale));
      codes += std::abs(factors.bt[k * PaddedToGroup(shape_.out) + i]);
    }
    result[i] = codes * largest / (2.0 * static_cast<double>(LargestZ(rank)));
  }
  return result;
}

std::vector<double> RandomLayer::RoundingToGroups(Form form, int64_t rank,
                                                  std::span<const double> x) const {
  std::vector<double> result(shape_.out);
  if (form == Form::kDense || rank == 0) return result;
  const Factors& factors = form == Form::kPrefix ? prefix_ : residual_;
  std::vector<double> z = LargestComponents(factors, rank, x);
  std::vector<double> largest(rank);
  const int64_t groups = NumGroups(shape_.out);
  for (int64_t k = 0; k < rank; ++k) {
    for (int64_t g = 0; g < groups; ++g)
      largest[k] =
          std::max<double>(largest[k], FloatFromBfloat16(factors.bt_scales[k * groups + g]));
    z[k] *= largest[k];
  }
  for (int64_t i = 0; i < shape_.out; ++i) {
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
  return result;
}

}  // namespace nestor
