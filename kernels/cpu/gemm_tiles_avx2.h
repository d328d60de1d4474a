#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/kernels.h"

// For files that are compiled for one instruction set each, as factor_b_rows.h.
namespace nestor {
namespace {

// The rows of a tile: two sums each, beside two vectors of weights and what they are multiplied by.
constexpr int64_t kTileRows = 6;

template <int T>
struct TileSize {
  static constexpr int kRows = T;
};

// Calls tile(TileSize<T>(), t) for rows t to t + T, six and six and what is left.
template <typename Tile>
inline void ForEachTile(int64_t rows, Tile tile) {
  int64_t t = 0;
  for (; t + kTileRows <= rows; t += kTileRows) tile(TileSize<6>(), t);
  switch (rows - t) {
    case 5:
      return tile(TileSize<5>(), t);
    case 4:
      return tile(TileSize<4>(), t);
    case 3:
      return tile(TileSize<3>(), t);
    case 2:
      return tile(TileSize<2>(), t);
    case 1:
      return tile(TileSize<1>(), t);
    default:
      return;
  }
}

// The bias of a panel: zeros where there is none, and behind the last output.
struct PanelBias {
  PanelBias(const float* bias, int64_t outputs) {
    alignas(32) float padded[kPanelOutputs] = {};
    for (int64_t o = 0; o < outputs && bias != nullptr; ++o) padded[o] = bias[o];
    first = _mm256_load_ps(padded);
    second = _mm256_load_ps(padded + 8);
  }
  __m256 first, second;
};

// out[0..outputs) (+)= sums + bias.
inline void Finish(__m256 first, __m256 second, const PanelBias& bias, int64_t outputs, bool adds,
                   float* out) {
  first = _mm256_add_ps(first, bias.first);
  second = _mm256_add_ps(second, bias.second);
  if (outputs == kPanelOutputs) {
    if (adds) {
      first = _mm256_add_ps(first, _mm256_loadu_ps(out));
      second = _mm256_add_ps(second, _mm256_loadu_ps(out + 8));
    }
    _mm256_storeu_ps(out, first);
    _mm256_storeu_ps(out + 8, second);
    return;
  }
  alignas(32) float values[kPanelOutputs];
  _mm256_store_ps(values, first);
  _mm256_store_ps(values + 8, second);
  for (int64_t o = 0; o < outputs; ++o) out[o] = values[o] + (adds ? out[o] : 0.0f);
}

}  // namespace
}  // namespace nestor
