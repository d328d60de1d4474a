#include "compress/quantise.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/bfloat16.h"
#include "base/check.h"
#include "kernels/nested_linear.h"

namespace nestor {
namespace {

constexpr float kLargestCode = 119;  // 16 * 7 + 7: the largest code whose hi stays within 7
constexpr float kSmallestExtremeCode = 103;
constexpr float kExtremeCodeStep = 2;
constexpr float kLargestFactorCode = 127;
constexpr float kCoarseStep = 16;

// Rounds to nearest, ties to even, for |value| < 2^22, in a form that vectorises.
inline float Round(float value) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (value + kMagic) - kMagic;
}

inline float CodeOf(float weight, float scale) {
  return std::clamp(Round(weight / scale), -kLargestCode, kLargestCode);
}

// floor((q + 8) / 16) of an integer q: q / 16 rounded, halves upwards.
inline float HiOf(float code) { return Round((code + 0.5f) / kCoarseStep); }

float AbsMax(const float* values, int64_t size) {
  float largest = 0;
  for (int64_t j = 0; j < size; ++j) largest = std::max(largest, std::fabs(values[j]));
  return largest;
}

uint16_t ScaleFor(float absmax, float extreme_code) {
  return Bfloat16FromFloat(absmax / extreme_code);
}

float CoarseError(const float* weights, const float* energies, int64_t size, float scale) {
  float error = 0;
  for (int64_t j = 0; j < size; ++j) {
    const float difference = weights[j] - kCoarseStep * scale * HiOf(CodeOf(weights[j], scale));
    error += energies[j] * difference * difference;
  }
  return error;
}

uint16_t ChooseScale(const float* weights, const float* energies, int64_t size) {
  const float absmax = AbsMax(weights, size);
  uint16_t best = ScaleFor(absmax, kLargestCode);
  if (energies == nullptr || FloatFromBfloat16(best) == 0) return best;
  float least = std::numeric_limits<float>::infinity();
  for (float code = kLargestCode; code >= kSmallestExtremeCode; code -= kExtremeCodeStep) {
    const uint16_t scale = ScaleFor(absmax, code);
    const float error = CoarseError(weights, energies, size, FloatFromBfloat16(scale));
    if (error < least) {
      least = error;
      best = scale;
    }
  }
  return best;
}

int NibbleAt(const std::vector<uint8_t>& plane, int64_t index) {
  const int byte = plane[static_cast<size_t>(index / 2)];
  return (index % 2 == 0 ? byte & 15 : byte >> 4) - 8;
}

template <typename Combine>
std::vector<float> Dequantise(const Planes& planes, Combine combine) {
  std::vector<float> values(static_cast<size_t>(planes.out * planes.in));
  const int64_t padded = PaddedToGroup(planes.in);
  const int64_t groups = NumGroups(planes.in);
  for (int64_t i = 0; i < planes.out; ++i) {
    for (int64_t j = 0; j < planes.in; ++j) {
      const float scale =
          FloatFromBfloat16(planes.scales[static_cast<size_t>(i * groups + j / kGroupSize)]);
      values[static_cast<size_t>(i * planes.in + j)] = scale * combine(i * padded + j);
    }
  }
  return values;
}

}  // namespace

SplitCode Split(int code) {
  const int hi = (code + 8) >> 4;
  return {hi, code - 16 * hi};
}

Planes QuantisePlanes(std::span<const float> weights, int64_t out, int64_t in,
                      std::span<const float> input_energies) {
  NESTOR_CHECK(static_cast<int64_t>(weights.size()) == out * in);
  NESTOR_CHECK(input_energies.empty() || static_cast<int64_t>(input_energies.size()) == in);
  constexpr uint8_t kZeroPair = 0x88;
  const int64_t groups = NumGroups(in);
  const size_t plane_bytes = static_cast<size_t>(out * PaddedToGroup(in) / 2);
  Planes planes{.out = out,
                .in = in,
                .coarse = std::vector<uint8_t>(plane_bytes, kZeroPair),
                .fine = std::vector<uint8_t>(plane_bytes, kZeroPair),
                .scales = std::vector<uint16_t>(static_cast<size_t>(out * groups))};
  for (int64_t i = 0; i < out; ++i) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * kGroupSize;
      const int64_t size = std::min(kGroupSize, in - begin);
      const float* const group = weights.data() + i * in + begin;
      const uint16_t scale_bits = ChooseScale(
          group, input_energies.empty() ? nullptr : input_energies.data() + begin, size);
      planes.scales[static_cast<size_t>(i * groups + g)] = scale_bits;
      const float scale = FloatFromBfloat16(scale_bits);
      if (scale == 0) continue;
      uint8_t* const coarse = planes.coarse.data() + (i * groups + g) * (kGroupSize / 2);
      uint8_t* const fine = planes.fine.data() + (i * groups + g) * (kGroupSize / 2);
      for (int64_t j = 0; j < size; ++j) {
        const auto [hi, lo] = Split(static_cast<int>(CodeOf(group[j], scale)));
        const int shift = j % 2 == 0 ? 0 : 4;
        const int kept = 0xf0 >> shift;
        coarse[j / 2] = static_cast<uint8_t>((coarse[j / 2] & kept) | ((hi + 8) << shift));
        fine[j / 2] = static_cast<uint8_t>((fine[j / 2] & kept) | ((lo + 8) << shift));
      }
    }
  }
  return planes;
}

std::vector<float> DequantiseCoarse(const Planes& planes) {
  return Dequantise(planes, [&](int64_t index) {
    return kCoarseStep * static_cast<float>(NibbleAt(planes.coarse, index));
  });
}

std::vector<float> DequantiseDense(const Planes& planes) {
  return Dequantise(planes, [&](int64_t index) {
    return kCoarseStep * static_cast<float>(NibbleAt(planes.coarse, index)) +
           static_cast<float>(NibbleAt(planes.fine, index));
  });
}

FactorCodes QuantiseFactor(std::span<const float> values, int64_t rank, int64_t size) {
  NESTOR_CHECK(static_cast<int64_t>(values.size()) == rank * size);
  const int64_t groups = NumGroups(size);
  FactorCodes factor{.rank = rank,
                     .size = size,
                     .codes = std::vector<int8_t>(static_cast<size_t>(rank * PaddedToGroup(size))),
                     .scales = std::vector<uint16_t>(static_cast<size_t>(rank * groups))};
  for (int64_t k = 0; k < rank; ++k) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * kGroupSize;
      const int64_t count = std::min(kGroupSize, size - begin);
      const float* const group = values.data() + k * size + begin;
      const uint16_t scale_bits = ScaleFor(AbsMax(group, count), kLargestFactorCode);
      factor.scales[static_cast<size_t>(k * groups + g)] = scale_bits;
      const float scale = FloatFromBfloat16(scale_bits);
      if (scale == 0) continue;
      int8_t* const codes = factor.codes.data() + k * PaddedToGroup(size) + begin;
      for (int64_t j = 0; j < count; ++j) {
        codes[j] = static_cast<int8_t>(
            std::clamp(Round(group[j] / scale), -kLargestFactorCode, kLargestFactorCode));
      }
    }
  }
  return factor;
}

std::vector<float> DequantiseFactor(const FactorCodes& factor) {
  std::vector<float> values(static_cast<size_t>(factor.rank * factor.size));
  for (int64_t k = 0; k < factor.rank; ++k) {
    for (int64_t j = 0; j < factor.size; ++j) {
      const int code = factor.codes[static_cast<size_t>(k * PaddedToGroup(factor.size) + j)];
      const uint16_t scale =
          factor.scales[static_cast<size_t>(k * NumGroups(factor.size) + j / kGroupSize)];
      values[static_cast<size_t>(k * factor.size + j)] =
          FloatFromBfloat16(scale) * static_cast<float>(code);
    }
  }
  return values;
}

}  // namespace nestor
