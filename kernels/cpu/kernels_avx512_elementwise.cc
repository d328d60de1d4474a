// Norms and activations with AVX-512. Compiled for that instruction set: plain data and intrinsics
// alone, as in kernels_avx512.cc; formulas and bounds of errors are those of kernels_avx2.cc.

#include "kernels/cpu/kernels_avx512_elementwise.h"

#include <immintrin.h>

#include <cstdint>

namespace nestor {
namespace {

// 16 elements, and the last n % 16.
struct WholeVector {
  __m512 Load(const float* at) const { return _mm512_loadu_ps(at); }
  void Store(float* at, __m512 v) const { _mm512_storeu_ps(at, v); }
  __m512 Keep(__m512 v) const { return v; }
};
struct PartOfVector {
  __mmask16 mask;
  __m512 Load(const float* at) const { return _mm512_maskz_loadu_ps(mask, at); }
  void Store(float* at, __m512 v) const { _mm512_mask_storeu_ps(at, mask, v); }
  __m512 Keep(__m512 v) const { return _mm512_maskz_mov_ps(mask, v); }
};

// Calls function(j, lanes) for every 16 elements.
template <typename Function>
inline void ForEachVector(int64_t n, Function function) {
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) function(j, WholeVector());
  if (j < n) {
    const auto rest = static_cast<unsigned>(n - j);
    function(j, PartOfVector{static_cast<__mmask16>((1u << rest) - 1u)});
  }
}

void ScaleAndShift(const float* x, float mean, float scale, const float* gain, const float* bias,
                   int64_t n, float* out) {
  const __m512 means = _mm512_set1_ps(mean);
  const __m512 scales = _mm512_set1_ps(scale);
  ForEachVector(n, [&](int64_t j, auto lanes) {
    const __m512 shift = bias == nullptr ? _mm512_setzero_ps() : lanes.Load(bias + j);
    const __m512 normal = _mm512_mul_ps(_mm512_sub_ps(lanes.Load(x + j), means), scales);
    lanes.Store(out + j, _mm512_fmadd_ps(normal, lanes.Load(gain + j), shift));
  });
}

// The sum of (x - mean)^2.
float SumOfSquares(const float* x, float mean, int64_t n) {
  const __m512 means = _mm512_set1_ps(mean);
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  ForEachVector(n, [&](int64_t j, auto lanes) {
    const __m512 difference = lanes.Keep(_mm512_sub_ps(lanes.Load(x + j), means));
    sums[(j / 16) % 2] = _mm512_fmadd_ps(difference, difference, sums[(j / 16) % 2]);
  });
  return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

void RmsNorm(const float* x, const float* gain, const float* bias, int64_t n, float epsilon,
             float* out) {
  const float mean_square = SumOfSquares(x, 0.0f, n) / static_cast<float>(n);
  const float scale = 1.0f / __builtin_sqrtf(mean_square + epsilon);
  ScaleAndShift(x, 0.0f, scale, gain, bias, n, out);
}

void LayerNorm(const float* x, const float* gain, const float* bias, int64_t n, float epsilon,
               float* out) {
  __m512 sum = _mm512_setzero_ps();
  ForEachVector(n, [&](int64_t j, auto lanes) { sum = _mm512_add_ps(sum, lanes.Load(x + j)); });
  const float mean = _mm512_reduce_add_ps(sum) / static_cast<float>(n);
  const float variance = SumOfSquares(x, mean, n) / static_cast<float>(n);
  ScaleAndShift(x, mean, 1.0f / __builtin_sqrtf(variance + epsilon), gain, bias, n, out);
}

// e^x within 2e-7 relative in [-87, 88.7], clamped outside; NaN stays NaN.
inline __m512 Exp(__m512 x) {
  // min and max return their second operand where one is NaN.
  x = _mm512_max_ps(_mm512_set1_ps(-87.3f), x);
  x = _mm512_min_ps(_mm512_set1_ps(88.7f), x);
  const __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                            _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(power, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, power);
}

// out = activation(x) (* up), `activation` on vectors.
template <typename Function>
inline void Activate(const float* x, const float* up, int64_t n, float* out, Function activation) {
  ForEachVector(n, [&](int64_t j, auto lanes) {
    __m512 y = activation(lanes.Load(x + j));
    if (up != nullptr) y = _mm512_mul_ps(y, lanes.Load(up + j));
    lanes.Store(out + j, y);
  });
}

// x / (1 + e^-u).
inline __m512 TimesSigmoid(__m512 x, __m512 u) {
  const __m512 e = Exp(_mm512_sub_ps(_mm512_setzero_ps(), u));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

void Silu(const float* x, const float* up, int64_t n, float* out) {
  Activate(x, up, n, out, [](__m512 v) { return TimesSigmoid(v, v); });
}

void GeluTanh(const float* x, const float* up, int64_t n, float* out) {
  Activate(x, up, n, out, [](__m512 v) {
    const __m512 square = _mm512_mul_ps(v, v);
    const __m512 u =
        _mm512_mul_ps(v, _mm512_fmadd_ps(square, _mm512_set1_ps(2 * 0.7978845608f * 0.044715f),
                                         _mm512_set1_ps(2 * 0.7978845608f)));
    return TimesSigmoid(v, u);
  });
}

void GeluErf(const float* x, const float* up, int64_t n, float* out) {
  Activate(x, up, n, out, [](__m512 v) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 z = _mm512_mul_ps(_mm512_abs_ps(v), _mm512_set1_ps(0.70710678f));
    const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.5f), one));
    __m512 p = _mm512_set1_ps(0.17087277f);
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.82215223f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.48851587f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.13520398f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.27886807f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.18628806f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.09678418f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.37409196f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.00002368f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.26551223f));
    const __m512 tail =
        _mm512_mul_ps(_mm512_mul_ps(t, _mm512_set1_ps(0.5f)), Exp(_mm512_fnmadd_ps(z, z, p)));
    const __mmask16 is_negative = _mm512_movepi32_mask(_mm512_castps_si512(v));
    const __m512 phi = _mm512_mask_mov_ps(_mm512_sub_ps(one, tail), is_negative, tail);
    return _mm512_mul_ps(v, phi);
  });
}

}  // namespace

void SetAvx512Elementwise(CpuKernels* kernels) {
  kernels->rms_norm = RmsNorm;
  kernels->layer_norm = LayerNorm;
  kernels->silu = Silu;
  kernels->gelu_erf = GeluErf;
  kernels->gelu_tanh = GeluTanh;
}

}  // namespace nestor
