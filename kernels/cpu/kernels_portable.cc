// Every kernel as plain loops over the packed layout: what machines without AVX2 run, and the
// second opinion on the vector forms.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/bfloat16.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/middle_plane.h"
#include "kernels/nested_linear.h"

namespace nestor {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kCodeBytes = 4 * kLineBytes;

void Quantise(const float* x, int64_t n, int8_t* codes, float* scales, int32_t* offsets) {
  for (int64_t g = 0; g < NumGroups(n); ++g) {
    const int64_t begin = g * kGroupSize;
    const int64_t end = std::min(begin + kGroupSize, n);
    float largest = 0;
    bool is_finite = true;
    for (int64_t j = begin; j < end; ++j) {
      is_finite = is_finite && std::isfinite(x[j]);
      largest = std::max(largest, std::fabs(x[j]));
    }
    std::memset(codes + begin, 0, kGroupSize);
    offsets[g] = 0;
    scales[g] = is_finite ? largest / 127.0f : std::numeric_limits<float>::quiet_NaN();
    if (!is_finite || largest < 1e-30f) continue;
    const float inverse = 1.0f / scales[g];
    for (int64_t j = begin; j < end; ++j) {
      codes[j] = static_cast<int8_t>(std::nearbyint(x[j] * inverse));
      offsets[g] -= 128 * codes[j];
    }
  }
}

// The 32 codes of output o in one group, as stored (plus 8).
void CodesOf(const uint8_t* group, int64_t o, int32_t* codes) {
  for (int64_t line = 0; line < 4; ++line) {
    for (int64_t i = 0; i < 4; ++i) {
      const uint8_t byte = group[line * kLineBytes + 4 * o + i];
      codes[4 * line + i] = byte & 0x0f;
      codes[kGroupSize / 2 + 4 * line + i] = byte >> 4;
    }
  }
}

// 16 hi (+ lo) of output o in group g, and its scale.
float WeightsOf(const uint8_t* coarse, const uint8_t* fine, int64_t g, int64_t o,
                int32_t* weights) {
  const uint8_t* group = coarse + g * kCoarseGroupBytes;
  CodesOf(group, o, weights);
  for (int64_t j = 0; j < kGroupSize; ++j) weights[j] = 16 * weights[j] - 128;
  if (fine != nullptr) {
    int32_t lo[kGroupSize];
    CodesOf(fine + g * kFineGroupBytes, o, lo);
    for (int64_t j = 0; j < kGroupSize; ++j) weights[j] += lo[j] - 8;
  }
  uint16_t bits;
  std::memcpy(&bits, group + kCodeBytes + 2 * o, 2);
  return FloatFromBfloat16(bits);
}

void Planes(const uint8_t* coarse, const uint8_t* fine, int64_t groups, const QuantisedRow* rows,
            int num_rows, float* out) {
  for (int i = 0; i < num_rows; ++i)
    std::fill_n(out + rows[i].index * kUnitOutputs, kPanelOutputs, 0.0f);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t o = 0; o < kPanelOutputs; ++o) {
      int32_t weights[kGroupSize];
      const float scale = WeightsOf(coarse, fine, g, o, weights);
      for (int i = 0; i < num_rows; ++i) {
        const int8_t* codes = rows[i].codes + g * kGroupSize;
        int32_t dot = 0;
        for (int64_t j = 0; j < kGroupSize; ++j) dot += weights[j] * codes[j];
        out[rows[i].index * kUnitOutputs + o] +=
            static_cast<float>(dot) * (scale * rows[i].scales[g]);
      }
    }
  }
}

void FactorA(const int8_t* a, const uint16_t* scales, int64_t groups, const QuantisedRow* rows,
             int num_rows, float* z) {
  for (int i = 0; i < num_rows; ++i) {
    float sum = 0;
    for (int64_t g = 0; g < groups; ++g) {
      int32_t dot = 0;
      for (int64_t j = g * kGroupSize; j < (g + 1) * kGroupSize; ++j)
        dot += a[j] * rows[i].codes[j];
      sum += static_cast<float>(dot) * (FloatFromBfloat16(scales[g]) * rows[i].scales[g]);
    }
    z[i] = sum;
  }
}

// Component k of output o in a B panel.
int8_t ComponentOf(const int8_t* panel, int64_t k, int64_t o) {
  return panel[k / 2 * 2 * kUnitOutputs + 2 * o + k % 2];
}

void FactorB(const int8_t* panel, const int8_t* /*next*/, const uint16_t* scales, int64_t rank,
             const FloatRow* rows, int num_rows, float* scratch, float* out) {
  const auto limit = static_cast<float>(LargestZ(rank));
  for (int i = 0; i < num_rows; ++i) {
    float largest = 0;
    bool is_finite = true;
    for (int64_t k = 0; k < rank; ++k) {
      scratch[k] = FloatFromBfloat16(scales[k]) * rows[i].values[k];
      is_finite = is_finite && std::isfinite(scratch[k]);
      largest = std::max(largest, std::fabs(scratch[k]));
    }
    float* row = out + rows[i].index * kUnitOutputs;
    if (!is_finite) {
      std::fill_n(row, kUnitOutputs, std::numeric_limits<float>::quiet_NaN());
      continue;
    }
    if (largest < 1e-30f) continue;
    int32_t sums[kUnitOutputs] = {};
    for (int64_t k = 0; k < rank; ++k) {
      const auto z = static_cast<int32_t>(std::nearbyint(scratch[k] * (limit / largest)));
      for (int64_t o = 0; o < kUnitOutputs; ++o) sums[o] += z * ComponentOf(panel, k, o);
    }
    for (int64_t o = 0; o < kUnitOutputs; ++o)
      row[o] += static_cast<float>(sums[o]) * (largest / limit);
  }
}

float Bf16At(const uint16_t* row, int64_t o) { return FloatFromBfloat16(row[2 * (o % 8) + o / 8]); }

void Bf16Panel(const uint16_t* panel, int64_t n, const FloatRow* rows, int num_rows, float* out) {
  for (int i = 0; i < num_rows; ++i) {
    float sums[kPanelOutputs] = {};
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t o = 0; o < kPanelOutputs; ++o)
        sums[o] += Bf16At(panel + j * kPanelOutputs, o) * rows[i].values[j];
    }
    std::copy_n(sums, kPanelOutputs, out + rows[i].index * kUnitOutputs);
  }
}

float Dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += a[j] * b[j];
  return sum;
}

void PanelFromPlanes(const uint8_t* coarse, const uint8_t* fine, int64_t groups, float* panel) {
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t o = 0; o < kPanelOutputs; ++o) {
      int32_t weights[kGroupSize];
      const float scale = WeightsOf(coarse, fine, g, o, weights);
      for (int64_t j = 0; j < kGroupSize; ++j)
        panel[(g * kGroupSize + j) * kPanelOutputs + o] = scale * static_cast<float>(weights[j]);
    }
  }
}

void PanelFromA(const int8_t* a, int64_t stride, const uint16_t* scales, int64_t scale_stride,
                int64_t count, int64_t groups, float* panel) {
  for (int64_t j = 0; j < groups * kGroupSize; ++j) {
    for (int64_t k = 0; k < kPanelOutputs; ++k) {
      panel[j * kPanelOutputs + k] =
          k < count ? FloatFromBfloat16(scales[k * scale_stride + j / kGroupSize]) *
                          static_cast<float>(a[k * stride + j])
                    : 0.0f;
    }
  }
}

void PanelFromB(const int8_t* b, const uint16_t* scales, int64_t rank, float* panel) {
  for (int64_t k = 0; k < rank; ++k) {
    for (int64_t o = 0; o < kPanelOutputs; ++o)
      panel[k * kPanelOutputs + o] =
          FloatFromBfloat16(scales[k]) * static_cast<float>(ComponentOf(b, k, o));
  }
}

void PanelFromBf16(const uint16_t* values, int64_t depth, float* panel) {
  for (int64_t j = 0; j < depth; ++j) {
    for (int64_t o = 0; o < kPanelOutputs; ++o)
      panel[j * kPanelOutputs + o] = Bf16At(values + j * kPanelOutputs, o);
  }
}

void PanelFromF32(const float* weights, int64_t stride, int64_t count, int64_t depth,
                  float* panel) {
  for (int64_t j = 0; j < depth; ++j) {
    for (int64_t o = 0; o < kPanelOutputs; ++o)
      panel[j * kPanelOutputs + o] = o < count ? weights[o * stride + j] : 0.0f;
  }
}

void Gemm(const float* x, int64_t x_stride, int64_t rows, int64_t depth, const float* panel,
          const float* bias, float* out, int64_t out_stride, int64_t outputs, bool adds) {
  for (int64_t t = 0; t < rows; ++t) {
    float sums[kPanelOutputs] = {};
    for (int64_t j = 0; j < depth; ++j) {
      for (int64_t o = 0; o < kPanelOutputs; ++o)
        sums[o] += x[t * x_stride + j] * panel[j * kPanelOutputs + o];
    }
    for (int64_t o = 0; o < outputs; ++o) {
      if (bias != nullptr) sums[o] += bias[o];
      out[t * out_stride + o] = sums[o] + (adds ? out[t * out_stride + o] : 0.0f);
    }
  }
}

void ScaleAndShift(const float* x, float mean, float scale, const float* gain, const float* bias,
                   int64_t n, float* out) {
  for (int64_t j = 0; j < n; ++j)
    out[j] = (x[j] - mean) * scale * gain[j] + (bias == nullptr ? 0.0f : bias[j]);
}

void RmsNorm(const float* x, const float* gain, const float* bias, int64_t n, float epsilon,
             float* out) {
  float square = 0;
  for (int64_t j = 0; j < n; ++j) square += x[j] * x[j];
  const float scale = 1.0f / std::sqrt(square / static_cast<float>(n) + epsilon);
  ScaleAndShift(x, 0.0f, scale, gain, bias, n, out);
}

void LayerNorm(const float* x, const float* gain, const float* bias, int64_t n, float epsilon,
               float* out) {
  float sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += x[j];
  const float mean = sum / static_cast<float>(n);
  float square = 0;
  for (int64_t j = 0; j < n; ++j) square += (x[j] - mean) * (x[j] - mean);
  const float scale = 1.0f / std::sqrt(square / static_cast<float>(n) + epsilon);
  ScaleAndShift(x, mean, scale, gain, bias, n, out);
}

template <typename Function>
void Activate(const float* x, const float* up, int64_t n, float* out, Function function) {
  for (int64_t j = 0; j < n; ++j) out[j] = function(x[j]) * (up == nullptr ? 1.0f : up[j]);
}

void Silu(const float* x, const float* up, int64_t n, float* out) {
  Activate(x, up, n, out, [](float v) { return v / (1.0f + std::exp(-v)); });
}

void GeluErf(const float* x, const float* up, int64_t n, float* out) {
  Activate(x, up, n, out,
           [](float v) { return 0.5f * v * std::erfc(-v * static_cast<float>(M_SQRT1_2)); });
}

void GeluTanh(const float* x, const float* up, int64_t n, float* out) {
  // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), which keeps its accuracy where tanh(u) is near -1.
  Activate(x, up, n, out, [](float v) {
    const float u = 0.7978845608f * (v + 0.044715f * v * v * v);
    return v / (1.0f + std::exp(-2.0f * u));
  });
}

}  // namespace

const CpuKernels& PortableKernels() {
  static constexpr CpuKernels kKernels = {.instruction_set = CpuInstructionSet::kPortable,
                                          .quantise = Quantise,
                                          .planes = Planes,
                                          .fine_from_middle = FineFromMiddle,
                                          .factor_a = FactorA,
                                          .factor_b = FactorB,
                                          .bf16_panel = Bf16Panel,
                                          .dot = Dot,
                                          .panel_from_planes = PanelFromPlanes,
                                          .panel_from_a = PanelFromA,
                                          .panel_from_b = PanelFromB,
                                          .panel_from_bf16 = PanelFromBf16,
                                          .panel_from_f32 = PanelFromF32,
                                          .gemm = Gemm,
                                          .rms_norm = RmsNorm,
                                          .layer_norm = LayerNorm,
                                          .silu = Silu,
                                          .gelu_erf = GeluErf,
                                          .gelu_tanh = GeluTanh};
  return kKernels;
}

}  // namespace nestor
