#include "compress/quantise.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "base/bfloat16.h"
#include "base/check.h"
#include "compress/error_feedback.h"
#include "kernels/nested_linear.h"

namespace nestor {
namespace {

constexpr float kLargestCode = 119;    // 16 * 7 + 7
constexpr float kSmallestCode = -128;  // 16 * -8
constexpr float kSmallestHi = -8;
constexpr float kLargestHi = 7;
constexpr float kLargestLo = 7;
// Codes that a group's extreme weight may get: beyond the outermost ones it is clipped.
constexpr std::pair<float, float> kExtremeCodes[] = {{95, 125}, {-134, -103}};
constexpr float kExtremeCodeStep = 3;
// What the full level's error weighs beside the coarse plane's when a scale is chosen.
constexpr float kFullErrorWeight = 16;
// How far, in fine steps, a weight may be from the nearest of its full codes where error feedback
// wants its coarse code to be the other neighbour.
constexpr float kSlack = 1;
constexpr float kLargestFactorCode = 127;
constexpr float kCoarseStep = 16;
constexpr float kMiddleStep = 4;
constexpr float kLargestMid = 3;
constexpr float kMidOffset = 1.5;  // of the zero between its four codes
constexpr float kLeastMidOfSmallestHi = 2;

// Rounds to nearest, ties to even, for |value| < 2^22, in a form that vectorises.
inline float Round(float value) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (value + kMagic) - kMagic;
}

inline float CodeOf(float weight, float scale) {
  return std::clamp(Round(weight / scale), kSmallestCode, kLargestCode);
}

// floor((q + 8) / 16) of an integer q: q / 16 rounded, halves upwards.
inline float HiOf(float code) { return Round((code + 0.5f) / kCoarseStep); }

// The hi nearest to `wanted` of those that leave a lo to `weight` that is not far from it.
float HiWithin(float weight, float wanted, float scale) {
  const float code = weight / scale;
  const float reach = 0.5f + kSlack;
  const float least = std::ceil((code - kLargestLo - reach) / kCoarseStep);
  const float most = std::floor((code + kLargestLo + 1 + reach) / kCoarseStep);
  const float hi = std::clamp(Round(wanted / (kCoarseStep * scale)), least, most);
  return std::clamp(hi, kSmallestHi, kLargestHi);
}

// The lo for `wanted`, beside `hi`.
float LoBeside(float hi, float wanted, float scale) {
  const float least = std::max(kSmallestCode - kCoarseStep * hi, -kLargestLo - 1);
  return std::clamp(Round(wanted / scale), least, kLargestLo);
}

// The mid for `wanted`, beside `hi`: no code of the sum may be below the smallest either.
float MidBeside(float hi, float wanted, float scale) {
  const float least = hi == kSmallestHi ? kLeastMidOfSmallestHi : 0.0f;
  return std::clamp(Round(wanted / (kMiddleStep * scale) + kMidOffset), least, kLargestMid);
}

// The value of largest magnitude, with its sign.
float Extreme(const float* values, int64_t size) {
  float extreme = 0;
  for (int64_t j = 0; j < size; ++j) {
    if (std::fabs(values[j]) > std::fabs(extreme)) extreme = values[j];
  }
  return extreme;
}

uint16_t ScaleFor(float extreme, float extreme_code) {
  return Bfloat16FromFloat(extreme / extreme_code);
}

// Of the coarse plane and of both, weighted by energies.
float PlanesError(const float* weights, const float* energies, int64_t size, float scale) {
  const float inverse = 1 / scale;
  float coarse = 0;
  float full = 0;
  for (int64_t j = 0; j < size; ++j) {
    const float wanted = weights[j] * inverse;
    const float code = std::clamp(Round(wanted), kSmallestCode, kLargestCode);
    const float coarse_difference = wanted - kCoarseStep * HiOf(code);
    const float full_difference = wanted - code;
    coarse += energies[j] * coarse_difference * coarse_difference;
    full += energies[j] * full_difference * full_difference;
  }
  return scale * scale * (coarse + kFullErrorWeight * full);
}

uint16_t ChooseScale(const float* weights, const float* energies, int64_t size) {
  const float extreme = Extreme(weights, size);
  uint16_t best = ScaleFor(std::fabs(extreme), kLargestCode);
  if (energies == nullptr || FloatFromBfloat16(best) == 0) return best;
  float least = std::numeric_limits<float>::infinity();
  for (const auto& [first, last] : kExtremeCodes) {
    for (float code = first; code <= last; code += kExtremeCodeStep) {
      const uint16_t scale = ScaleFor(extreme, code);
      const float error = PlanesError(weights, energies, size, FloatFromBfloat16(scale));
      if (error < least) {
        least = error;
        best = scale;
      }
    }
  }
  return best;
}

int NibbleAt(const std::vector<uint8_t>& plane, int64_t index) {
  const int byte = plane[static_cast<size_t>(index / 2)];
  return (index % 2 == 0 ? byte & 15 : byte >> 4) - 8;
}

void StoreNibble(int64_t index, float code, std::vector<uint8_t>* plane) {
  const int shift = index % 2 == 0 ? 0 : 4;
  uint8_t& pair = (*plane)[static_cast<size_t>(index / 2)];
  pair = static_cast<uint8_t>((pair & (0xf0 >> shift)) | ((static_cast<int>(code) + 8) << shift));
}

int MidAt(const std::vector<uint8_t>& plane, int64_t index) {
  return plane[static_cast<size_t>(index / 4)] >> (2 * (index % 4)) & 3;
}

// Replaces `values` [out, in] by what `round` makes of them, with feedback if there is any.
template <typename Round>
void RoundAll(std::vector<float>* values, int64_t out, int64_t in, const ErrorFeedback* feedback,
              Round round) {
  if (feedback != nullptr) {
    feedback->Round(values->data(), out, round);
    return;
  }
  for (int64_t i = 0; i < out; ++i) {
    for (int64_t j = 0; j < in; ++j) {
      float& value = (*values)[static_cast<size_t>(i * in + j)];
      value = round(i, j, value);
    }
  }
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
                      std::span<const float> input_energies, const ErrorFeedback* feedback) {
  NESTOR_CHECK(static_cast<int64_t>(weights.size()) == out * in);
  NESTOR_CHECK(input_energies.empty() || static_cast<int64_t>(input_energies.size()) == in);
  constexpr uint8_t kZeroPair = 0x88;
  const int64_t padded = PaddedToGroup(in);
  const int64_t groups = NumGroups(in);
  const size_t plane_bytes = static_cast<size_t>(out * padded / 2);
  Planes planes{.out = out,
                .in = in,
                .coarse = std::vector<uint8_t>(plane_bytes, kZeroPair),
                .fine = std::vector<uint8_t>(plane_bytes, kZeroPair),
                .middle = std::vector<uint8_t>(plane_bytes / 2),
                .scales = std::vector<uint16_t>(static_cast<size_t>(out * groups))};
  for (int64_t i = 0; i < out; ++i) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * kGroupSize;
      planes.scales[static_cast<size_t>(i * groups + g)] =
          ChooseScale(weights.data() + i * in + begin,
                      input_energies.empty() ? nullptr : input_energies.data() + begin,
                      std::min(kGroupSize, in - begin));
    }
  }
  const auto scale_at = [&](int64_t i, int64_t j) {
    return FloatFromBfloat16(planes.scales[static_cast<size_t>(i * groups + j / kGroupSize)]);
  };
  std::vector<float> values(weights.begin(), weights.end());
  RoundAll(&values, out, in, feedback, [&](int64_t i, int64_t j, float wanted) {
    const float scale = scale_at(i, j);
    if (scale == 0) return 0.0f;
    const float weight = weights[static_cast<size_t>(i * in + j)];
    const float hi =
        feedback == nullptr ? HiOf(CodeOf(wanted, scale)) : HiWithin(weight, wanted, scale);
    StoreNibble(i * padded + j, hi, &planes.coarse);
    return kCoarseStep * scale * hi;
  });
  for (size_t k = 0; k < values.size(); ++k) values[k] = weights[k] - values[k];
  std::vector<float> left_out = values;
  RoundAll(&left_out, out, in, feedback, [&](int64_t i, int64_t j, float wanted) {
    const float scale = scale_at(i, j);
    if (scale == 0) return 0.0f;
    const int64_t index = i * padded + j;
    const auto hi = static_cast<float>(NibbleAt(planes.coarse, index));
    const float mid = MidBeside(hi, wanted, scale);
    planes.middle[static_cast<size_t>(index / 4)] |=
        static_cast<uint8_t>(static_cast<int>(mid) << (2 * (index % 4)));
    return kMiddleStep * scale * (mid - kMidOffset);
  });
  RoundAll(&values, out, in, feedback, [&](int64_t i, int64_t j, float wanted) {
    const float scale = scale_at(i, j);
    if (scale == 0) return 0.0f;
    const auto hi = static_cast<float>(NibbleAt(planes.coarse, i * padded + j));
    const float lo = LoBeside(hi, wanted, scale);
    StoreNibble(i * padded + j, lo, &planes.fine);
    return scale * lo;
  });
  return planes;
}

std::vector<float> DequantiseCoarse(const Planes& planes) {
  return Dequantise(planes, [&](int64_t index) {
    return kCoarseStep * static_cast<float>(NibbleAt(planes.coarse, index));
  });
}

std::vector<float> DequantiseMiddle(const Planes& planes) {
  return Dequantise(planes, [&](int64_t index) {
    return kCoarseStep * static_cast<float>(NibbleAt(planes.coarse, index)) +
           kMiddleStep * (static_cast<float>(MidAt(planes.middle, index)) - kMidOffset);
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
      const uint16_t scale_bits = ScaleFor(std::fabs(Extreme(group, count)), kLargestFactorCode);
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
